// DHSA, Dynamic Hierarchical Sparse Attention, arXiv:2510.24606: as first published, and the modes of its second
// version.
//
// mode=chunks: keys are cut into chunks where their content changes. Chunks and query tiles are sums divided by the
// root of their length, of the mean head (share=all). A key scores what its chunk does with the query tile; a tile
// reads `budget` keys: the nearest `recent` ones and the best others, of which the `sinks` foremost give way to the
// first keys of the sequence. The last `instruction` queries are dense, and a boundary lies before them. Boundaries are
// made by the layer that plans first and shared by the layers after it; with `list_layer` they also share its lists.
//
// Boundaries come from a trained predictor where its weights are given as side inputs (score/chunk_boundaries.h), else
// from chunks of equal length or from the cosine between neighbouring means. The predictor wants keys before RoPE, side
// input `keys`; without it the keys of the call are taken. Of the authors' predictors it is the one with attention,
// which has no residual around it.
//
// Modes of tiles, density * key tiles per query tile and head: topk, the best by mean query times mean key; a, the same
// with the first and the latest tile forced; vs, tiles that vertical and slash lines cross, from dense probabilities of
// the last query tile; vsb, the same from means of tiles alone, with the whole diagonal forced. vs and vsb run the
// first rows, as many as the budget has keys, and the last query tile dense.
//
// Differs from the authors' code: tokens of a chunk that does not fit whole come by recency; a tile's own keys always
// count as recent; of equal chunks the later one wins; topk looks at visible tiles only and adds the first row's own
// tile where that row would see nothing; ragged tiles are means of what they hold; undefined scores keep everything.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/registry.h"
#include "plan/geometry.h"
#include "score/chunk_boundaries.h"
#include "score/plan_rows.h"
#include "score/pooled_tiles.h"
#include "score/product.h"
#include "score/proxy_heads.h"
#include "score/row_access.h"
#include "score/row_probe.h"
#include "score/top_k.h"

namespace tessera {
namespace {

enum class Mode : std::uint8_t { chunks, topk, a, vs, vsb };
enum class Share : std::uint8_t { automatic, all, group, none };
enum class Boundaries : std::uint8_t { fixed, cosine };

/// What layers of one pass share.
class DhsaState final : public MethodState {
 public:
  std::optional<Plan> lists;  ///< of list_layer
  /// Borders of the chunks per sequence and the problem and layer that they are of.
  std::vector<std::vector<std::int32_t>> borders;
  Problem problem;
  std::int64_t layer = -1;

  std::size_t memory_bytes() const override {
    std::size_t bytes = lists ? lists->memory_bytes() : 0;
    for (const auto& border : borders) bytes += border.capacity() * sizeof(std::int32_t);
    return bytes;
  }
};

/// A side input [1, 1, rows, columns] as floats; empty when it is absent.
std::vector<float> read_side(const AttentionInputs& inputs, std::string_view name, std::int64_t rows,
                             std::int64_t columns) {
  const TensorView* view = inputs.find_side(name);
  if (view == nullptr) return {};
  require(is_attention_dtype(view->dtype) && view->batch() == 1 && view->heads() == 1 && view->tokens() == rows &&
              view->dim() == columns && view->strides[3] == 1,
          "dhsa: {} is {} [{}]; expected f32, bf16 or f16 [1, 1, {}, {}]", name, name_of(view->dtype),
          fmt::join(view->shape, ", "), rows, columns);
  std::vector<float> values;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) values.push_back(load_as_float(view->row(0, 0, r), view->dtype, c));
  }
  return values;
}

