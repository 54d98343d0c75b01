// Tessera behind a C function, for peer_pytorch.py: it runs on PyTorch's own tensors, in PyTorch's process.
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string_view>

#include "tessera/tessera.h"

namespace {

struct PeerTimes {
  double plan_ms;
  double kernel_ms;
  double density;
};

void attend(const void* q, const void* k, const void* v, void* o, const std::int64_t* sizes, std::string_view dtype,
            bool causal, std::string_view spec, int threads, PeerTimes& times) {
  using namespace tessera;
  const DType type = dtype_from_name(dtype);
  const auto [batch, q_heads, kv_heads, queries, keys, dim] =
      std::array{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  AttentionInputs inputs;
  inputs.q = view_of(q, type, {batch, q_heads, queries, dim});
  inputs.k = view_of(k, type, {batch, kv_heads, keys, dim});
  inputs.v = view_of(v, type, {batch, kv_heads, keys, dim});
  const AttentionOutputs outputs{mutable_view_of(o, type, {batch, q_heads, queries, dim}), {}};
  PlanContext context;
  context.run.threads = threads;
  Plan plan;
  const RunReport report =
      make_method(spec)->attend(problem_of(inputs.q, inputs.k, inputs.v, causal), inputs, outputs, context, &plan);
  times = {report.plan_ms, report.kernel_ms, 0};
  if (plan.rows() > 0) times.density = statistics(plan).density;
}

}  // namespace

/// One attention call on contiguous tensors. sizes: batch, query heads, kv heads, queries, keys, head dim. Returns 0,
/// or 1 with a message in `error`.
extern "C" int tessera_peer_attend(const void* q, const void* k, const void* v, void* o, const std::int64_t* sizes,
                                   const char* dtype, int causal, const char* spec, int threads, PeerTimes* times,
                                   char* error, std::size_t error_size) {
  try {
    attend(q, k, v, o, sizes, dtype, causal != 0, spec, threads, *times);
    return 0;
  } catch (const std::exception& fault) {
    std::strncpy(error, fault.what(), error_size - 1);
    error[error_size - 1] = '\0';
    return 1;
  }
}
