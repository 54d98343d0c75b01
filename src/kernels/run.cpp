// Runs a plan: checks what the kernels rely on, chooses the kernel and the instruction set.
#include <algorithm>
#include <array>
#include <chrono>
#include <limits>

#include "core/error.h"
#include "core/parallel.h"
#include "kernels/cpu/cpu.h"
#include "kernels/kernels.h"

namespace tessera {

namespace {

constexpr std::array<std::string_view, 5> kKernelNames{"automatic", "reference", "query-major", "key-major",
                                                       "split-key"};

void check_outputs(const Problem& problem, const AttentionOutputs& outputs) {
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  const std::array<std::int64_t, 4> expected{batch, problem.q_heads, problem.q_len, problem.value_dim};
  require(outputs.o.data != nullptr, "o has no data");
  require(is_attention_dtype(outputs.o.dtype), "o has dtype {}; expected f32, bf16 or f16", name_of(outputs.o.dtype));
  require(outputs.o.shape == expected, "o has shape [{}]; expected [{}] (batch, heads, tokens, dim)",
          fmt::join(outputs.o.shape, ", "), fmt::join(expected, ", "));
  require(outputs.o.strides[3] == 1, "o has stride {} on its last axis; expected 1", outputs.o.strides[3]);
  const auto rows = static_cast<std::size_t>(batch * problem.q_heads * problem.q_len);
  require(outputs.lse.empty() || outputs.lse.size() == rows, "lse has {} elements; expected {}", outputs.lse.size(),
          rows);
  require(outputs.row_maximum.empty() || outputs.row_maximum.size() == rows, "row_maximum has {} elements; expected {}",
          outputs.row_maximum.size(), rows);
  const MutableTensorView& scores = outputs.scores;
  if (scores.data == nullptr) return;
  const std::array<std::int64_t, 4> pairs{problem.batch, problem.q_heads, problem.q_len, problem.kv_len};
  require(!problem.variable_length(), "scores need a uniform batch");
  require(scores.dtype == DType::f32 && scores.shape == pairs && scores.strides[3] == 1,
          "scores is {} [{}] with stride {} on its last axis; expected f32 [{}] and 1", name_of(scores.dtype),
          fmt::join(scores.shape, ", "), scores.strides[3], fmt::join(pairs, ", "));
}

/// What the query-major kernel and the reference offer beside the output.
void check_maxima(const kernels::Call& call) {
  const Plan& plan = call.plan;
  const Problem& problem = plan.problem;
  require(!call.follows_maxima() || call.inputs.modifiers.weights == RowWeights::softmax,
          "row_maximum, tile_maximum and online_skip go with softmax weights only; got {}",
          name_of(call.inputs.modifiers.weights));
  if (const MutableTensorView& tiles = call.outputs.tile_maximum; tiles.data != nullptr) {
    const std::array<std::int64_t, 4> expected{problem.batch, problem.q_heads,
                                               (problem.q_len + plan.tile_q - 1) / plan.tile_q,
                                               (problem.kv_len + plan.tile_k - 1) / plan.tile_k};
    require(!problem.variable_length() && plan.query_order.empty(),
            "tile_maximum needs a uniform batch and a plan without query order");
    require(tiles.dtype == DType::f32 && tiles.shape == expected && tiles.strides[3] == 1,
            "tile_maximum is {} [{}] with stride {} on its last axis; expected f32 [{}] and 1", name_of(tiles.dtype),
            fmt::join(tiles.shape, ", "), tiles.strides[3], fmt::join(expected, ", "));
  }
  const OnlineSkip& skip = call.online_skip;
  require(skip.distance >= 0, "online_skip.distance is {}; expected 0 (off) or a positive number", skip.distance);
  if (!skip.used()) return;
  require(skip.rows > 0 && kernels::kTileRows % skip.rows == 0,
          "online_skip.rows is {}; expected a power of 2 up to {}", skip.rows, kernels::kTileRows);
  require(
      kernels::can_run_key_major(plan) && plan.tile_k >= kernels::kGroupKeys && kernels::kBlockKeys % plan.tile_k == 0,
      "online_skip needs a plan of whole key tiles in natural order, of 16, 32, 64 or 128 keys; tile_k is {}",
      plan.tile_k);
}

/// Few query rows in all: split the keys. Few rows per key tile: walk the keys. Else walk the queries.
KernelKind choose_kernel(const Plan& plan) {
  const Problem& problem = plan.problem;
  constexpr std::int64_t decode_queries = 16;
  constexpr std::int64_t few_rows = 32;
  std::int64_t longest = 0;
  for (std::int64_t s = 0; s < problem.batch; ++s) longest = std::max(longest, problem.q_len_of(s));
  if (longest <= decode_queries) return KernelKind::split_key;
  const std::int64_t heads_per_row = plan.plan_heads == problem.q_heads ? 1 : problem.group();
  if (plan.tile_q * heads_per_row < few_rows && kernels::can_run_key_major(plan)) return KernelKind::key_major;
  return KernelKind::query_major;
}

}  // namespace

void kernels::check_key_sources(const Plan& plan, const AttentionInputs& inputs) {
  const Problem& problem = plan.problem;
  require(inputs.sources.size() + 1 == plan.sources.size(), "{} derived key sources given; the plan has {}",
          inputs.sources.size(), plan.sources.size() - 1);
  for (std::size_t i = 0; i < inputs.sources.size(); ++i) {
    const KeySource& source = inputs.sources[i];
    const std::int64_t keys = plan.sources[i + 1].keys;
    const std::array<std::int64_t, 4> k_shape{problem.batch, problem.kv_heads, keys, problem.head_dim};
    const std::array<std::int64_t, 4> v_shape{problem.batch, problem.kv_heads, keys, problem.value_dim};
    require(source.k.shape == k_shape && source.v.shape == v_shape,
            "key source '{}' has k [{}] and v [{}]; expected [{}] and [{}]", plan.sources[i + 1].name,
            fmt::join(source.k.shape, ", "), fmt::join(source.v.shape, ", "), fmt::join(k_shape, ", "),
            fmt::join(v_shape, ", "));
    require(source.k.dtype == inputs.k.dtype && source.v.dtype == inputs.v.dtype && source.k.strides[3] == 1 &&
                source.v.strides[3] == 1,
            "key source '{}' needs the dtype of k and v and stride 1 on its last axis", plan.sources[i + 1].name);
    require(source.log_weight.empty() ||
                static_cast<std::int64_t>(source.log_weight.size()) == problem.batch * problem.kv_heads * keys,
            "log_weight of key source '{}' has {} elements; expected {}", plan.sources[i + 1].name,
            source.log_weight.size(), problem.batch * problem.kv_heads * keys);
    require(source.log_weight.empty() || inputs.modifiers.weights == RowWeights::softmax,
            "log_weight of key source '{}' goes with softmax weights only; got {}", plan.sources[i + 1].name,
            name_of(inputs.modifiers.weights));
  }
}

std::string_view name_of(KernelKind kind) {
  return kKernelNames.at(static_cast<std::size_t>(kind));
}

RunReport run(const Plan& plan, const AttentionInputs& inputs, const AttentionOutputs& outputs,
              const RunOptions& options) {
  check_inputs(plan.problem, inputs);
  check_outputs(plan.problem, outputs);
  kernels::check_key_sources(plan, inputs);
  require(options.threads >= 0, "threads is {}; expected 0 (all) or more", options.threads);

  const auto start = std::chrono::steady_clock::now();
  const int threads = thread_count(options.threads);
  const kernels::Call call{
      plan, inputs, outputs, threads, options.workspace_bytes, options.workspace, options.online_skip};
  check_maxima(call);
  kernels::clear_uncovered_rows(call);

  RunReport report;
  report.kernel = options.kernel;
  if (report.kernel == KernelKind::automatic) {
    report.kernel = outputs.scores.data != nullptr ? KernelKind::split_key
                    : call.follows_maxima()        ? KernelKind::query_major
                                                   : choose_kernel(plan);
  }
  require(outputs.scores.data == nullptr || report.kernel == KernelKind::split_key ||
              report.kernel == KernelKind::reference,
          "scores are not a by-product of the {} kernel; expected split-key, reference or automatic",
          name_of(report.kernel));
  require(!call.follows_maxima() || report.kernel == KernelKind::query_major || report.kernel == KernelKind::reference,
          "row_maximum, tile_maximum and online_skip are no business of the {} kernel; expected query-major, reference "
          "or automatic",
          name_of(report.kernel));
  report.isa = options.isa.value_or(default_isa());
  report.threads = call.threads;
  if (report.kernel == KernelKind::reference) {
    report.skipped_pairs = kernels::run_reference(call);
  } else if (report.kernel == KernelKind::split_key) {
    report.workspace_bytes = kernels::run_split_key(call, kernels::level_of(report.isa));
  } else if (report.kernel == KernelKind::key_major) {
    require(kernels::can_run_key_major(plan), "the key-major kernel runs plans of whole key tiles in natural order");
    report.workspace_bytes = kernels::run_key_major(call, kernels::level_of(report.isa));
  } else {
    report.workspace_bytes = kernels::run_query_major(call, kernels::level_of(report.isa), &report.skipped_pairs);
  }
  report.kernel_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace tessera
