// Piecewise Sparse Attention (PISA), arXiv:2602.01077: the critical key tiles of a query tile are computed exactly, all
// others by a Taylor expansion around their mean key, so that no key is left out.
//
// With kb_j the mean key of tile j, n_j its keys and H_j = sum over its keys of (k - kb_j) v^T, the exponentials of a
// tile are exp(s) = exp(scale q.kb_j) (1 + scale q.(k - kb_j) + ...). Order zero is one pooled key of weight n_j; the
// denominator has no first-order term. The first order of tile j adds exp(scale q.kb_j) scale q H_j to the numerator;
// the method replaces the H_j by their mean over all keys, one matrix per head, so that it costs one product per query.
// Tiles are selected by scale qb.kb_j + ln(|H_j| + 1e-5), their nearness and the size of their remainder.
//
// Differs from the authors' code: the pooled mass is held relative to the log-sum-exp of its own branch (their kernel
// does not rescale it when the running maximum rises). correction=block keeps every H_j: as costly as dense attention,
// it shows what the shared matrix gives away. Means are stored in the dtype of K; H and its product are float.
//
// The published models run their first 4 layers dense: a method file with layers "0-3" and "4-" does.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/grid_order.h"
#include "methods/registry.h"
#include "score/pooled_source.h"
#include "score/product.h"
#include "score/top_k.h"

namespace tessera {
namespace {

using score::OrderedTiles;

/// Floor of |H| in the selection: tiles of equal keys have none.
constexpr float kSmallestNorm = 1e-5F;

enum class Correction : std::uint8_t { shared, block, none };

/// What a head keeps of its key tiles.
struct TileMoments {
  std::vector<float> mean_keys;  ///< [tiles][head_dim]
  std::vector<float> norms;      ///< [tiles]: Frobenius norm of H_j
  std::vector<float> mean_h;     ///< [value_dim][head_dim]: sum of all H_j, transposed, over the number of keys
};

/// Keys of one tile relative to their mean, and values, both with tokens innermost.
void load_transposed(const Problem& problem, const AttentionInputs& inputs, const OrderedTiles& tokens,
                     std::int64_t kv_head, std::int64_t first, std::int64_t count, float* mean,
                     std::vector<float>& keys, std::vector<float>& values) {
  const std::int64_t dim = problem.head_dim;
  const std::int64_t value_dim = problem.value_dim;
  std::vector<float> rows(static_cast<std::size_t>(count * std::max(dim, value_dim)));
  tokens.load_keys(problem, inputs, kv_head, first, count, rows.data());
  for (std::int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += rows[i * dim + d];
    mean[d] = static_cast<float>(sum / static_cast<double>(count));
    for (std::int64_t i = 0; i < count; ++i) keys[d * count + i] = rows[i * dim + d] - mean[d];
  }
  tokens.load_values(problem, inputs, kv_head, first, count, rows.data());
  for (std::int64_t d = 0; d < value_dim; ++d) {
    for (std::int64_t i = 0; i < count; ++i) values[d * count + i] = rows[i * value_dim + d];
  }
}

TileMoments moments_of(const Problem& problem, const AttentionInputs& inputs, const OrderedTiles& tokens,
                       std::int64_t kv_head, std::int64_t block, int threads) {
  const std::int64_t dim = problem.head_dim;
  const std::int64_t value_dim = problem.value_dim;
  const std::int64_t tiles = tokens.key_tiles();
  constexpr std::int64_t tiles_per_sum = 32;
  const std::int64_t sums = (tiles + tiles_per_sum - 1) / tiles_per_sum;
  TileMoments moments;
  moments.mean_keys.resize(static_cast<std::size_t>(tiles * dim));
  moments.norms.resize(static_cast<std::size_t>(tiles));
  moments.mean_h.resize(static_cast<std::size_t>(value_dim * dim), 0.0F);
  std::vector<std::vector<double>> partial(static_cast<std::size_t>(sums));
  parallel_for(sums, threads, [&](std::int64_t part, int) {
    std::vector<float> keys(static_cast<std::size_t>(block * dim));
    std::vector<float> values(static_cast<std::size_t>(block * value_dim));
    std::vector<float> h(static_cast<std::size_t>(value_dim * dim));
    std::vector<double>& sum = partial[part];
    sum.resize(h.size(), 0.0);
    for (std::int64_t tile = part * tiles_per_sum; tile < std::min((part + 1) * tiles_per_sum, tiles); ++tile) {
      const std::int64_t count = tokens.columns(tile);
      load_transposed(problem, inputs, tokens, kv_head, tile * block, count, moments.mean_keys.data() + tile * dim,
                      keys, values);
      score::multiply_transposed(values.data(), value_dim, count, keys.data(), dim, count, count, 1, h.data(), dim);
      double square = 0;
      for (std::size_t i = 0; i < h.size(); ++i) {
        square += static_cast<double>(h[i]) * h[i];
        sum[i] += h[i];
      }
      moments.norms[tile] = static_cast<float>(std::sqrt(square));
    }
  });
  for (std::size_t i = 0; i < moments.mean_h.size(); ++i) {
    double sum = 0;
    for (const auto& part : partial) sum += part[i];
    moments.mean_h[i] = static_cast<float>(sum / static_cast<double>(std::max<std::int64_t>(1, tokens.keys())));
  }
  return moments;
}

/// The entries of one key source only.
Plan only_source(const Plan& plan, std::uint16_t source) {
  Plan part = plan;
  part.entries.clear();
  part.entry_begin.assign(1, 0);
  for (std::int64_t r = 0; r < plan.rows(); ++r) {
    for (const PlanEntry& entry : plan.row(r)) {
      if (entry.source == source) part.entries.push_back(entry);
    }
    part.entry_begin.push_back(static_cast<std::int64_t>(part.entries.size()));
  }
  return part;
}

/// Output and log-sum-exp of one branch in float.
struct Branch {
  std::vector<float> o;
  std::vector<float> lse;

