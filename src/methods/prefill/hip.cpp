// HiP: A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention,
// arXiv:2406.09827, and the staged search of InfiniteHiP, arXiv:2502.08910.
//
// form=tree, per head and query tile: the keys before the tile's window, in blocks of `block_k`, begin as mask_k /
// block_k nodes of equal size. Every round halves the nodes, scores each half by the largest product of its
// representative block's keys with every `query_step`-th query, and keeps the best mask_k / block_k; after
// log2(blocks / nodes) rounds the nodes are the blocks to attend to. Beside them the window and the sinks.
//
// form=staged: the keys between sinks and window are cut into chunks; stage by stage the best chunks by binary search
// (score/refine.h) are cut into smaller ones. `stages` lists chunk sizes and, behind a colon, how many keys are let in;
// `keep` keys leave the last one. Queries are represented by means of four neighbours, in the last stage by themselves.
// With the defaults a full tile searches 974 chunks of 32 keys with 16 means and 1,024 chunks of 8 with 64 queries,
// about 9 and 4.5 keys each: 17% of what dense attention multiplies at 32k, at its speed. From there on a tile costs
// the same at any length: selection takes 21% of dense at 32k, 17% at 64k and 10% at 128k (the tree 8% at 32k, 4% at
// 128k).
//
// Decoding: the lists of the tree, or of every stage, are kept and made anew once `refresh` tokens have come; a new
// list renews those after it. Keys that have left the window since the first list was made are attended to meanwhile.
//
// Both forms miss a single hot key away from all representatives, by design. Nodes are integers: halves of a node never
// overlap, so that no block is kept twice (v1.0 kept places as floats). A half that keeps its parent's representative
// keeps its score; a stage that lets all its chunks pass scores none. Defaults are those of the authors' code: first
// queries dense (tree form), layers 0-2 dense (tree) or 0-3+31 (staged).
#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/layer_list.h"
#include "methods/registry.h"
#include "score/gathered_scores.h"
#include "score/plan_rows.h"
#include "score/refine.h"
#include "score/row_access.h"

namespace tessera {
namespace {

enum class Form : std::uint8_t { tree, staged };

constexpr std::int64_t kQueriesPerMean = 4;
constexpr std::string_view kTreeDenseLayers = "0-2";
constexpr std::string_view kStagedDenseLayers = "0-3+31";

/// Lists of one (sequence, head), and the number of keys when each was made.
struct StageLists {
  std::vector<score::Chunks> after;  ///< what each stage let pass
  std::vector<std::int64_t> made_at;
  std::int64_t end = 0;  ///< of the keys that the first list was made from
};

/// By layer, then by sequence and head.
class HipState final : public MethodState {
 public:
  std::vector<StageLists>& of_layer(std::int64_t layer, std::size_t count) {
    std::vector<StageLists>& lists = layers_[layer];
    if (lists.size() != count) lists.assign(count, {});
    return lists;
  }
  std::size_t memory_bytes() const override {
    std::size_t bytes = 0;
    for (const auto& [layer, lists] : layers_) {
      for (const StageLists& list : lists) {
        bytes += sizeof list;
        for (const score::Chunks& chunks : list.after) bytes += chunks.begins.capacity() * sizeof(std::int32_t);
      }
    }
    return bytes;
  }

