#include "support/verify.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "core/error.h"
#include "eval/random.h"

namespace tessera::cli {

namespace {

/// One head of one sequence of a [B, H, N, D] tensor.
TensorView head_view(const TensorView& tensor, std::int64_t sequence, std::int64_t head) {
  TensorView view = tensor;
  view.data = tensor.row(sequence, head, 0);
  view.shape[0] = view.shape[1] = 1;
  return view;
}

/// The rows `queries` of one query tile as a plan of its own: one head, a query subset, the entries of the tile.
Plan plan_of_tile(const Plan& plan, std::int64_t sequence, std::int64_t block, std::int64_t tile,
                  const std::vector<std::int32_t>& queries) {
  Plan part;
  part.problem = plan.problem;
  part.problem.batch = part.problem.q_heads = part.problem.kv_heads = 1;
  part.problem.q_offset = plan.problem.q_offset_of(sequence);
  part.problem.scale = plan.problem.softmax_scale();
  part.tile_q = plan.tile_q;
  part.tile_k = plan.tile_k;
  part.row_begin = {0, 1};
  const std::span<const PlanEntry> row = plan.row(plan.row_begin[block] + tile);
  part.entry_begin = {0, static_cast<std::int64_t>(row.size())};
  part.entries.assign(row.begin(), row.end());
  part.tokens = plan.tokens;
  part.mask_words = plan.mask_words;
  part.bands = plan.bands;
  part.sources = plan.sources;
  part.query_order = {queries};
  if (!plan.key_order.empty()) part.key_order = {plan.key_order[block]};
  return part;
}

struct Deviation {
  double error = 0;      ///< sum of squares
  double reference = 0;  ///< sum of squares
  double lse = 0;        ///< largest
};

/// At most 16 rows of a query tile, its first and last among them, as queries.
std::vector<std::int32_t> sampled_queries(const Plan& plan, std::int64_t block, std::int64_t tile) {
  constexpr std::int64_t most_rows = 16;
  const std::int64_t tile_rows = std::min(plan.tile_q, plan.queries_of(block) - tile * plan.tile_q);
  const std::int64_t rows = std::min(tile_rows, most_rows);
  const std::span<const PlanEntry> entries = plan.row(plan.row_begin[block] + tile);
  // Bitmasks count rows from the tile's first; else the rows may be spread from the first to the last.
  const bool spread = rows > 1 && std::none_of(entries.begin(), entries.end(),
                                               [](const PlanEntry& entry) { return entry.mask == EntryMask::bitmask; });
  std::vector<std::int32_t> queries(static_cast<std::size_t>(rows));
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t row = spread ? i * (tile_rows - 1) / (rows - 1) : i;
    queries[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(tile * plan.tile_q + row);
  }
  if (!plan.query_order.empty() && !plan.query_order[block].empty()) {
    for (std::int32_t& query : queries) query = plan.query_order[block][query];
  }
  return queries;
}

/// The tensors of one query head and its kv head.
AttentionInputs head_inputs(const AttentionInputs& inputs, const Problem& problem, std::int64_t sequence,
                            std::int64_t head) {
  AttentionInputs part;
  part.q = head_view(inputs.q, sequence, head);
  part.k = head_view(inputs.k, sequence, head / problem.group());
  part.v = head_view(inputs.v, sequence, head / problem.group());
  return part;
}

void compare_tile(const Plan& plan, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                  std::int64_t sequence, std::int64_t head, std::int64_t tile, Deviation& deviation) {
  const Problem& problem = plan.problem;
  const std::int64_t block = plan.block_of(sequence, head);
  const std::vector<std::int32_t> queries = sampled_queries(plan, block, tile);
  const AttentionInputs part = head_inputs(inputs, problem, sequence, head);
  std::vector<float> o(static_cast<std::size_t>(problem.q_len * problem.value_dim));
  std::vector<float> lse(static_cast<std::size_t>(problem.q_len));
  RunOptions options;
  options.kernel = KernelKind::reference;
  run(plan_of_tile(plan, sequence, block, tile, queries), part,
      {mutable_view_of(o.data(), DType::f32, {1, 1, problem.q_len, problem.value_dim}), lse}, options);

  for (const std::int32_t query : queries) {
    const std::byte* actual = outputs.o.row(sequence, head, query);
    for (std::int64_t i = 0; i < problem.value_dim; ++i) {
      const double expected = o[static_cast<std::size_t>(query * problem.value_dim + i)];
      const double difference = load_as_float(actual, outputs.o.dtype, i) - expected;
      deviation.error += difference * difference;
      deviation.reference += expected * expected;
    }
    const float wanted = lse[static_cast<std::size_t>(query)];
    const float got =
        outputs.lse[static_cast<std::size_t>((sequence * problem.q_heads + head) * problem.q_len + query)];
    const double difference = wanted == got ? 0 : std::abs(static_cast<double>(wanted) - got);
    // NaN must not hide behind a maximum.
    deviation.lse = std::isnan(difference) ? difference : std::max(deviation.lse, difference);
  }
}

void compare_gradient_tile(const Plan& plan, const AttentionInputs& inputs, const SavedForward& saved,
                           const TensorView& d_q, std::int64_t sequence, std::int64_t head, std::int64_t tile,
                           Deviation& deviation) {
  const Problem& problem = plan.problem;
  const std::int64_t block = plan.block_of(sequence, head);
  const std::vector<std::int32_t> queries = sampled_queries(plan, block, tile);
  SavedForward part;
  part.o = head_view(saved.o, sequence, head);
  part.d_o = head_view(saved.d_o, sequence, head);
  const auto rows = static_cast<std::size_t>(problem.q_len);
  part.lse = saved.lse.subspan(static_cast<std::size_t>(sequence * problem.q_heads + head) * rows, rows);
  std::vector<float> expected(rows * static_cast<std::size_t>(problem.head_dim));
  Gradients gradients;
  gradients.d_q = mutable_view_of(expected.data(), DType::f32, {1, 1, problem.q_len, problem.head_dim});
  RunOptions options;
  options.kernel = KernelKind::reference;
  run_backward(plan_of_tile(plan, sequence, block, tile, queries), head_inputs(inputs, problem, sequence, head), part,
               gradients, options);
  for (const std::int32_t query : queries) {
    for (std::int64_t i = 0; i < problem.head_dim; ++i) {
      const double wanted = expected[static_cast<std::size_t>(query * problem.head_dim + i)];
      const double difference = load_as_float(d_q.row(sequence, head, query), d_q.dtype, i) - wanted;
      deviation.error += difference * difference;
      deviation.reference += wanted * wanted;
    }
  }
}

/// body(sequence, head, tile) for the first, the last and a random query tile of a few heads.
template <class Body>
void for_each_sampled_tile(const Plan& plan, const Body& body) {
  const Problem& problem = plan.problem;
  eval::Random random(2718, {28});
  const std::int64_t pairs = problem.batch * problem.q_heads;
  for (const std::int64_t pair : std::set<std::int64_t>{0, random.below(pairs), pairs - 1}) {
    const std::int64_t block = plan.block_of(pair / problem.q_heads, pair % problem.q_heads);
    const std::int64_t tiles = (plan.queries_of(block) + plan.tile_q - 1) / plan.tile_q;
    if (tiles == 0) continue;
    for (const std::int64_t tile : std::set<std::int64_t>{0, random.below(tiles), tiles - 1}) {
      body(pair / problem.q_heads, pair % problem.q_heads, tile);
    }
  }
}

}  // namespace

void verify_samples(std::string_view what, const Plan& plan, const AttentionInputs& inputs,
                    const AttentionOutputs& outputs) {
  Deviation deviation;
  for_each_sampled_tile(plan, [&](std::int64_t sequence, std::int64_t head, std::int64_t tile) {
    compare_tile(plan, inputs, outputs, sequence, head, tile, deviation);
  });
  // bf16 keeps 8 bits of the weights and of the output: errors of single elements of up to 2^-8 each.
  const bool single = inputs.q.dtype == DType::f32 && outputs.o.dtype == DType::f32;
  const double allowed = single ? 1e-4 : 1e-2;
  const double relative = deviation.reference > 0 ? std::sqrt(deviation.error / deviation.reference) : deviation.error;
  require(relative <= allowed && deviation.lse <= allowed,
          "{}: wrong answer; against the float64 reference on sampled rows the relative L2 error is {:.3g} and the "
          "largest LSE error {:.3g}; allowed {:.3g}",
          what, relative, deviation.lse, allowed);
}

void verify_gradient_samples(std::string_view what, const Plan& plan, const AttentionInputs& inputs,
                             const SavedForward& saved, const TensorView& d_q) {
  Deviation deviation;
  for_each_sampled_tile(plan, [&](std::int64_t sequence, std::int64_t head, std::int64_t tile) {
    compare_gradient_tile(plan, inputs, saved, d_q, sequence, head, tile, deviation);
  });
  // dP - delta cancels: bf16 rounding of P, dS and O counts more than in the forward pass.
  const double allowed = inputs.q.dtype == DType::f32 ? 1e-3 : 3e-2;
  const double relative = deviation.reference > 0 ? std::sqrt(deviation.error / deviation.reference) : deviation.error;
  require(relative <= allowed,
          "{}: wrong gradient; against the float64 reference on sampled rows the relative L2 error of dQ is {:.3g}; "
          "allowed {:.3g}",
          what, relative, allowed);
}

}  // namespace tessera::cli
