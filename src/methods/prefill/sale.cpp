// SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling, arXiv:2505.24179.
//
// The first key tile and a local window are computed exactly; with their partial softmax (m, l) of row r, a pair is
// worth computing when exp(s - m) / l > threshold, that is s > lse + ln(threshold). The scores s of all pairs between
// the two regions are estimated from queries and keys of 4 bits: q' = q - mean of the queries and k' = k - mean of the
// keys, numbers in -7..7 with one scale per token, s * (q'.k' + qmean.k') with the second term exact. A key tile is
// kept for a query tile when any pair of theirs passes. Keys count relative to their mean on both sides of the
// comparison, which a softmax does not notice.
//
// form=two_pass compares everything with the partial softmax of the anchor. form=one_pass adds the keys kept in each
// segment, in exact scores, before it looks at the next one: the bar rises, fewer tiles pass. The local window grows
// towards the beginning until what lies between is a whole number of segments.
//
// What the estimate costs: every pair between the two regions is a product of head_dim numbers of 4 bits. The GPUs of
// the paper multiply those four times as fast as 16-bit floats and report about 11% of dense attention, which is two
// such products per pair. CPUs multiply bytes at best (VNNI, AMX), twice as fast as bf16: half of half of dense, 25%,
// is the floor of the text's algorithm here at any length; 26 to 30% are measured. Bounds that would leave pairs out
// without multiplying them (means with radii, some channels and Cauchy-Schwarz for the others) hold too seldom in 64
// channels and more to pay for themselves.
//
// Differs from the authors' code: scales are per token, as in the paper, not shared by a few rows; the second pass
// multiplies in the precision of its inputs; products run on bytes, since CPUs multiply nothing narrower. A token with
// NaN or Inf counts as important, and means leave channels out that such tokens spoil.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/parallel.h"
#include "kernels/low_bit_scores.h"
#include "methods/head_values.h"
#include "methods/registry.h"
#include "methods/two_phases.h"
#include "score/plan_rows.h"
#include "score/product.h"
#include "score/row_access.h"
#include "score/self_similarity.h"

namespace tessera {
namespace {

constexpr double kDenseThreshold = 1e-5;  ///< below it nothing would be left out
constexpr std::int64_t kRowsAtOnce = 256;

enum class Form : std::uint8_t { two_pass, one_pass };

/// Query tiles and the keys between their exact regions.
struct Middle {
  score::QueryTiles tiles;
  std::int64_t local;
  std::int64_t segment;
  bool dense;

  /// [tile_k, end) is a whole number of segments.
  std::int64_t begin() const { return tiles.tile_k; }
  std::int64_t end(std::int64_t tile) const {
    const std::int64_t room = std::min(tiles.first_position(tile) - local, tiles.keys) - begin();
    return begin() + (dense || room <= 0 ? 0 : room / segment * segment);
  }
};

/// Keys of one kv head as estimates read them.
struct EstimatedKeys {
  std::vector<float> mean;
  kernels::LowBitKeyPanels panels;
  std::vector<std::vector<float>> offsets;      ///< per query head of the group
  std::vector<std::vector<float>> query_means;  ///< per query head of the group
};

class Sale {
 public:
  struct Params {
    double threshold = 0.004;
    Form form = Form::two_pass;
    std::int64_t block_q = 64;
    std::int64_t block_k = 32;
    std::int64_t local = 128;
    std::int64_t segment = 128;
    std::int64_t dense_below = 1025;
    Configuration thresholds;
    void visit(ParameterList& v) {
      v("threshold", threshold, 0, 1, "least share of the exact region's softmax that a pair needs; below 1e-5: dense");
      v("form", form, {"two_pass", "one_pass"}, "compare with the anchor alone, or with all that was kept before");
      v("block_q", block_q, 16, 128, "rows of query tiles");
      v("block_k", block_k, 16, 1024, "keys of key tiles, a multiple of 16; also the sinks that are always computed");
      v("local", local, 0, kMostTokens, "keys before the query tile that are always computed, at least");
      v("segment", segment, 16, kMostTokens, "keys looked at together; a multiple of block_k");
      v("dense_below", dense_below, 0, kMostTokens, "sequences with fewer keys run dense");
      v("thresholds", thresholds, "JSON [[threshold per query head] per layer]; replaces threshold");
    }
  };
  static MethodInfo info() {
    return {.name = "sale",
            .family = "prefill",
            .summary = "every pair's score estimated in 4 bits and held against the softmax of an exact region",
            .paper =
                "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling, "
                "arXiv:2505.24179",
            .phases = {.prefill = true, .decode = false},
            .domain = {.bidirectional = false, .reason = "its local window ends at the diagonal"},
            .budget = {{"threshold", 0.5, 1e-05, true}}};
  }