class Dhsa {
 public:
  struct Params {
    Mode mode = Mode::chunks;
    Share share = Share::automatic;
    std::int64_t block = 128;
    std::int64_t budget = 1024;
    std::int64_t recent = 128;
    std::int64_t sinks = 128;
    std::int64_t instruction = 64;
    std::int64_t layer_window = -1;
    Boundaries boundaries = Boundaries::fixed;
    std::int64_t beta = 8;
    double least_score = 0;
    double most_cosine = 0.5;
    std::int64_t window = 4;
    std::int64_t heads = 8;
    std::int64_t apart = 8;
    std::int64_t list_layer = -1;
    std::int64_t block_k = 32;
    double density = 0.125;
    double vertical = 0.5;
    void visit(ParameterList& v) {
      v("mode", mode, {"chunks", "topk", "a", "vs", "vsb"}, "chunks as first published, or a mode of tiles");
      v("share", share, {"auto", "all", "group", "none"},
        "heads that select together, by their mean; auto: all for chunks, none for tiles");
      v("block", block, 16, 1024, "rows of query tiles");
      v("budget", budget, 1, kMostTokens, "chunks: keys per query tile");
      v("recent", recent, 1, kMostTokens, "chunks: nearest keys that are always among them");
      v("sinks", sinks, 0, kMostTokens, "chunks: first keys that are always among them");
      v("instruction", instruction, 0, kMostTokens, "chunks: last queries that run dense");
      v("layer_window", layer_window, -1, kMostTokens, "chunks: the layer's own sliding window; -1: none");
      v("boundaries", boundaries, {"fixed", "cosine"}, "chunks: where they end when no predictor is given");
      v("beta", beta, 1, 1024, "chunks per query tile, at most with a predictor; divides block");
      v("least_score", least_score, -1e9, 1e9, "score above which the predictor sees a boundary");
      v("most_cosine", most_cosine, -1, 1, "cosine of neighbouring means below which boundaries=cosine sees one");
      v("window", window, 1, 64, "tokens on either side of a gap that are looked at");
      v("heads", heads, 1, 1024, "attention heads of the predictor; divide its channels");
      v("apart", apart, 0, 1024, "boundaries within this distance of a better one are dropped");
      v("list_layer", list_layer, -1, 100000, "chunks: layer whose lists the later ones use too; -1: none");
      v("block_k", block_k, 16, 1024, "tiles: keys of key tiles");
      v("density", density, 0, 1, "tiles: share of the key tiles that a query tile reads");
      v("vertical", vertical, 0, 1, "tiles: share of the lines that are vertical");
    }
  };
  static MethodInfo info() {
    const auto weight = [](std::string name, std::string description) {
      return SideInputInfo{.name = std::move(name),
                           .axes = {SideAxis::width, SideAxis::width},
                           .minimum = -1,
                           .maximum = 1,
                           .required = false,
                           .description = std::move(description)};
    };
    return {
        .name = "dhsa",
        .family = "prefill",
        .summary = "keys by the score of their chunk, chunks of varying length shared by all heads; or tiles and lines",
        .paper =
            "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs, arXiv:2510.24606",
        .phases = {.prefill = true, .decode = false},
        .domain = {.bidirectional = false, .reason = "it keeps the most recent keys"},
        .budget = {{"budget", 256, 1 << 20, true}},
        .side = {{.name = "keys",
                  .axes = {SideAxis::batch, SideAxis::kv_heads, SideAxis::tokens, SideAxis::head_dim},
                  .minimum = -1,
                  .maximum = 1,
                  .required = false,
                  .description = "keys before RoPE, for the predictor"},
                 weight("in_weight", "predictor: [3 C, C] of queries, keys, values, C = kv heads times head dim"),
                 weight("in_bias", "predictor: [1, 3 C]"),
                 weight("out_weight", "predictor: [C, C]"),
                 weight("out_bias", "predictor: [1, C]"),
                 weight("norm_weight", "predictor: [1, C] of the LayerNorm"),
                 weight("norm_bias", "predictor: [1, C]"),
                 weight("pool_gate", "predictor: [1, C]; without it sides are pooled by their mean"),
                 weight("hidden_weight", "predictor: [hidden, 4 C + 1]"),
                 weight("hidden_bias", "predictor: [1, hidden]"),
                 weight("score_weight", "predictor: [1, hidden]"),
                 weight("score_bias", "predictor: [1, 1]")}};
  }