  Branch(const Problem& problem, std::int64_t rows)
      : o(static_cast<std::size_t>(rows * problem.value_dim)), lse(static_cast<std::size_t>(rows)) {}
  AttentionOutputs outputs(const Problem& problem, std::int64_t batch) {
    return {mutable_view_of(o.data(), DType::f32, {batch, problem.q_heads, problem.q_len, problem.value_dim}), lse};
  }
};

class PiecewiseSparse {
 public:
  struct Params {
    GridOrder order{.order = GridOrder::Kind::tile, .tile = "1x8x8"};
    std::int64_t block = 64;
    double density = 0.15;
    bool value_aware = true;
    Correction correction = Correction::shared;
    void visit(ParameterList& v) {
      order.visit(v);
      v("block", block, 1, 1024, "tokens per query tile and key tile");
      v("density", density, 0, 1, "share of the key tiles that a query tile computes exactly, one at least");
      v("value_aware", value_aware, "select by the size of the Taylor remainder too");
      v("correction", correction, {"shared", "block", "none"},
        "first order of the other tiles: one matrix for all, one per tile (as slow as dense), or none");
    }
  };
  static MethodInfo info() {
    return {.name = "pisa",
            .family = "diffusion",
            .summary = "critical tiles exactly, all other tiles by a Taylor expansion around their mean key",
            .paper = "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers, arXiv:2602.01077",
            .phases = {.prefill = true, .decode = false},
            .domain = {.causal = false, .reason = "means and H of a tile would mix in later keys"},
            .budget = {{"density", 0, 1}}};
  }

  explicit PiecewiseSparse(Params params) : params_(std::move(params)) { params_.order.check("pisa"); }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    require_supported(inputs);
    const std::vector<OrderedTiles> sequences = sequences_of(problem);
    return plan_over(problem, inputs, context, sequences, moments_over(problem, inputs, sequences, context));
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    require_supported(inputs);
    const auto start = std::chrono::steady_clock::now();
    const std::vector<OrderedTiles> sequences = sequences_of(problem);
    const std::vector<TileMoments> moments = moments_over(problem, inputs, sequences, context);
    Plan plan = plan_over(problem, inputs, context, sequences, moments);
    const score::PooledSource means(problem, inputs, sequences, params_.block, context.run.threads);
    AttentionInputs with_means = inputs;
    with_means.sources = {means.view()};
    const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;

    const auto kernel_start = std::chrono::steady_clock::now();
    const Plan pooled = only_source(plan, 1);
    RunReport report;
    if (pooled.entries.empty() || params_.correction == Correction::none) {
      report = run(plan, with_means, outputs, context.run);
    } else {
      const std::int64_t batch = inputs.q.batch();
      const std::int64_t rows = batch * problem.q_heads * problem.q_len;
      Branch exact(problem, rows);
      Branch rest(problem, rows);
      report = run(only_source(plan, 0), with_means, exact.outputs(problem, batch), context.run);
      run(pooled, with_means, rest.outputs(problem, batch), context.run);
      merge(problem, inputs, sequences, moments, plan, exact, rest, outputs, context);
    }
    const std::chrono::duration<double, std::milli> ran = std::chrono::steady_clock::now() - kernel_start;
    report.plan_ms = planned.count();
    report.kernel_ms = ran.count();
    if (executed != nullptr) *executed = std::move(plan);
    return report;
  }

 private:
  static void require_supported(const AttentionInputs& inputs) {
    require(!inputs.modifiers.changes_scores() && inputs.modifiers.sink_logits.empty(),
            "pisa: the expansion knows no modifiers of scores; expected none of softcap, ALiBi, key bias, sink logits");
  }

