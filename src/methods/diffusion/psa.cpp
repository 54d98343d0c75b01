// Pyramid Sparse Attention (PSA), arXiv:2512.04025: instead of keeping or dropping a key block, read it at one of the
// levels 1, 2, 4, 8 (so many keys pooled into one) or not at all.
//
// Tokens are reordered so that blocks are compact on the grid. Scores come from sampled tokens: a block's score for a
// query tile is the largest exp(s - row maximum) of the samples. Each row sorts its blocks and cuts the list into one
// interval per level, by position (topk) or by cumulative score (threshold). Pooled keys are means, their values too,
// with log-weight ln(members); one softmax runs over everything selected.
//
// Follows the authors' code, with these differences: blocks are forced to level 1 whose keys are text, that hold the
// keys at a causal query tile's own positions (so that no query is left without keys), or whose score is NaN; query
// tiles with text are dense; sample offsets depend on seed, layer and head alone; the ragged last entry of a level is
// the mean of the keys it has, with the logarithm of their number. In causal problems a pooled entry is seen once its
// last member is, and the blocks a tile can see are its candidates.
//
// The published runs are dense for the first 12 to 15 of 50 denoising steps: the caller's choice, call by call.
//
// Backward: the selection is a constant, and the members of a pooled key share its gradient. A mean that is rounded to
// 16 bits passes its gradient on as if it were not.
#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "methods/grid_order.h"
#include "methods/registry.h"
#include "score/pooled_source.h"
#include "score/product.h"
#include "score/score_order.h"

namespace tessera {
namespace {

using score::OrderedTiles;

/// Keys per entry of each level; level i reads key source i.
constexpr std::array<std::int64_t, 4> kMembers{1, 2, 4, 8};
constexpr std::int8_t kSkipped = -1;
/// Score of a key that the causal mask hides.
constexpr float kUnseen = -std::numeric_limits<float>::infinity();
/// Sampled keys that a query tile is scored against at a time.
constexpr std::int64_t kSamplesAtOnce = 512;

enum class Rule : std::uint8_t { threshold, topk };

/// `count` different offsets below `size`, ascending; the same on every machine.
std::vector<std::int64_t> sample_offsets(std::int64_t size, std::int64_t count, std::mt19937_64& random) {
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(size));
  std::iota(offsets.begin(), offsets.end(), 0);
  for (std::int64_t i = 0; i < count; ++i) {
    std::swap(offsets[i], offsets[i + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(size - i))]);
  }
  offsets.resize(static_cast<std::size_t>(count));
  std::sort(offsets.begin(), offsets.end());
  return offsets;
}