  explicit Dhsa(Params params) : params_(params) {
    if (params_.mode != Mode::chunks) return;
    require(params_.block % params_.beta == 0, "dhsa: beta={} does not divide block={}", params_.beta, params_.block);
    require(params_.budget >= params_.sinks + std::max(params_.recent, params_.block),
            "dhsa: budget={} holds less than sinks={} and the larger of recent={} and block={}; expected at least that",
            params_.budget, params_.sinks, params_.recent, params_.block);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    const int threads = context.run.threads;
    const Share share = params_.share != Share::automatic ? params_.share
                        : params_.mode == Mode::chunks    ? Share::all
                                                          : Share::none;
    const std::int64_t lists = share == Share::all ? 1 : share == Share::group ? problem.kv_heads : problem.q_heads;
    auto* state = dynamic_cast<DhsaState*>(context.state);
    if (params_.mode == Mode::chunks && state != nullptr && state->lists && context.layer > params_.list_layer &&
        params_.list_layer >= 0 && same_problem(state->lists->problem, problem)) {
      return *state->lists;
    }
    std::optional<score::ProxyHeads> proxies;
    if (params_.mode == Mode::chunks || share != Share::none) proxies.emplace(problem, inputs, lists, threads);
    const Problem& seen = proxies ? proxies->problem() : problem;
    const AttentionInputs& read = proxies ? proxies->inputs() : inputs;
    const std::int64_t key_tile = params_.mode == Mode::chunks ? params_.block : params_.block_k;
    score::PlanRows rows(problem, params_.block, key_tile, lists);
    if (params_.mode != Mode::chunks) {
      parallel_for(rows.blocks(), threads, [&](std::int64_t b, int) {
        choose_tiles(seen, read, b / lists, b % lists, rows.geometry(b), b, rows);
      });
      return std::move(rows).finish(threads);
    }
    const std::vector<std::vector<std::int32_t>> borders = borders_of(problem, inputs, state, context);
    const std::int64_t band = params_.layer_window >= 0 ? rows.add_band({params_.layer_window, 0}) : 0;
    for (std::int64_t b = 0; b < rows.blocks(); ++b) {
      choose_tokens(seen, read, b / lists, b % lists, borders[b / lists], b, band, threads, rows);
    }
    Plan plan = std::move(rows).finish(threads);
    if (state != nullptr && context.layer == params_.list_layer) state->lists = plan;
    return plan;
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<DhsaState>(); }

 private:
  // ---- chunks ----

  std::vector<std::vector<std::int32_t>> borders_of(const Problem& problem, const AttentionInputs& inputs,
                                                    DhsaState* state, const PlanContext& context) const {
    const bool known =
        state != nullptr && state->layer >= 0 && context.layer > state->layer && same_problem(state->problem, problem);
    if (known) return state->borders;
    std::vector<std::vector<std::int32_t>> borders(static_cast<std::size_t>(problem.batch));
    for (std::int64_t s = 0; s < problem.batch; ++s) borders[s] = cut(problem, inputs, s, context.run.threads);
    if (state != nullptr) {
      state->borders = borders;
      state->problem = problem;
      state->layer = context.layer;
    }
    return borders;
  }

  /// Borders of the chunks of a sequence, 0 and its length included.
  std::vector<std::int32_t> cut(const Problem& problem, const AttentionInputs& inputs, std::int64_t s,
                                int threads) const {
    const std::int64_t keys = problem.kv_len_of(s);
    std::vector<std::int32_t> borders{0, static_cast<std::int32_t>(keys)};
    if (keys > params_.instruction) borders.push_back(static_cast<std::int32_t>(keys - params_.instruction));
    const bool predictor = inputs.find_side("in_weight") != nullptr;
    if (!predictor && params_.boundaries == Boundaries::fixed) {
      const std::int64_t length = params_.block / params_.beta;
      for (std::int64_t j = length; j < keys; j += length) borders.push_back(static_cast<std::int32_t>(j));
    } else if (keys > 0) {
      const std::int64_t channels = problem.kv_heads * problem.head_dim;
      const std::vector<float> rows = flat_keys(problem, inputs, s, predictor, threads);
      const std::vector<float> scores = predictor
                                            ? score::predict_boundaries(weights_of(problem, inputs), rows, threads)
                                            : score::boundaries_by_cosine(rows, channels, params_.window, threads);
      const double least = predictor ? params_.least_score : -params_.most_cosine;
      const std::int64_t most = keys / params_.block * params_.beta;
      for (const std::int32_t t :
           score::pick_boundaries(scores, static_cast<float>(least), params_.window, params_.apart, most)) {
        borders.push_back(t + 1);
      }
    }
    std::sort(borders.begin(), borders.end());
    borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
    return borders;
  }