 private:
  std::map<std::int64_t, std::vector<StageLists>> layers_;
};

class Hip {
 public:
  struct Params {
    Form form = Form::tree;
    std::int64_t mask_k = 512;
    std::int64_t block_k = 2;
    std::int64_t query_step = 2;
    score::Representative representative = score::Representative::first;
    std::string stages = "256+32:32768+8:8192";
    std::int64_t keep = 2048;
    std::int64_t block_q = 0;
    std::int64_t sinks = -1;
    std::int64_t window = 0;
    std::int64_t dense_queries = -1;
    std::string dense_layers = "auto";
    std::string refresh = "32+16+8";
    std::int64_t decode_rows = 1;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("form", form, {"tree", "staged"}, "how keys are searched");
      v("mask_k", mask_k, 1, kMostTokens, "tree: keys kept per query tile, rounded up to whole blocks");
      v("block_k", block_k, 1, 1024, "tree: keys of a block");
      v("query_step", query_step, 1, 1024, "tree: every so manieth query of a tile is looked at");
      v("representative", representative, {"first", "centre", "random"}, "tree: block that stands for a node");
      v("stages", stages, "staged: chunk sizes joined by +, each with :keys that it lets in; without, all");
      v("keep", keep, 1, kMostTokens, "staged: keys that leave the last stage");
      v("block_q", block_q, 0, 1024, "queries of a tile; 0: 32 in the tree form, 64 in the staged form");
      v("sinks", sinks, -1, kMostTokens, "first keys that are always kept; -1: 16 (tree), 256 (staged)");
      v("window", window, 0, kMostTokens, "nearest keys that are always kept; 0: 128 (tree), 1024 (staged)");
      v("dense_queries", dense_queries, -1, kMostTokens,
        "first positions that run dense in prefill; -1: 3 mask_k (log2(keys / mask_k / 2) + 1) (tree), 0 (staged)");
      v("dense_layers", dense_layers, "layers that run dense, numbers and ranges joined by +, none, or auto");
      v("refresh", refresh, "decoded tokens after which the list of each stage is made anew; the tree takes the last");
      v("decode_rows", decode_rows, 1, 1024, "calls with more queries than this are a prompt");
      v("seed", seed, 0, kMostTokens, "of random representatives");
    }
  };
  static MethodInfo info() {
    return {.name = "hip",
            .family = "prefill",
            .summary = "keys found per query tile by halving the best nodes of a tree, or by staged search in chunks",
            .paper =
                "HiP: A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically "
                "Pruned Attention, arXiv:2406.09827; InfiniteHiP, arXiv:2502.08910",
            .phases = {.prefill = true, .decode = true},
            .domain = {.bidirectional = false, .reason = "it searches the keys before a window that ends at the query"},
            .budget = {{"mask_k", 64, 1 << 20, true}}};
  }

  explicit Hip(Params params) : params_(std::move(params)) {
    params_.mask_k = (params_.mask_k + params_.block_k - 1) / params_.block_k * params_.block_k;
    read_stages();
    const std::string_view layers = params_.dense_layers != "auto" ? std::string_view(params_.dense_layers)
                                    : tree()                       ? kTreeDenseLayers
                                                                   : kStagedDenseLayers;
    if (layers != "none") dense_layers_ = read_layer_list("hip: dense_layers", layers);
    read_refresh();
  }

