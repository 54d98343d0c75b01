// SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, arXiv:2410.13276.
//
// A learned gate scores pairs of tiles: queries and keys before RoPE are pooled over tiles (by default queries by their
// average, keys by maximum, minimum and average), projected per head, rotated as the first token of their tile, and
// multiplied: G = q.k / sqrt(width). Kept are the tiles whose softmax over the visible ones exceeds a threshold, or the
// best of a row by count. gate_training.h trains the gate.
//
// rule=ratio keeps max(1, int((1 - sqrt(1 - nonzero)) * key tiles)) tiles per row: the root turns a share of the causal
// triangle into a count per row; without causality it is the share itself. The last `last_dense` query tiles are dense.
//
// Differs from the authors' code: the diagonal is always kept, so that no row ends empty where the softmax is flat; the
// matrix over concatenated poolings comes as one weight per pooling. A gate that is NaN keeps the tile.
#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/registry.h"
#include "score/always_keep.h"
#include "score/plan_rows.h"
#include "score/row_softmax.h"
#include "score/threshold.h"
#include "score/tile_gate.h"
#include "score/top_k.h"
#include "tessera/gate_training.h"

namespace tessera {
namespace {

enum class Rule : std::uint8_t { threshold, ratio };

constexpr std::array<std::string_view, kTilePoolings> kKeyWeights{"gate_wk_max", "gate_wk_min", "gate_wk_avg"};
constexpr std::array<std::string_view, kTilePoolings> kQueryWeights{"gate_wq_max", "gate_wq_min", "gate_wq_avg"};

class Seer {
 public:
  struct Params {
    Rule rule = Rule::threshold;
    double threshold = 5e-4;
    double nonzero = 0.1;
    std::int64_t block = 64;
    TilePooling query_pooling = TilePooling::average;
    double rope_base = 10000;
    std::int64_t last_dense = 2;
    void visit(ParameterList& v) {
      v("rule", rule, {"threshold", "ratio"}, "keep tiles by their gate probability, or by count");
      v("threshold", threshold, 0, 1, "gate probability above which a tile is kept; 5e-4 (safer) to 5e-3; 0: all");
      v("nonzero", nonzero, 0, 1, "share of the allowed tiles that rule=ratio keeps");
      v("block", block, 16, 1024, "tokens per tile of the gate");
      v("query_pooling", query_pooling, {"max", "min", "avg"}, "pooling of queries that are not projected");
      v("rope_base", rope_base, 1.0001, 1e12, "base of the rotation, that of the model");
      v("last_dense", last_dense, 0, kMostTokens, "last query tiles that run dense");
    }
  };
  static MethodInfo info() {
    using enum SideAxis;
    const auto weight = [](std::string_view name, SideAxis heads, bool required, std::string description) {
      return SideInputInfo{.name = std::string(name),
                           .axes = {heads, head_dim, head_dim},
                           .minimum = -0.3,
                           .maximum = 0.3,
                           .required = required,
                           .description = std::move(description)};
    };
    const std::string of_keys =
        "projection of pooled keys, any of max, min and avg; [kv heads, D, width] beside query weights";
    const std::string of_queries = "projection of pooled queries [query heads, D, width]; without: no projection";
    return {.name = "seer",
            .family = "prefill",
            .summary = "tiles by a learned gate on pooled queries and keys (side inputs)",
            .paper = "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, arXiv:2410.13276",
            .phases = {.prefill = true, .decode = false, .backward = true},
            .budget = {{"threshold", 0.5, 1e-06, true}},
            .side = {{.name = "gate_q",
                      .axes = {batch, q_heads, queries, head_dim},
                      .minimum = -1,
                      .maximum = 1,
                      .description = "queries before RoPE"},
                     {.name = "gate_k",
                      .axes = {batch, kv_heads, tokens, head_dim},
                      .minimum = -1,
                      .maximum = 1,
                      .description = "keys before RoPE"},
                     weight(kKeyWeights[0], q_heads, true, of_keys),
                     weight(kKeyWeights[1], q_heads, true, of_keys),
                     weight(kKeyWeights[2], q_heads, true, of_keys),
                     weight(kQueryWeights[0], q_heads, false, of_queries),
                     weight(kQueryWeights[1], q_heads, false, of_queries),
                     weight(kQueryWeights[2], q_heads, false, of_queries)}};
  }