  /// Keys of all kv heads side by side: [keys][kv_heads * head_dim].
  static std::vector<float> flat_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t s,
                                      bool predictor, int threads) {
    const std::int64_t keys = problem.kv_len_of(s);
    const std::int64_t dim = problem.head_dim;
    const TensorView* before = predictor ? inputs.find_side("keys") : nullptr;
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    require(before == nullptr ||
                (is_attention_dtype(before->dtype) && before->batch() == batch && before->heads() == problem.kv_heads &&
                 before->tokens() == problem.kv_len && before->dim() == dim && before->strides[3] == 1),
            "dhsa: keys does not fit; expected f32, bf16 or f16 [{}, {}, {}, {}]", batch, problem.kv_heads,
            problem.kv_len, dim);
    std::vector<float> rows(static_cast<std::size_t>(keys * problem.kv_heads * dim));
    parallel_for(
        keys, threads,
        [&](std::int64_t j, int) {
          for (std::int64_t h = 0; h < problem.kv_heads; ++h) {
            float* to = rows.data() + (j * problem.kv_heads + h) * dim;
            if (before == nullptr) {
              score::load_keys(problem, inputs, s, h, j, 1, to);
            } else {
              const std::byte* row = before->row(problem.tensor_batch_of(s), h, problem.kv_begin_of(s) + j);
              for (std::int64_t d = 0; d < dim; ++d) to[d] = load_as_float(row, before->dtype, d);
            }
          }
        },
        256);
    return rows;
  }

  score::BoundaryWeights weights_of(const Problem& problem, const AttentionInputs& inputs) const {
    const std::int64_t c = problem.kv_heads * problem.head_dim;
    require(c % params_.heads == 0, "dhsa: heads={} does not divide the predictor's {} channels", params_.heads, c);
    const TensorView* hidden_bias = inputs.find_side("hidden_bias");
    require(hidden_bias != nullptr, "dhsa: side input 'hidden_bias' is missing; the predictor needs all its weights");
    const std::int64_t hidden = hidden_bias->dim();
    score::BoundaryWeights weights;
    weights.channels = c;
    weights.heads = params_.heads;
    weights.window = params_.window;
    const auto needed = [&](std::string_view name, std::int64_t rows, std::int64_t columns) {
      require(inputs.find_side(name) != nullptr,
              "dhsa: side input '{}' is missing; the predictor needs all its weights", name);
      return read_side(inputs, name, rows, columns);
    };
    weights.in_weight = needed("in_weight", 3 * c, c);
    weights.in_bias = needed("in_bias", 1, 3 * c);
    weights.out_weight = needed("out_weight", c, c);
    weights.out_bias = needed("out_bias", 1, c);
    weights.norm_weight = needed("norm_weight", 1, c);
    weights.norm_bias = needed("norm_bias", 1, c);
    weights.pool_gate = read_side(inputs, "pool_gate", 1, c);
    weights.hidden_weight = needed("hidden_weight", hidden, 4 * c + 1);
    weights.hidden_bias = needed("hidden_bias", 1, hidden);
    weights.score_weight = needed("score_weight", 1, hidden);
    weights.score_bias = needed("score_bias", 1, 1).front();
    return weights;
  }

  /// Lists of all query tiles of a sequence and a group of heads.
  void choose_tokens(const Problem& proxy, const AttentionInputs& inputs, std::int64_t s, std::int64_t head,
                     std::span<const std::int32_t> borders, std::int64_t block, std::int64_t band, int threads,
                     score::PlanRows& rows) const {
    const score::QueryTiles tiles = rows.geometry(block);
    const std::int64_t dim = proxy.head_dim;
    std::vector<float> buffer;
    std::vector<float> chunks;
    if (tiles.keys > 0) {
      const float* keys = score::key_rows(proxy, inputs, s, head, 0, tiles.keys, tiles.keys, buffer);
      chunks = score::pool_chunks({keys, static_cast<std::size_t>(tiles.keys * dim)}, dim, borders, threads);
    }
    const float sign = std::copysign(1.0F, proxy.softmax_scale());
    parallel_for(tiles.count(), threads, [&](std::int64_t i, int) {
      const std::int64_t tile = tiles.count() - 1 - i;
      score::PlanRow& row = rows.row(block, tile);
      const std::int64_t end = tiles.visible_keys(tile);
      const std::int64_t begin = first_allowed(tiles, tile, end);
      const std::int64_t last_rows = tiles.queries - params_.instruction;
      const bool instructed = (tile + 1) * tiles.tile_q > last_rows && params_.instruction > 0;
      if (instructed || end - begin <= params_.budget) {
        write_range(tiles, tile, begin, end, band, row);
        return;
      }
      std::vector<float> query(static_cast<std::size_t>(dim), 0.0F);
      std::vector<float> queries(static_cast<std::size_t>(tiles.rows(tile) * dim));
      score::load_queries(proxy, inputs, s, head, tile * tiles.tile_q, tiles.rows(tile), queries.data());
      const std::vector<std::int32_t> all{0, static_cast<std::int32_t>(tiles.rows(tile))};
      query = score::pool_chunks(queries, dim, all, 1);
      std::vector<float> scores(borders.size() - 1);
      score::pooled_scores(query, chunks, dim, 0, 1, sign, scores);
      write_keys(tiles, tile, listed(tiles, tile, begin, end, borders, scores), band, row);
    });
  }

  std::int64_t first_allowed(const score::QueryTiles& tiles, std::int64_t tile, std::int64_t end) const {
    if (params_.layer_window < 0) return 0;
    return std::clamp<std::int64_t>(tiles.first_position(tile) - params_.layer_window, 0, end);
  }

  /// The keys of a query tile, ascending.
  std::vector<std::int32_t> listed(const score::QueryTiles& tiles, std::int64_t tile, std::int64_t begin,
                                   std::int64_t end, std::span<const std::int32_t> borders,
                                   std::span<const float> scores) const {
    const std::int64_t recent = end - std::min(end - begin, std::max(params_.recent, tiles.rows(tile)));
    std::int64_t open = params_.budget - (end - recent);
    std::vector<std::int32_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      if (std::isnan(scores[a]) || std::isnan(scores[b])) {
        return std::isnan(scores[a]) == std::isnan(scores[b]) ? a > b : std::isnan(scores[a]);
      }
      return scores[a] != scores[b] ? scores[a] > scores[b] : a > b;
    });
    std::vector<std::int32_t> keys;
    for (const std::int32_t chunk : order) {
      if (open == 0) break;
      const std::int64_t first = std::max<std::int64_t>(borders[chunk], begin);
      const std::int64_t last = std::min<std::int64_t>(borders[chunk + 1], recent);
      for (std::int64_t j = last - 1; j >= first && open > 0; --j, --open) keys.push_back(static_cast<std::int32_t>(j));
    }
    std::sort(keys.begin(), keys.end());
    for (std::int64_t j = recent; j < end; ++j) keys.push_back(static_cast<std::int32_t>(j));
    // The first keys of the sequence take the places of the foremost ones; a window may hide some of them.
    const auto replaced = std::min(static_cast<std::size_t>(params_.sinks), keys.size());
    keys.erase(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(replaced));
    std::vector<std::int32_t> with_sinks;
    for (std::int64_t j = begin; j < static_cast<std::int64_t>(replaced); ++j) {
      with_sinks.push_back(static_cast<std::int32_t>(j));
    }
    with_sinks.insert(with_sinks.end(), keys.begin(), keys.end());
    return with_sinks;
  }

  void write_range(const score::QueryTiles& tiles, std::int64_t tile, std::int64_t begin, std::int64_t end,
                   std::int64_t band, score::PlanRow& row) const {
    if (params_.layer_window < 0) return row.visible_run(tiles, tile, begin, end);
    row.run(begin, end, EntryMask::band, band);
  }

  void write_keys(const score::QueryTiles& tiles, std::int64_t tile, std::span<const std::int32_t> keys,
                  std::int64_t band, score::PlanRow& row) const {
    if (params_.layer_window < 0) return row.selected_keys(tiles, tile, keys);
    // Keys that every row sees need no mask.
    const auto from = static_cast<std::int32_t>(tiles.last_position(tile) - params_.layer_window);
    const auto to = static_cast<std::int32_t>(tiles.common_keys(tile));
    const auto first = std::lower_bound(keys.begin(), keys.end(), from) - keys.begin();
    const auto last = std::max(first, std::lower_bound(keys.begin(), keys.end(), to) - keys.begin());
    row.gather(keys.first(static_cast<std::size_t>(first)), EntryMask::band, band);
    row.gather(keys.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first)));
    row.gather(keys.subspan(static_cast<std::size_t>(last)), EntryMask::band, band);
  }

  // ---- tiles ----

  /// Values of all key tiles for one query tile after another, and what a row of tiles is made of.
  struct Lines {
    std::vector<float> vertical;                          ///< [key tiles]
    std::vector<double> slash_sum;                        ///< prefix sums of the chosen distances (vs)
    std::vector<std::pair<std::int64_t, float>> slashes;  ///< distance in tiles, value (vsb)
    bool undefined = false;
  };

  void choose_tiles(const Problem& problem, const AttentionInputs& inputs, std::int64_t s, std::int64_t head,
                    const score::QueryTiles& tiles, std::int64_t block, score::PlanRows& rows) const {
    const std::int64_t columns = tiles.key_tiles();
    if (columns == 0 || tiles.queries == 0) return;
    const std::int64_t wanted =
        std::clamp<std::int64_t>(static_cast<std::int64_t>(params_.density * static_cast<double>(columns)), 1, columns);
    const bool by_lines = params_.mode == Mode::vs || params_.mode == Mode::vsb;
    std::vector<float> query_means;
    std::vector<float> key_means;
    if (params_.mode != Mode::vs) {
      query_means = score::pool_queries(problem, inputs, s, head, params_.block, score::LastTile::real_rows);
      key_means =
          score::pool_keys(problem, inputs, s, head / problem.group(), params_.block_k, score::LastTile::real_rows);
    }
    Lines lines;
    if (params_.mode == Mode::vs) lines = probed_lines(problem, inputs, s, head, tiles, wanted);
    if (params_.mode == Mode::vsb) lines = pooled_lines(problem, tiles, query_means, key_means, wanted);
    const std::int64_t dense_rows = by_lines ? std::min(wanted * params_.block_k, tiles.keys) : 0;
    const float sign = std::copysign(1.0F, problem.softmax_scale());
    std::vector<float> scores(static_cast<std::size_t>(columns));
    std::vector<std::uint8_t> keep;
    for (std::int64_t t = 0; t < tiles.count(); ++t) {
      const std::int64_t visible = tiles.visible_tiles(t);
      const bool dense = visible <= wanted || lines.undefined || tiles.first_position(t) < dense_rows ||
                         (by_lines && t == tiles.count() - 1);
      if (dense && params_.mode != Mode::topk) {
        rows.row(block, t).everything(tiles, t);
        continue;
      }
      if (by_lines) {
        line_scores(tiles, t, lines, scores);
      } else {
        score::pooled_scores(query_means, key_means, problem.head_dim, t, 1, sign, scores);
      }
      keep_best(tiles, t, wanted, scores, keep);
      rows.row(block, t).flagged_tiles(tiles, t, keep);
    }
  }

  /// Flags of the visible tiles: forced ones and the best of the others.
  void keep_best(const score::QueryTiles& tiles, std::int64_t tile, std::int64_t wanted, std::span<float> scores,
                 std::vector<std::uint8_t>& keep) const {
    const auto visible = static_cast<std::size_t>(tiles.visible_tiles(tile));
    keep.assign(visible, 0);
    if (visible == 0) return;
    if (params_.mode != Mode::topk) {
      keep.front() = keep.back() = 1;
      if (params_.mode == Mode::vsb) {
        for (std::int64_t j = first_own_tile(tiles, tile); j < static_cast<std::int64_t>(visible); ++j) keep[j] = 1;
      }
    }
    for (const std::int32_t j : score::top_k(scores.first(visible), wanted, keep)) keep[j] = 1;
    if (params_.mode != Mode::topk) return;
    // The first row must see a key.
    const std::int64_t own = first_own_tile(tiles, tile);
    if (std::find(keep.begin(), keep.begin() + own + 1, std::uint8_t{1}) == keep.begin() + own + 1) keep[own] = 1;
  }

  std::int64_t first_own_tile(const score::QueryTiles& tiles, std::int64_t tile) const {
    const std::int64_t own = std::max<std::int64_t>(0, tiles.first_position(tile)) / params_.block_k;
    return std::clamp<std::int64_t>(own, 0, tiles.visible_tiles(tile) - 1);
  }

  /// Lines from dense probabilities of the last query tile: half of the keys' budget as columns, half as distances.
  Lines probed_lines(const Problem& problem, const AttentionInputs& inputs, std::int64_t s, std::int64_t head,
                     const score::QueryTiles& tiles, std::int64_t wanted) const {
    const std::int64_t probed = std::min(params_.block, tiles.queries);
    score::LineScores probe;
    score::ProbeBuffers buffers;
    score::probe_rows(problem, inputs, s, head, tiles.queries - probed, probed, true, probe, buffers);
    Lines lines;
    const double total = std::accumulate(probe.columns.begin(), probe.columns.end(), 0.0);
    lines.undefined = !std::isfinite(total);
    if (lines.undefined) return lines;
    const std::int64_t budget = std::min(wanted * params_.block_k, tiles.keys);
    const auto vertical = static_cast<std::int64_t>(static_cast<double>(budget) * params_.vertical);
    lines.vertical.assign(static_cast<std::size_t>(tiles.key_tiles()), 0.0F);
    for (const std::int32_t j : score::top_k(probe.columns, vertical)) {
      lines.vertical[j / params_.block_k] += probe.columns[j];
    }
    std::vector<float> chosen(probe.offsets.size(), 0.0F);
    for (const std::int32_t o : score::top_k(probe.offsets, budget - vertical)) chosen[o] = probe.offsets[o];
    lines.slash_sum.assign(chosen.size() + 1, 0.0);
    for (std::size_t o = 0; o < chosen.size(); ++o) lines.slash_sum[o + 1] = lines.slash_sum[o] + chosen[o];
    return lines;
  }

  /// Lines from the mean of the last query tile and the means of the key tiles.
  Lines pooled_lines(const Problem& problem, const score::QueryTiles& tiles, std::span<const float> query_means,
                     std::span<const float> key_means, std::int64_t wanted) const {
    Lines lines;
    std::vector<float> scores(static_cast<std::size_t>(tiles.key_tiles()));
    score::pooled_scores(query_means, key_means, problem.head_dim, tiles.count() - 1, 1, problem.softmax_scale(),
                         scores);
    const std::int64_t last = tiles.visible_tiles(tiles.count() - 1) - 1;
    scores.resize(static_cast<std::size_t>(last + 1));
    for (const float x : scores) lines.undefined = lines.undefined || !std::isfinite(x);
    if (lines.undefined) return lines;
    const auto vertical = static_cast<std::int64_t>(static_cast<double>(wanted) * params_.vertical);
    lines.vertical.assign(static_cast<std::size_t>(tiles.key_tiles()), 0.0F);
    for (const std::int32_t j : score::top_k(scores, vertical)) lines.vertical[j] = scores[j];
    for (const std::int32_t j : score::top_k(scores, wanted - vertical))
      lines.slashes.emplace_back(last - j, scores[j]);
    return lines;
  }

  void line_scores(const score::QueryTiles& tiles, std::int64_t tile, const Lines& lines,
                   std::span<float> scores) const {
    std::copy(lines.vertical.begin(), lines.vertical.end(), scores.begin());
    const std::int64_t visible = tiles.visible_tiles(tile);
    if (params_.mode == Mode::vs) {
      // Distance o meets key tile j where o lies between the tile's rows and the key tile's keys.
      const auto most = static_cast<std::int64_t>(lines.slash_sum.size()) - 1;
      const std::int64_t first = tiles.first_position(tile);
      const std::int64_t last = first + tiles.tile_q - 1;
      for (std::int64_t j = 0; j < visible; ++j) {
        const std::int64_t from = std::clamp<std::int64_t>(first - (j + 1) * tiles.tile_k + 1, 0, most);
        const std::int64_t to = std::clamp<std::int64_t>(last - j * tiles.tile_k + 1, from, most);
        scores[j] += static_cast<float>(lines.slash_sum[to] - lines.slash_sum[from]);
      }
      return;
    }
    const std::int64_t own = first_own_tile(tiles, tile);
    for (const auto& [distance, value] : lines.slashes) {
      for (std::int64_t j = std::max<std::int64_t>(0, own - distance); j < visible - distance; ++j) scores[j] += value;
    }
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(dhsa, tessera::Dhsa);