  std::vector<OrderedTiles> sequences_of(const Problem& problem) const {
    return score::ordered_sequences(problem, params_.block, params_.block,
                                    [&](const TokenGrid& grid) { return params_.order.tokens(grid); });
  }

  /// Of every (sequence, kv head).
  std::vector<TileMoments> moments_over(const Problem& problem, const AttentionInputs& inputs,
                                        std::span<const OrderedTiles> sequences, const PlanContext& context) const {
    std::vector<TileMoments> moments;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      for (std::int64_t head = 0; head < problem.kv_heads; ++head) {
        moments.push_back(moments_of(problem, inputs, sequences[s], head, params_.block, context.run.threads));
      }
    }
    return moments;
  }

  Plan plan_over(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context,
                 std::span<const OrderedTiles> sequences, std::span<const TileMoments> moments) const {
    std::vector<Plan> parts(static_cast<std::size_t>(problem.batch * problem.q_heads));
    parallel_for(static_cast<std::int64_t>(parts.size()), context.run.threads, [&](std::int64_t block, int) {
      const std::int64_t s = block / problem.q_heads;
      const std::int64_t head = block % problem.q_heads;
      parts[block] = block_plan(problem, inputs, sequences[s], block, head,
                                moments[s * problem.kv_heads + head / problem.group()]);
    });
    return concatenate_blocks(problem, problem.q_heads, problem.batch, parts);
  }

  Plan block_plan(const Problem& problem, const AttentionInputs& inputs, const OrderedTiles& tokens, std::int64_t block,
                  std::int64_t head, const TileMoments& moments) const {
    PlanBuilder builder =
        PlanBuilder::for_block(problem, params_.block, params_.block, problem.q_heads, problem.batch, block);
    builder.add_source({"tile means", score::PooledSource::entries(problem, params_.block), false});
    tokens.set_orders(builder, block);
    const std::int64_t tiles = tokens.key_tiles();
    const std::int64_t dim = problem.head_dim;
    const auto kept =
        std::max<std::int64_t>(1, static_cast<std::int64_t>(params_.density * static_cast<double>(tiles)));
    std::vector<float> scores(static_cast<std::size_t>(tiles));
    std::vector<float> queries(static_cast<std::size_t>(params_.block * dim));
    std::vector<float> mean(static_cast<std::size_t>(dim));
    for (std::int64_t tile = 0; tile < tokens.query_tiles(); ++tile) {
      const std::int64_t rows = tokens.rows(tile);
      tokens.load_queries(problem, inputs, head, tile * params_.block, rows, queries.data());
      for (std::int64_t d = 0; d < dim; ++d) {
        float sum = 0;
        for (std::int64_t r = 0; r < rows; ++r) sum += queries[r * dim + d];
        mean[d] = sum / static_cast<float>(rows);
      }
      if (tiles > 0) {
        score::multiply_transposed(mean.data(), 1, dim, moments.mean_keys.data(), tiles, dim, dim,
                                   problem.softmax_scale(), scores.data(), tiles);
      }
      for (std::int64_t j = 0; params_.value_aware && j < tiles; ++j) {
        scores[j] += std::log(moments.norms[j] + kSmallestNorm);
      }
      add_row(builder, tokens, score::top_k(scores, kept));
      builder.end_row();
    }
    return std::move(builder).finish();
  }

  /// Selected tiles as runs of raw keys, the others as runs of means.
  void add_row(PlanBuilder& builder, const OrderedTiles& tokens, std::span<const std::int32_t> selected) const {
    const std::int64_t tiles = tokens.key_tiles();
    for (std::size_t i = 0; i < selected.size();) {
      std::size_t end = i + 1;
      while (end < selected.size() && selected[end] == selected[end - 1] + 1) ++end;
      const std::int64_t first = selected[i] * params_.block;
      builder.run(first, std::min((selected[end - 1] + 1) * params_.block, tokens.keys()) - first);
      i = end;
    }
    std::int64_t next = 0;
    for (const std::int32_t tile : selected) {
      builder.run(next, tile - next, EntryMask::none, 0, 1);
      next = tile + 1;
    }
    builder.run(next, tiles - next, EntryMask::none, 0, 1);
  }