  explicit Sale(Params params)
      : params_(std::move(params)), thresholds_("sale", "thresholds", params_.thresholds, {{"", 0, 1}}) {
    require(params_.block_k % kernels::kGroupKeys == 0, "sale: block_k={} is not a multiple of {}", params_.block_k,
            kernels::kGroupKeys);
    require(params_.segment % params_.block_k == 0, "sale: segment={} is not a multiple of block_k={}", params_.segment,
            params_.block_k);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    const std::vector<double> cuts = thresholds_.of_layer(0, params_.threshold, problem, context);
    return plan_two_phases(anchor(problem, cuts, context.run.threads), inputs, context,
                           [&](const RowStatistics& exact) { return rest(problem, inputs, context, cuts, exact); });
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const std::vector<double> cuts = thresholds_.of_layer(0, params_.threshold, problem, context);
    return attend_two_phases(anchor(problem, cuts, context.run.threads), inputs, outputs, context, executed,
                             [&](const RowStatistics& exact) { return rest(problem, inputs, context, cuts, exact); });
  }

  void check_model(std::int64_t layers, std::int64_t q_heads, std::int64_t /*kv_heads*/) const {
    thresholds_.check_model(layers, q_heads);
  }

 private:
  Middle middle(const Problem& problem, std::int64_t sequence, double threshold) const {
    const score::QueryTiles tiles(problem, sequence, params_.block_q, params_.block_k);
    return {tiles, params_.local, params_.segment, tiles.keys < params_.dense_below || threshold < kDenseThreshold};
  }

  /// The exact regions; `cuts` are the thresholds of the query heads.
  Plan anchor(const Problem& problem, std::span<const double> cuts, int threads) const {
    score::PlanRows rows(problem, params_.block_q, params_.block_k, problem.q_heads);
    parallel_for(rows.blocks(), threads, [&](std::int64_t block, int) {
      const Middle own = middle(problem, rows.sequence_of(block), cuts[rows.head_of(block)]);
      for (std::int64_t t = 0; t < own.tiles.count(); ++t) {
        score::PlanRow& row = rows.row(block, t);
        if (own.end(t) == own.begin()) {
          row.everything(own.tiles, t);
        } else {
          row.visible_run(own.tiles, t, 0, own.begin());
          row.visible_run(own.tiles, t, own.end(t), own.tiles.keys);
        }
      }
    });
    return std::move(rows).finish(threads);
  }