  explicit Seer(Params params) : params_(params) {}

  std::int64_t prefill_tile() const {
    return params_.last_dense == 0 && params_.rule == Rule::threshold ? params_.block : 0;
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    const TileGate gate = gate_of(problem, inputs);
    const int threads = context.run.threads;
    std::vector<score::PooledRows> keys(static_cast<std::size_t>(problem.batch * problem.kv_heads));
    parallel_for(static_cast<std::int64_t>(keys.size()), threads, [&](std::int64_t i, int) {
      keys[i] = score::pooled_keys(problem, gate, i / problem.kv_heads, i % problem.kv_heads);
    });
    score::PlanRows rows(problem, params_.block, params_.block, problem.q_heads);
    parallel_for(rows.blocks(), threads, [&](std::int64_t block, int) {
      const std::int64_t s = rows.sequence_of(block);
      const std::int64_t head = rows.head_of(block);
      const score::QueryTiles tiles = rows.geometry(block);
      score::GateHead own = score::gate_head(problem, gate, s, head, score::pooled_queries(problem, gate, s, head),
                                             keys[s * problem.kv_heads + head / problem.group()]);
      std::vector<std::uint8_t> keep;
      for (std::int64_t t = 0; t < tiles.count(); ++t) {
        const std::span<float> row(own.scores.data() + t * tiles.key_tiles(),
                                   static_cast<std::size_t>(tiles.visible_tiles(t)));
        choose(tiles, t, row, keep);
        rows.row(block, t).flagged_tiles(tiles, t, keep);
      }
    });
    return std::move(rows).finish(threads);
  }

 private:
  TileGate gate_of(const Problem& problem, const AttentionInputs& inputs) const {
    TileGate gate;
    const auto find = [&](std::string_view name) {
      const TensorView* tensor = inputs.find_side(name);
      return tensor == nullptr ? TensorView{} : *tensor;
    };
    gate.q = find("gate_q");
    gate.k = find("gate_k");
    for (std::size_t p = 0; p < kTilePoolings; ++p) {
      gate.wk[p] = find(kKeyWeights[p]);
      gate.wq[p] = find(kQueryWeights[p]);
    }
    gate.query_pooling = params_.query_pooling;
    gate.tile = params_.block;
    gate.rope_base = params_.rope_base;
    require(gate.q.data != nullptr && gate.k.data != nullptr,
            "seer: side inputs 'gate_q' and 'gate_k', queries and keys before RoPE, are missing");
    score::check_gate(problem, gate);
    return gate;
  }

  /// keep[j] = 1 for the visible key tiles, whose gates are `row`.
  void choose(const score::QueryTiles& tiles, std::int64_t tile, std::span<float> row,
              std::vector<std::uint8_t>& keep) const {
    const bool everything =
        params_.rule == Rule::threshold ? params_.threshold == 0 : params_.nonzero == 1;  // even where gates underflow
    keep.assign(row.size(), everything || tile >= tiles.count() - params_.last_dense ? 1 : 0);
    if (row.empty()) return;
    std::vector<std::int32_t> chosen;
    if (params_.rule == Rule::threshold) {
      score::softmax_row(row);
      chosen = score::above_threshold(row, static_cast<float>(params_.threshold));
    } else {
      const double share = tiles.causal ? 1 - std::sqrt(1 - params_.nonzero) : params_.nonzero;
      const auto count = static_cast<std::int64_t>(share * static_cast<double>(tiles.key_tiles()));
      chosen = score::top_k(row, std::max<std::int64_t>(1, count));
    }
    for (const std::int32_t j : chosen) keep[j] = 1;
    const score::QueryTiles::Range diagonal = tiles.diagonal(tile);
    std::fill(keep.begin() + diagonal.first, keep.begin() + diagonal.end, std::uint8_t{1});
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(seer, tessera::Seer);