  /// O = exact + rest, each by its share of the mass, and the first-order term of the rest.
  void merge(const Problem& problem, const AttentionInputs& inputs, std::span<const OrderedTiles> sequences,
             std::span<const TileMoments> moments, const Plan& plan, const Branch& exact, const Branch& rest,
             const AttentionOutputs& outputs, const PlanContext& context) const {
    struct Job {
      std::int64_t sequence, head, tile;
    };
    std::vector<Job> jobs;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      for (std::int64_t head = 0; head < problem.q_heads; ++head) {
        for (std::int64_t tile = 0; tile < sequences[s].query_tiles(); ++tile) jobs.push_back({s, head, tile});
      }
    }
    parallel_for(static_cast<std::int64_t>(jobs.size()), context.run.threads, [&](std::int64_t i, int) {
      const auto& [s, head, tile] = jobs[i];
      const OrderedTiles& tokens = sequences[s];
      const std::int64_t rows = tokens.rows(tile);
      const std::int64_t value_dim = problem.value_dim;
      std::vector<float> queries(static_cast<std::size_t>(rows * problem.head_dim));
      tokens.load_queries(problem, inputs, head, tile * params_.block, rows, queries.data());
      const TileMoments& of_head = moments[s * problem.kv_heads + head / problem.group()];
      std::vector<float> first_order(static_cast<std::size_t>(rows * value_dim), 0.0F);
      std::vector<std::int64_t> out_rows;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t query = tokens.query_order()[tile * params_.block + r];
        out_rows.push_back((problem.tensor_batch_of(s) * problem.q_heads + head) * problem.q_len +
                           problem.q_begin_of(s) + query);
      }
      if (params_.correction == Correction::shared) {
        score::multiply_transposed(queries.data(), rows, problem.head_dim, of_head.mean_h.data(), value_dim,
                                   problem.head_dim, problem.head_dim, problem.softmax_scale(), first_order.data(),
                                   value_dim);
      } else {
        std::vector<float> lse;
        lse.reserve(out_rows.size());
        for (const std::int64_t row : out_rows) lse.push_back(rest.lse[row]);
        add_block_terms(problem, inputs, tokens, head, plan.row(plan.row_begin[s * problem.q_heads + head] + tile),
                        queries, lse, of_head, first_order);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = out_rows[r];
        const float exact_lse = exact.lse[row];
        const float rest_lse = rest.lse[row];
        const float most = std::max(exact_lse, rest_lse);
        const float exact_mass = std::exp(exact_lse - most);
        const float rest_mass = std::exp(rest_lse - most);
        const float total = exact_mass + rest_mass;
        std::byte* o = outputs.o.row(problem.tensor_batch_of(s), head,
                                     problem.q_begin_of(s) + tokens.query_order()[tile * params_.block + r]);
        for (std::int64_t d = 0; d < value_dim; ++d) {
          const float value = exact_mass * exact.o[row * value_dim + d] +
                              rest_mass * (rest.o[row * value_dim + d] + first_order[r * value_dim + d]);
          store_from_float(o, outputs.o.dtype, d, value / total);
        }
        if (!outputs.lse.empty()) outputs.lse[row] = most + std::log(total);
      }
    });
  }

  /// out[r] += sum over the pooled tiles j of exp(scale q.kb_j - lse) * sum over their keys of scale q.(k - kb_j) v.
  void add_block_terms(const Problem& problem, const AttentionInputs& inputs, const OrderedTiles& tokens,
                       std::int64_t head, std::span<const PlanEntry> entries, std::span<const float> queries,
                       std::span<const float> lse, const TileMoments& moments, std::span<float> out) const {
    const std::int64_t dim = problem.head_dim;
    const std::int64_t value_dim = problem.value_dim;
    const auto rows = static_cast<std::int64_t>(lse.size());
    std::vector<float> keys(static_cast<std::size_t>(params_.block * dim));
    std::vector<float> values(static_cast<std::size_t>(params_.block * value_dim));
    std::vector<float> mean(static_cast<std::size_t>(dim));
    std::vector<float> h(static_cast<std::size_t>(value_dim * dim));
    std::vector<float> term(static_cast<std::size_t>(rows * value_dim));
    std::vector<float> scores(static_cast<std::size_t>(rows));
    for (const PlanEntry& entry : entries) {
      if (entry.source != 1) continue;
      for (std::int64_t tile = entry.begin; tile < entry.begin + entry.count; ++tile) {
        const std::int64_t count = tokens.columns(tile);
        load_transposed(problem, inputs, tokens, head / problem.group(), tile * params_.block, count, mean.data(), keys,
                        values);
        score::multiply_transposed(values.data(), value_dim, count, keys.data(), dim, count, count, 1, h.data(), dim);
        score::multiply_transposed(queries.data(), rows, dim, h.data(), value_dim, dim, dim, problem.softmax_scale(),
                                   term.data(), value_dim);
        score::multiply_transposed(queries.data(), rows, dim, moments.mean_keys.data() + tile * dim, 1, dim, dim,
                                   problem.softmax_scale(), scores.data(), 1);
        for (std::int64_t r = 0; r < rows; ++r) {
          const float weight = std::exp(scores[r] - lse[r]);
          for (std::int64_t d = 0; d < value_dim; ++d) out[r * value_dim + d] += weight * term[r * value_dim + d];
        }
      }
    }
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(pisa, tessera::PiecewiseSparse);