  /// Calls of few queries are decode steps; random representatives depend on the place of a tile in its call.
  std::int64_t prefill_tile() const {
    const bool by_length = tree() && params_.dense_queries < 0;
    const bool by_place = tree() && params_.representative == score::Representative::random;
    return by_length || by_place ? 0 : tile_rows() * (params_.decode_rows / tile_rows() + 1);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    if (std::binary_search(dense_layers_.begin(), dense_layers_.end(), context.layer)) return dense_plan(problem);
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < problem.batch; ++s) longest = std::max(longest, problem.q_len_of(s));
    const bool decoding = longest <= params_.decode_rows;
    const std::int64_t height = decoding ? 1 : tile_rows();
    score::PlanRows rows(problem, height, plan_tile, problem.q_heads);
    auto* state = decoding ? dynamic_cast<HipState*>(context.state) : nullptr;
    std::vector<StageLists>* lists = nullptr;
    if (state != nullptr) {
      lists = &state->of_layer(context.layer, static_cast<std::size_t>(problem.batch * problem.q_heads));
    }
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      for (std::int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
        plan_group(problem, inputs, context, s, kv_head, decoding, lists, rows);
      }
    }
    return std::move(rows).finish(context.run.threads);
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<HipState>(); }

 private:
  static constexpr std::int64_t plan_tile = 128;  ///< key tile of the plan, whose entries are runs and lists

  struct Stage {
    std::int64_t chunk = 0;
    std::int64_t admitted = 0;  ///< keys; 0: all
  };

  bool tree() const { return params_.form == Form::tree; }
  std::int64_t tile_rows() const { return params_.block_q > 0 ? params_.block_q : (tree() ? 32 : 64); }
  std::int64_t sinks() const { return params_.sinks >= 0 ? params_.sinks : (tree() ? 16 : 256); }
  std::int64_t window() const { return params_.window > 0 ? params_.window : (tree() ? 128 : 1024); }
  std::size_t lists() const { return tree() ? 1 : stages_.size(); }

  void read_stages() {
    std::string_view text = params_.stages;
    while (!text.empty()) {
      const std::size_t end = std::min(text.find('+'), text.size());
      const std::string_view part = text.substr(0, end);
      const std::size_t colon = std::min(part.find(':'), part.size());
      Stage stage;
      const bool valid = read_number(part.substr(0, colon), stage.chunk) &&
                         (colon == part.size() || read_number(part.substr(colon + 1), stage.admitted));
      require(valid, "hip: stages={}: '{}' is no stage; expected something like 256+32:32768+8:8192", params_.stages,
              part);
      require(stages_.empty() || stages_.back().chunk % stage.chunk == 0,
              "hip: stages={}: chunks of {} do not divide those of {}", params_.stages, stage.chunk,
              stages_.empty() ? 0 : stages_.back().chunk);
      stages_.push_back(stage);
      text.remove_prefix(std::min(end + 1, text.size()));
    }
    require(!stages_.empty(), "hip: stages is empty; expected something like 256+32:32768+8:8192");
  }

  void read_refresh() {
    std::string_view text = params_.refresh;
    while (!text.empty()) {
      const std::size_t end = std::min(text.find('+'), text.size());
      std::int64_t tokens = 0;
      require(read_number(text.substr(0, end), tokens), "hip: refresh={} holds '{}'; expected numbers like 32+16+8",
              params_.refresh, text.substr(0, end));
      refresh_.push_back(tokens);
      text.remove_prefix(std::min(end + 1, text.size()));
    }
    require(!refresh_.empty() && (tree() || refresh_.size() == stages_.size()),
            "hip: refresh={} has {} intervals; expected {}, one per stage", params_.refresh, refresh_.size(),
            stages_.size());
    if (tree()) refresh_ = {refresh_.back()};
  }

  static bool read_number(std::string_view text, std::int64_t& number) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    return error == std::errc{} && end == text.data() + text.size() && number >= 1 && number <= kMostTokens;
  }

  /// Positions below this run dense.
  std::int64_t dense_positions(std::int64_t keys, bool decoding) const {
    if (decoding) return 0;
    if (params_.dense_queries >= 0) return params_.dense_queries;
    if (!tree()) return 0;
    const auto k = static_cast<double>(params_.mask_k);
    const double rounds = std::log2(std::max(1.0, static_cast<double>(keys) / k / 2));
    return std::llround(std::ceil(3 * (k * rounds + k)));
  }

  /// All query heads of a kv head.
  void plan_group(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context, std::int64_t s,
                  std::int64_t kv_head, bool decoding, std::vector<StageLists>* lists, score::PlanRows& rows) const {
    const score::QueryTiles tiles = rows.geometry(s * problem.q_heads + kv_head * problem.group());
    const std::int64_t dense = dense_positions(tiles.keys, decoding);
    const auto searched = [&](std::int64_t tile) {
      return middle_end(tiles, tile) > least_searched() && tiles.first_position(tile) >= dense;
    };
    std::int64_t last = 0;
    for (std::int64_t t = 0; t < tiles.count(); ++t) {
      if (searched(t)) last = std::max(last, middle_end(tiles, t));
    }
    std::unique_ptr<const score::GatheredKeys> keys;
    if (last > 0) {
      keys = std::make_unique<const score::GatheredKeys>(problem, inputs, s, kv_head, last, context.run);
    }
    parallel_for(tiles.count() * problem.group(), context.run.threads, [&](std::int64_t i, int) {
      const std::int64_t tile = tiles.count() - 1 - i / problem.group();
      const std::int64_t head = kv_head * problem.group() + i % problem.group();
      const std::int64_t block = s * problem.q_heads + head;
      score::PlanRow& row = rows.row(block, tile);
      if (!searched(tile)) {
        row.everything(tiles, tile);
        return;
      }
      StageLists once;
      // One list per head, that of its only row: with several decoded rows each makes its own.
      StageLists& own = lists != nullptr && tiles.count() == 1 ? (*lists)[static_cast<std::size_t>(block)] : once;
      const score::Chunks& kept = choose(problem, inputs, *keys, tiles, tile, s, head, own);
      write_row(tiles, tile, kept, own.end, row);
    });
  }

  /// Keys [0, n) before the window of the tile's first row: every row may see them.
  std::int64_t middle_end(const score::QueryTiles& tiles, std::int64_t tile) const {
    return std::clamp<std::int64_t>(tiles.first_position(tile) - window() + 1, 0, tiles.keys);
  }
  /// So many keys before the window are all kept.
  std::int64_t least_searched() const { return tree() ? params_.mask_k : sinks() + params_.keep; }

  /// The chunks (or blocks) that a tile keeps, beside sinks and window.
  const score::Chunks& choose(const Problem& problem, const AttentionInputs& inputs, const score::GatheredKeys& keys,
                              const score::QueryTiles& tiles, std::int64_t tile, std::int64_t s, std::int64_t head,
                              StageLists& own) const {
    const std::int64_t end = middle_end(tiles, tile);
    if (own.after.size() != lists() || tiles.keys < own.made_at.front()) {
      own.after.assign(lists(), {});
      own.made_at.assign(lists(), -kMostTokens);
    }
    std::vector<float> queries(static_cast<std::size_t>(tiles.rows(tile) * problem.head_dim));
    score::load_queries(problem, inputs, s, head, tile * tiles.tile_q, tiles.rows(tile), queries.data());
    if (problem.softmax_scale() < 0) {
      for (float& x : queries) x = -x;  // the largest logits are the smallest products
    }
    bool renew = false;
    for (std::size_t stage = 0; stage < lists(); ++stage) {
      renew = renew || tiles.keys - own.made_at[stage] >= refresh_[stage];
      if (!renew) continue;
      if (stage == 0) own.end = end;
      const score::QueryPanels panels = panels_of(queries, tiles.rows(tile), problem.head_dim, stage, keys.pairs());
      const auto score = [&](std::span<const std::int32_t> listed, float* out) { keys.largest(panels, listed, out); };
      own.after[stage] = tree() ? search_blocks(end, head, tile, score) : search_stage(stage, end, own, score);
      own.made_at[stage] = tiles.keys;
    }
    return own.after.back();
  }

  score::QueryPanels panels_of(std::span<const float> queries, std::int64_t rows, std::int64_t dim, std::size_t stage,
                               bool pairs) const {
    std::vector<float> chosen;
    const bool means = !tree() && stage + 1 < lists();
    const std::int64_t step = tree() ? params_.query_step : (means ? kQueriesPerMean : 1);
    for (std::int64_t r = 0; r < rows; r += step) {
      const std::int64_t count = means ? std::min(step, rows - r) : 1;
      for (std::int64_t d = 0; d < dim; ++d) {
        float sum = 0;
        for (std::int64_t i = r; i < r + count; ++i) sum += queries[static_cast<std::size_t>(i * dim + d)];
        chosen.push_back(sum / static_cast<float>(count));
      }
    }
    score::QueryPanels panels;
    panels.pack(chosen.data(), static_cast<std::int64_t>(chosen.size()) / dim, dim, pairs);
    return panels;
  }

  score::Chunks search_blocks(std::int64_t end, std::int64_t head, std::int64_t tile,
                              const score::ScoreKeys& score) const {
    score::TreeSearch search{.keys = end,
                             .block = params_.block_k,
                             .keep = params_.mask_k / params_.block_k,
                             .representative = params_.representative};
    search.seed = static_cast<std::uint64_t>((params_.seed * 65599 + head) * 65599 + tile);
    score::Chunks kept{params_.block_k, end, search_tree(search, score)};
    for (std::int32_t& begin : kept.begins) begin *= static_cast<std::int32_t>(params_.block_k);
    return kept;
  }

  score::Chunks search_stage(std::size_t stage, std::int64_t end, const StageLists& own,
                             const score::ScoreKeys& score) const {
    const std::int64_t chunk = stages_[stage].chunk;
    score::Chunks candidates = stage == 0 ? score::Chunks::cut(sinks(), end, chunk) : own.after[stage - 1].split(chunk);
    // What leaves a stage is what the next one lets in, in chunks of this one.
    const std::int64_t leaving = stage + 1 < stages_.size() ? stages_[stage + 1].admitted : params_.keep;
    if (leaving == 0) return candidates;
    return search_chunks(candidates, std::max<std::int64_t>(1, leaving / chunk), score);
  }

  /// Sinks, chunks, and everything from `end` on.
  void write_row(const score::QueryTiles& tiles, std::int64_t tile, const score::Chunks& kept, std::int64_t end,
                 score::PlanRow& row) const {
    const std::int64_t first = std::min(sinks(), end);
    std::vector<std::int32_t> keys;
    for (const std::int32_t begin : kept.begins) {
      const std::int64_t from = std::max<std::int64_t>(begin, first);
      for (std::int64_t j = from; j < std::min<std::int64_t>(begin + kept.chunk, kept.end); ++j) {
        keys.push_back(static_cast<std::int32_t>(j));
      }
    }
    row.run(0, first);
    row.selected_keys(tiles, tile, keys);
    row.visible_run(tiles, tile, end, tiles.keys);
  }

  Params params_;
  std::vector<Stage> stages_;
  std::vector<std::int64_t> refresh_;
  std::vector<std::int64_t> dense_layers_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(hip, tessera::Hip);