  std::vector<EstimatedKeys> estimated_keys(const Problem& problem, const AttentionInputs& inputs,
                                            std::span<const double> cuts, int threads) const {
    const std::int64_t dim = problem.head_dim;
    const std::int64_t group = problem.group();
    const std::int64_t heads = problem.batch * problem.kv_heads;
    const auto wanted = [&](std::int64_t i) {  // by any head that reads these keys
      const std::span<const double> own =
          cuts.subspan(static_cast<std::size_t>(i % problem.kv_heads * group), static_cast<std::size_t>(group));
      return !middle(problem, i / problem.kv_heads, *std::max_element(own.begin(), own.end())).dense;
    };
    std::vector<EstimatedKeys> all;
    for (std::int64_t i = 0; i < heads; ++i) {
      all.push_back({{}, {wanted(i) ? problem.kv_len_of(i / problem.kv_heads) : 0, dim}, {}, {}});
      all.back().query_means.resize(static_cast<std::size_t>(group));
    }
    parallel_for(heads * (group + 1), threads, [&](std::int64_t i, int) {
      EstimatedKeys& own = all[i / (group + 1)];
      const std::int64_t s = i / (group + 1) / problem.kv_heads;
      const std::int64_t kv_head = i / (group + 1) % problem.kv_heads;
      if (!wanted(i / (group + 1))) return;
      if (i % (group + 1) == group) {
        own.mean = score::mean_key(problem, inputs, s, kv_head);
      } else {
        const std::int64_t member = i % (group + 1);
        own.query_means[member] = score::mean_query(problem, inputs, s, kv_head * group + member);
      }
    });
    for (std::int64_t i = 0; i < heads; ++i) {
      const std::int64_t s = i / problem.kv_heads;
      if (!wanted(i)) continue;
      EstimatedKeys& own = all[i];
      const std::int64_t keys = problem.kv_len_of(s);
      std::vector<float> queries;
      for (const std::vector<float>& mean : own.query_means) queries.insert(queries.end(), mean.begin(), mean.end());
      std::vector<float> terms(static_cast<std::size_t>(group * keys));  // scale * qmean.k', [group][keys]
      parallel_for((keys + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](std::int64_t chunk, int) {
        const std::int64_t first = chunk * kRowsAtOnce;
        const std::int64_t count = std::min(kRowsAtOnce, keys - first);
        std::vector<float> rows(static_cast<std::size_t>(count * dim));
        score::load_keys(problem, inputs, s, i % problem.kv_heads, first, count, rows.data());
        for (std::int64_t r = 0; r < count; ++r) {
          for (std::int64_t d = 0; d < dim; ++d) rows[r * dim + d] -= own.mean[d];
        }
        own.panels.set(first, count, rows.data());
        score::multiply_transposed(queries.data(), group, dim, rows.data(), count, dim, dim, problem.softmax_scale(),
                                   terms.data() + first, keys);
      });
      for (std::int64_t member = 0; member < group; ++member) {
        own.offsets.push_back(own.panels.offsets({terms.data() + member * keys, static_cast<std::size_t>(keys)}));
      }
    }
    return all;
  }

  /// The second phase: key tiles between the exact regions.
  Plan rest(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context,
            std::span<const double> cuts, const RowStatistics& exact) const {
    const int threads = context.run.threads;
    const std::vector<EstimatedKeys> keys = estimated_keys(problem, inputs, cuts, threads);
    const Isa isa = context.run.isa.value_or(default_isa());
    score::PlanRows rows(problem, params_.block_q, params_.block_k, problem.q_heads);
    rows.for_each_band(1, threads, [&](std::int64_t block, std::int64_t t, std::int64_t, int) {
      const std::int64_t s = rows.sequence_of(block);
      const std::int64_t head = rows.head_of(block);
      const Middle own = middle(problem, s, cuts[head]);
      if (own.end(t) == own.begin()) return;
      const EstimatedKeys& estimated = keys[s * problem.kv_heads + head / problem.group()];
      choose(problem, inputs, own, s, head, t, cuts[head], estimated, exact, isa, rows.row(block, t));
    });
    return std::move(rows).finish(threads);
  }