class PyramidSparse {
 public:
  struct Params {
    GridOrder order;
    std::int64_t block_q = 128;
    std::int64_t block_k = 128;
    std::int64_t sample = 4;
    Rule rule = Rule::threshold;
    double end_1 = 0.4;
    double end_2 = 0.5;
    double end_4 = 0.6;
    double end_8 = 0.8;
    double floor_1 = 0.06;
    std::int64_t pack = 32;
    bool similarity = false;
    double similar_2 = 0.7;
    double similar_4 = 0.65;
    double similar_8 = 0.6;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      order.visit(v);
      v("block_q", block_q, 1, 1024, "queries per tile");
      v("block_k", block_k, 8, 1024, "keys per block, a multiple of 8");
      v("sample", sample, 1, 64, "one of so many tokens of a tile or block is sampled for the scores");
      v("rule", rule, {"threshold", "topk"}, "what the ends of the levels count: cumulative score, or blocks");
      v("end_1", end_1, 0, 1, "where level 1 (raw keys) ends in the sorted blocks, as a share");
      v("end_2", end_2, 0, 1, "where level 2 ends");
      v("end_4", end_4, 0, 1, "where level 4 ends");
      v("end_8", end_8, 0, 1, "where level 8 ends; later blocks are skipped");
      v("floor_1", floor_1, 0, 1, "share of the blocks that rule threshold keeps at level 1 at least, plus one block");
      v("pack", pack, 1, 1024, "pooled blocks come in multiples that fill so many keys");
      v("similarity", similarity, "limit the level of blocks whose keys differ");
      v("similar_2", similar_2, -1, 1, "mean cosine of neighbours above which level 2 is allowed");
      v("similar_4", similar_4, -1, 1, "the same for the ends of fours and level 4");
      v("similar_8", similar_8, -1, 1, "the same for the ends of eights and level 8");
      v("seed", seed, 0, kMostTokens, "of the sampled offsets");
    }
  };
  static MethodInfo info() {
    return {.name = "psa",
            .family = "diffusion",
            .summary = "pyramid: each key block is read raw, pooled 2, 4 or 8 to one, or skipped, in one softmax",
            .paper = "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation, arXiv:2512.04025",
            .phases = {.prefill = true, .decode = false, .backward = true}};
  }

  explicit PyramidSparse(Params params) : params_(std::move(params)) {
    params_.order.check("psa");
    require(params_.block_k % 8 == 0, "psa: block_k is {}; expected a multiple of 8", params_.block_k);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    return plan_over(problem, inputs, context, sequences_of(problem));
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    require_supported(inputs);
    const auto start = std::chrono::steady_clock::now();
    const std::vector<OrderedTiles> sequences = sequences_of(problem);
    Plan plan = plan_over(problem, inputs, context, sequences);
    const std::vector<score::PooledSource> levels = pool(problem, inputs, sequences, context);
    const AttentionInputs with_levels = inputs_with(inputs, levels);
    const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
    RunReport report = run(plan, with_levels, outputs, context.run);
    report.plan_ms = planned.count();
    if (executed != nullptr) *executed = std::move(plan);
    return report;
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* executed) const {
    require_supported(inputs);
    const std::vector<OrderedTiles> sequences = sequences_of(problem);
    std::optional<Plan> decided;
    if (executed == nullptr) decided = plan_over(problem, inputs, context, sequences);
    const std::vector<score::PooledSource> levels = pool(problem, inputs, sequences, context);
    const AttentionInputs with_levels = inputs_with(inputs, levels);
    // Sums over the levels are floats, whatever the type of the gradients.
    FloatLike d_k(gradients.d_k);
    FloatLike d_v(gradients.d_v);
    std::vector<FloatLike> pooled;
    pooled.reserve(2 * levels.size());
    Gradients own = gradients;
    own.d_k = d_k.view;
    own.d_v = d_v.view;
    own.sources.clear();
    for (const KeySource& level : with_levels.sources) {
      SourceGradients of_level;
      if (d_k.view.data != nullptr) of_level.d_k = pooled.emplace_back(level.k.shape).view;
      if (d_v.view.data != nullptr) of_level.d_v = pooled.emplace_back(level.v.shape).view;
      own.sources.push_back(of_level);
    }
    RunReport report = run_backward(executed != nullptr ? *executed : *decided, with_levels, saved, own, context.run);
    for (std::size_t i = 0; i < levels.size(); ++i) {
      for (const auto& [from, to] : {std::pair(own.sources[i].d_k, d_k.view), {own.sources[i].d_v, d_v.view}}) {
        if (to.data == nullptr) continue;
        score::spread_gradients(problem, sequences, kMembers[i + 1], from, to, context.run.threads);
      }
    }
    d_k.write(gradients.d_k);
    d_v.write(gradients.d_v);
    return report;
  }

 private:
  /// Floats in the shape of a gradient; nothing where it is not wanted.
  struct FloatLike {
    std::vector<float> values;
    MutableTensorView view;

    explicit FloatLike(const MutableTensorView& wanted) {
      if (wanted.data != nullptr) make(wanted.shape);
    }
    explicit FloatLike(const std::array<std::int64_t, 4>& shape) { make(shape); }
    void make(const std::array<std::int64_t, 4>& shape) {
      values.assign(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]), 0.0F);
      view = mutable_view_of(values.data(), DType::f32, shape);
    }
    void write(const MutableTensorView& to) const {
      if (to.data == nullptr) return;
      const auto [batch, heads, tokens, dim] = to.shape;
      for (std::int64_t row = 0; row < batch * heads * tokens; ++row) {
        from_float(values.data() + row * dim, dim, to.dtype,
                   to.row(row / tokens / heads, row / tokens % heads, row % tokens));
      }
    }
  };

  static void require_supported(const AttentionInputs& inputs) {
    require(inputs.modifiers.alibi_slopes.empty() && inputs.modifiers.key_bias.data == nullptr,
            "psa: pooled keys have no position and no bias of their own; expected neither ALiBi nor key bias");
  }

  /// The sources of levels 2, 4 and 8.
  static std::vector<score::PooledSource> pool(const Problem& problem, const AttentionInputs& inputs,
                                               std::span<const OrderedTiles> sequences, const PlanContext& context) {
    std::vector<score::PooledSource> levels;
    levels.reserve(kMembers.size() - 1);
    for (std::size_t level = 1; level < kMembers.size(); ++level) {
      levels.emplace_back(problem, inputs, sequences, kMembers[level], context.run.threads);
    }
    return levels;
  }
  static AttentionInputs inputs_with(AttentionInputs inputs, std::span<const score::PooledSource> levels) {
    inputs.sources.clear();
    for (const score::PooledSource& level : levels) inputs.sources.push_back(level.view());
    return inputs;
  }

  using Levels = std::vector<std::int8_t>;  ///< of the key blocks of one query tile; kSkipped or an index of kMembers

  std::vector<OrderedTiles> sequences_of(const Problem& problem) const {
    return score::ordered_sequences(problem, params_.block_q, params_.block_k,
                                    [&](const TokenGrid& grid) { return params_.order.tokens(grid); });
  }

  Plan plan_over(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context,
                 std::span<const OrderedTiles> sequences) const {
    std::vector<Plan> parts;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      std::vector<std::int8_t> limits;
      for (std::int64_t head = 0; head < problem.q_heads; ++head) {
        if (head % problem.group() == 0) limits = level_limits(problem, inputs, sequences[s], head / problem.group());
        const std::vector<Levels> levels = choose(problem, inputs, sequences[s], head, limits, context);
        parts.push_back(block_plan(problem, sequences[s], s * problem.q_heads + head, levels));
      }
    }
    return concatenate_blocks(problem, problem.q_heads, problem.batch, parts);
  }

  /// The highest level that the keys of each block are alike enough for.
  std::vector<std::int8_t> level_limits(const Problem& problem, const AttentionInputs& inputs,
                                        const OrderedTiles& tokens, std::int64_t kv_head) const {
    std::vector<std::int8_t> limits(static_cast<std::size_t>(tokens.key_tiles()), 3);
    if (!params_.similarity) return limits;
    const std::int64_t dim = problem.head_dim;
    const std::array<double, 4> least{0, params_.similar_2, params_.similar_4, params_.similar_8};
    std::vector<float> keys(static_cast<std::size_t>(params_.block_k * dim));
    for (std::int64_t block = 0; block < tokens.key_tiles(); ++block) {
      const std::int64_t count = tokens.columns(block);
      tokens.load_keys(problem, inputs, kv_head, block * params_.block_k, count, keys.data());
      std::int8_t limit = 0;
      for (std::int8_t level = 1; level < 4; ++level) {
        const std::int64_t members = kMembers[level];
        double sum = 0;
        std::int64_t pairs = 0;
        for (std::int64_t first = 0; first + members <= count; first += members, ++pairs) {
          sum += cosine(keys.data() + first * dim, keys.data() + (first + members - 1) * dim, dim);
        }
        if (pairs > 0 && sum / static_cast<double>(pairs) > least[level]) limit = level;
      }
      limits[block] = limit;
    }
    return limits;
  }

  static double cosine(const float* a, const float* b, std::int64_t dim) {
    double ab = 0;
    double aa = 0;
    double bb = 0;
    for (std::int64_t d = 0; d < dim; ++d) {
      ab += static_cast<double>(a[d]) * b[d];
      aa += static_cast<double>(a[d]) * a[d];
      bb += static_cast<double>(b[d]) * b[d];
    }
    return ab / std::sqrt(std::max(aa * bb, 1e-30));
  }

  /// Levels of all blocks, per query tile of a head.
  std::vector<Levels> choose(const Problem& problem, const AttentionInputs& inputs, const OrderedTiles& tokens,
                             std::int64_t head, std::span<const std::int8_t> limits, const PlanContext& context) const {
    std::vector<Levels> levels(static_cast<std::size_t>(tokens.query_tiles()));
    if (tokens.keys() == 0) return levels;
    std::seed_seq mix{params_.seed, context.layer, head};
    std::mt19937_64 random(mix);
    const auto sampled = [&](std::int64_t block) { return std::max<std::int64_t>(1, block / params_.sample); };
    const auto q_offsets = sample_offsets(params_.block_q, sampled(params_.block_q), random);
    const auto k_offsets = sample_offsets(params_.block_k, sampled(params_.block_k), random);
    const std::int64_t dim = problem.head_dim;

    // The end of the sequence is repeated where a block is ragged.
    const auto per_block = static_cast<std::int64_t>(k_offsets.size());
    const std::int64_t samples = tokens.key_tiles() * per_block;
    std::vector<float> keys(static_cast<std::size_t>(samples * dim));
    std::vector<std::int64_t> key_positions(static_cast<std::size_t>(samples));
    parallel_for(tokens.key_tiles(), context.run.threads, [&](std::int64_t block, int) {
      for (std::int64_t i = 0; i < per_block; ++i) {
        const std::int64_t place = std::min(block * params_.block_k + k_offsets[i], tokens.keys() - 1);
        const std::int64_t sample = block * per_block + i;
        tokens.load_keys(problem, inputs, head / problem.group(), place, 1, keys.data() + sample * dim);
        key_positions[sample] = tokens.key_position(place);
      }
    });
    parallel_for(tokens.query_tiles(), context.run.threads, [&](std::int64_t tile, int) {
      const auto rows = static_cast<std::int64_t>(q_offsets.size());
      std::vector<float> queries(static_cast<std::size_t>(rows * dim));
      std::vector<std::int64_t> positions;
      for (std::int64_t i = 0; i < rows; ++i) {
        const std::int64_t place = std::min(tile * params_.block_q + q_offsets[i], tokens.queries() - 1);
        tokens.load_queries(problem, inputs, head, place, 1, queries.data() + i * dim);
        positions.push_back(tokens.query_position(place));
      }
      // A stretch of blocks at a time: its scores stay in the cache.
      const std::int64_t blocks_at_once = std::max<std::int64_t>(1, kSamplesAtOnce / per_block);
      std::vector<float> scores(static_cast<std::size_t>(rows * blocks_at_once * per_block));
      std::vector<float> maxima(static_cast<std::size_t>(rows * tokens.key_tiles()));
      for (std::int64_t first = 0; first < tokens.key_tiles(); first += blocks_at_once) {
        const std::int64_t blocks = std::min(blocks_at_once, tokens.key_tiles() - first);
        const std::int64_t count = blocks * per_block;
        score::multiply_transposed(queries.data(), rows, dim, keys.data() + first * per_block * dim, count, dim, dim,
                                   problem.softmax_scale(), scores.data(), count);
        for (std::int64_t i = 0; i < rows; ++i) {
          for (std::int64_t block = 0; block < blocks; ++block) {
            float* of_block = scores.data() + i * count + block * per_block;
            for (std::int64_t j = 0; problem.causal && j < per_block; ++j) {
              if (key_positions[(first + block) * per_block + j] > positions[i]) of_block[j] = kUnseen;
            }
            maxima[i * tokens.key_tiles() + first + block] =
                largest_of({of_block, static_cast<std::size_t>(per_block)});
          }
        }
      }
      std::vector<float> blocks(static_cast<std::size_t>(tokens.key_tiles()), 0.0F);
      for (std::int64_t i = 0; i < rows; ++i) {
        add_row(std::span(maxima).subspan(i * tokens.key_tiles(), tokens.key_tiles()), blocks);
      }
      levels[tile] = assign(problem, tokens, tile, blocks, limits);
    });
    return levels;
  }

  /// The largest score; NaN if there is one.
  static float largest_of(std::span<const float> scores) {
    float largest = kUnseen;
    bool undefined = false;
    for (const float score : scores) {
      undefined = undefined || std::isnan(score);
      largest = std::max(largest, score);
    }
    return undefined ? std::numeric_limits<float>::quiet_NaN() : largest;
  }

  /// blocks[J] = max(blocks[J], exp(max of the block - max of the row)); NaN stays.
  static void add_row(std::span<const float> maxima, std::span<float> blocks) {
    float largest = kUnseen;
    for (const float maximum : maxima) {
      if (!std::isnan(maximum)) largest = std::max(largest, maximum);
    }
    for (std::size_t block = 0; block < blocks.size(); ++block) {
      if (maxima[block] == kUnseen) continue;
      const float ratio = maxima[block] == largest ? 1.0F : std::exp(maxima[block] - largest);
      if (!(ratio <= blocks[block]) && !std::isnan(blocks[block])) blocks[block] = ratio;
    }
  }

  /// Cuts the sorted blocks of a query tile into intervals of levels.
  Levels assign(const Problem& problem, const OrderedTiles& tokens, std::int64_t tile, std::span<const float> scores,
                std::span<const std::int8_t> limits) const {
    Levels levels(scores.size(), kSkipped);
    std::vector<std::int32_t> order;
    for (std::size_t block = 0; block < scores.size(); ++block) {
      if (tokens.sees_some(tile, static_cast<std::int64_t>(block))) order.push_back(static_cast<std::int32_t>(block));
    }
    if (tokens.text_queries(tile)) {
      for (const std::int32_t block : order) levels[block] = 0;
      return levels;
    }
    std::sort(order.begin(), order.end(), score::ScoreOrder{scores});
    const auto candidates = static_cast<std::int64_t>(order.size());

    std::array<std::pair<double, std::int8_t>, 4> ends{{{params_.end_1, std::int8_t{0}},
                                                        {params_.end_2, std::int8_t{1}},
                                                        {params_.end_4, std::int8_t{2}},
                                                        {params_.end_8, std::int8_t{3}}}};
    std::stable_sort(ends.begin(), ends.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    std::int64_t start = 0;
    for (const auto& [share, level] : ends) {
      std::int64_t end = end_of_interval(order, scores, share);
      if (params_.rule == Rule::threshold && level == 0) {
        end = std::max(end, start + static_cast<std::int64_t>(params_.floor_1 * static_cast<double>(candidates)) + 1);
      }
      const std::int64_t entries_per_block = std::max<std::int64_t>(1, params_.block_k / params_.pack);
      const std::int64_t unit = (kMembers[level] + entries_per_block - 1) / entries_per_block;
      std::int64_t length = (std::max<std::int64_t>(0, std::min(end, candidates) - start) + unit - 1) / unit * unit;
      if (start + length > candidates) length = (candidates - start) / unit * unit;
      for (std::int64_t i = start; i < start + length; ++i) levels[order[i]] = level;
      start += length;
    }
    for (const std::int32_t block : order) {
      if (levels[block] != kSkipped) levels[block] = std::min(levels[block], limits[block]);
      if (tokens.text_keys(block) || std::isnan(scores[block])) levels[block] = 0;
    }
    if (problem.causal) {
      for (std::int64_t row = 0; row < tokens.rows(tile); ++row) {
        const std::int64_t block = tokens.key_tile_of(tokens.query_position(tile * params_.block_q + row));
        if (tokens.sees_some(tile, block)) levels[block] = 0;
      }
    }
    return levels;
  }

  /// Where the interval that ends at this share stops in the sorted list.
  std::int64_t end_of_interval(std::span<const std::int32_t> order, std::span<const float> scores, double share) const {
    const auto count = static_cast<std::int64_t>(order.size());
    if (params_.rule == Rule::topk) return static_cast<std::int64_t>(static_cast<double>(count) * share);
    if (share >= 1) return count;
    double total = 0;
    for (const std::int32_t block : order) total += std::isnan(scores[block]) ? 1.0 : scores[block];
    double sum = 0;
    std::int64_t within = 0;
    for (const std::int32_t block : order) {
      sum += std::isnan(scores[block]) ? 1.0 : scores[block];
      if (sum > share * total) break;
      ++within;
    }
    return within == 0 ? 0 : within + 1;
  }

  Plan block_plan(const Problem& problem, const OrderedTiles& tokens, std::int64_t block,
                  std::span<const Levels> levels) const {
    PlanBuilder builder =
        PlanBuilder::for_block(problem, params_.block_q, params_.block_k, problem.q_heads, problem.batch, block);
    for (std::size_t level = 1; level < kMembers.size(); ++level) {
      builder.add_source({"mean of " + std::to_string(kMembers[level]),
                          score::PooledSource::entries(problem, kMembers[level]), false});
    }
    tokens.set_orders(builder, block);
    for (std::int64_t tile = 0; tile < tokens.query_tiles(); ++tile) {
      for (std::int8_t level = 0; level < static_cast<std::int8_t>(kMembers.size()); ++level) {
        add_level(builder, tokens, tile, level, levels[tile]);
      }
      builder.end_row();
    }
    return std::move(builder).finish();
  }

  /// Entries of the blocks at one level; neighbours without a mask become one run.
  void add_level(PlanBuilder& builder, const OrderedTiles& tokens, std::int64_t tile, std::int8_t level,
                 std::span<const std::int8_t> levels) const {
    const std::int64_t members = kMembers[level];
    const auto source = static_cast<std::uint16_t>(static_cast<std::uint8_t>(level));
    std::int64_t begin = 0;
    std::int64_t end = 0;
    for (std::size_t i = 0; i < levels.size(); ++i) {
      if (levels[i] != level) continue;
      const auto block = static_cast<std::int64_t>(i);
      const std::int64_t first = block * params_.block_k / members;
      const std::int64_t count = (tokens.columns(block) + members - 1) / members;
      if (!tokens.sees_all(tile, block)) {
        builder.run(begin, end - begin, EntryMask::none, 0, source);
        begin = end = 0;
        add_masked(builder, tokens, tile, block, level);
        continue;
      }
      if (end != first) {
        builder.run(begin, end - begin, EntryMask::none, 0, source);
        begin = first;
      }
      end = first + count;
    }
    builder.run(begin, end - begin, EntryMask::none, 0, source);
  }

  /// A block that the causal mask cuts. An entry is seen by queries at or after its last member.
  void add_masked(PlanBuilder& builder, const OrderedTiles& tokens, std::int64_t tile, std::int64_t block,
                  std::int8_t level) const {
    const std::int64_t members = kMembers[level];
    const std::int64_t first_key = block * params_.block_k;
    const std::int64_t count = (tokens.columns(block) + members - 1) / members;
    const auto source = static_cast<std::uint16_t>(static_cast<std::uint8_t>(level));
    if (level == 0) return builder.run(first_key, count, EntryMask::band, 0, source);
    const std::int64_t words = (count + 63) / 64;
    std::vector<std::uint64_t> bits(static_cast<std::size_t>(tokens.rows(tile) * words), 0);
    std::int64_t pairs = 0;
    for (std::int64_t entry = 0; entry < count; ++entry) {
      std::int64_t last = 0;
      for (std::int64_t i = entry * members; i < std::min((entry + 1) * members, tokens.columns(block)); ++i) {
        last = std::max(last, tokens.key_position(first_key + i));
      }
      for (std::int64_t row = 0; row < tokens.rows(tile); ++row) {
        if (tokens.query_position(tile * params_.block_q + row) < last) continue;
        bits[row * words + entry / 64] |= std::uint64_t{1} << (entry % 64);
        ++pairs;
      }
    }
    if (pairs > 0) builder.run(first_key / members, count, EntryMask::bitmask, builder.add_mask(bits), source);
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(psa, tessera::PyramidSparse);
