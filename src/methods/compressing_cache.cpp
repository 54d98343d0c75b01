#include "methods/compressing_cache.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <limits>
#include <numeric>

#include "core/convert.h"
#include "methods/evicting_cache.h"

namespace tessera {

RunReport CompressingCache::attend_kept_rows(const CacheCall& call, const PlanContext& context) {
  const std::int64_t rows = call.q.tokens();
  const std::int64_t count = shape().q_heads * rows;
  Branch whole(count, shape().value_dim);
  Branch compressed(count, shape().value_dim);
  const MutableTensorView whole_o =
      mutable_view_of(whole.o.data(), DType::f32, {1, shape().q_heads, rows, shape().value_dim});
  RunReport report = attend_kept(pages(), call.q, {}, nullptr, {whole_o, whole.lse}, context, nullptr);
  const auto start = std::chrono::steady_clock::now();
  attend_compressed(call.q, compressed, context);
  merge_branches(compressed, whole, call.outputs, context.run.threads);
  report.kernel_ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  if (call.executed != nullptr) *call.executed = dense_plan(cache_problem(shape(), rows, tokens()));
  return report;
}

void CompressingCache::observe(const CacheCall& call, std::span<const float> lse, const PlanContext& context) {
  observe_pass(call, lse, context);
  // A pass of a prompt may still be taken back.
  if (!call.prompt) compress_what_is_due(false, context);
}

void CompressingCache::finish_prefill(const PlanContext& context) {
  compress_what_is_due(true, context);
}

void CompressingCache::compress_what_is_due(bool prompt_ended, const PlanContext& context) {
  const std::int64_t held = size_of_head(0);
  const std::int64_t count = due(held, prompt_ended);
  if (count <= 0) return;
  WholeRows rows;
  for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
    const Problem problem = problem_of_head(head, 0);
    const AttentionInputs inputs = inputs_of_head(head);
    rows.keys.push_back(kernels::key_rows_of(problem, inputs.k, inputs.pages, 0, 0));
    rows.values.push_back(kernels::key_rows_of(problem, inputs.v, inputs.pages, 0, 0));
  }
  compress(rows, count, context);
  std::vector<std::int32_t> slots(static_cast<std::size_t>(held - count));
  std::iota(slots.begin(), slots.end(), static_cast<std::int32_t>(count));
  keep_only(KeptSlots(static_cast<std::size_t>(shape().kv_heads), slots));
}

void attend_all_rows(const HeadPages& pages, const TensorView& q, float scale, Branch& out, const RunOptions& options) {
  const LayerCacheShape& shape = pages.shape();
  if (pages.rows() == 0) {
    std::fill(out.o.begin(), out.o.end(), 0.0F);
    std::fill(out.lse.begin(), out.lse.end(), -std::numeric_limits<float>::infinity());
    return;
  }
  AttentionInputs inputs = pages.inputs();
  inputs.q = q;
  Problem problem;
  problem.batch = shape.kv_heads;
  problem.q_heads = shape.group();
  problem.kv_heads = 1;
  problem.q_len = q.tokens();
  problem.kv_len = pages.longest();
  problem.head_dim = shape.head_dim;
  problem.value_dim = shape.value_dim;
  problem.scale = scale;
  problem.causal = false;
  const std::array<std::int64_t, 4> o_shape{shape.kv_heads, shape.group(), q.tokens(), shape.value_dim};
  run(dense_plan(problem), inputs, {mutable_view_of(out.o.data(), DType::f32, o_shape), out.lse}, options);
}

std::vector<float> queries_as_float(const TensorView& q) {
  const std::int64_t rows = q.tokens();
  std::vector<float> out(static_cast<std::size_t>(q.shape[1] * rows * q.dim()));
  for (std::int64_t i = 0; i < q.shape[1] * rows; ++i) {
    to_float(q.row(0, i / rows, i % rows), q.dtype, q.dim(), out.data() + i * q.dim());
  }
  return out;
}

}  // namespace tessera