  void choose(const Problem& problem, const AttentionInputs& inputs, const Middle& own, std::int64_t sequence,
              std::int64_t head, std::int64_t tile, double threshold, const EstimatedKeys& keys,
              const RowStatistics& exact, Isa isa, score::PlanRow& out) const {
    const std::int64_t dim = problem.head_dim;
    const std::int64_t count = own.tiles.rows(tile);
    const std::int64_t member = head % problem.group();
    const float scale = problem.softmax_scale();
    const auto bar = static_cast<float>(std::log(threshold));
    std::vector<float> queries(static_cast<std::size_t>(count * dim));
    score::load_queries(problem, inputs, sequence, head, tile * own.tiles.tile_q, count, queries.data());
    const std::int64_t first_row = (problem.tensor_batch_of(sequence) * problem.q_heads + head) * problem.q_len +
                                   problem.q_begin_of(sequence) + tile * own.tiles.tile_q;
    std::vector<float> shift(static_cast<std::size_t>(count));  // what the mean key adds to every score of a row
    std::vector<float> lse(exact.lse.begin() + first_row, exact.lse.begin() + first_row + count);
    kernels::LowBitQueryRows rows(dim);
    std::vector<float> centred(static_cast<std::size_t>(dim));
    for (std::int64_t r = 0; r < count; ++r) {
      float product = 0;
      for (std::int64_t d = 0; d < dim; ++d) {
        const float x = queries[r * dim + d];
        product += x * keys.mean[d];
        centred[d] = x - keys.query_means[member][d];
      }
      shift[r] = scale * product;
      rows.add(centred, scale, lse[r] - shift[r] + bar);
    }
    const std::int64_t tile_groups = own.tiles.tile_k / kernels::kGroupKeys;
    const std::int64_t step = params_.form == Form::one_pass ? own.segment : own.end(tile) - own.begin();
    std::vector<float> excess(static_cast<std::size_t>(step / kernels::kGroupKeys));
    for (std::int64_t begin = own.begin(); begin < own.end(tile); begin += step) {
      kernels::low_bit_excess(rows, keys.panels, keys.offsets[member], begin / kernels::kGroupKeys, excess, isa);
      const std::size_t before = out.entries.size();
      for (std::int64_t j = 0; j < step / own.tiles.tile_k; ++j) {
        bool keep = false;
        for (std::int64_t g = j * tile_groups; g < (j + 1) * tile_groups; ++g) keep = keep || !(excess[g] <= 0);
        if (!keep) continue;
        const std::int64_t key_tile = begin / own.tiles.tile_k + j;
        if (out.entries.size() > before && out.entries.back().begin + out.entries.back().count == key_tile) {
          ++out.entries.back().count;
        } else {
          out.tiles(key_tile, key_tile + 1);
        }
      }
      if (params_.form == Form::two_pass) continue;
      for (std::size_t e = before; e < out.entries.size(); ++e) {
        add_exact(problem, inputs, own, sequence, head, out.entries[e], queries, lse);
      }
      for (std::int64_t r = 0; r < count && out.entries.size() > before; ++r) {
        rows.set_cut(r, lse[r] - shift[r] + bar);
      }
    }
  }

  /// Joins the exact scores of kept key tiles to the log-sum-exps of the rows.
  static void add_exact(const Problem& problem, const AttentionInputs& inputs, const Middle& own, std::int64_t sequence,
                        std::int64_t head, const PlanEntry& entry, std::span<const float> queries,
                        std::span<float> lse) {
    const std::int64_t dim = problem.head_dim;
    const auto rows = static_cast<std::int64_t>(lse.size());
    const std::int64_t first = entry.begin * own.tiles.tile_k;
    const std::int64_t keys = entry.count * own.tiles.tile_k;
    std::vector<float> buffer;
    std::vector<float> scores(static_cast<std::size_t>(rows * keys));
    const float* key_rows =
        score::key_rows(problem, inputs, sequence, head / problem.group(), first, keys, keys, buffer);
    score::multiply_transposed(queries.data(), rows, dim, key_rows, keys, dim, dim, problem.softmax_scale(),
                               scores.data(), keys);
    for (std::int64_t r = 0; r < rows; ++r) {
      float most = lse[r];
      for (std::int64_t j = 0; j < keys; ++j) most = std::max(most, scores[r * keys + j]);
      float sum = std::exp(lse[r] - most);
      for (std::int64_t j = 0; j < keys; ++j) sum += std::exp(scores[r * keys + j] - most);
      lse[r] = most + std::log(sum);
    }
  }

  Params params_;
  HeadValues thresholds_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(sale, tessera::Sale);
