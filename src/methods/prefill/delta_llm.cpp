// DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference, arXiv:2507.19608.
//
// Keys, after RoPE, are read as changes: a channel of key n moves only when it differs from its reference by more than
// theta, and the reference moves with it, so that what is held strays by theta at most. Sinks and the aligned local
// block floor(p / L) * L .. p of a query, L = round(scale * keys), are scored exactly, all other keys as held, under
// one softmax and with exact values. No key is left out.
//
// scoring=held multiplies the held keys, a derived source, by the same kernel as any others: the method's numbers, no
// saving. scoring=sparse adds up scores from the channels that moved (bitmap and packed values, score/delta_keys.h) for
// 64 queries at a time, anew from a held key every 256 tokens so that sums do not drift, and joins that branch with the
// exact one by LSE. It multiplies less but cannot win against products of whole registers: half of the arithmetic of
// attention is with values, which stay dense, and a moved channel costs one float multiply-add per query that must load
// its operand, where the dense kernel does several from registers (twice as many again in bf16). Measured with all but
// 2% of the channels at rest it is still slower than dense attention. It saves memory, not time.
//
// Decoding keeps the changes in the state: a step reads the new key and one reference vector per head. scoring=auto
// takes held keys for prompts and changes for decoding, where pages of keys could not be joined by a source.
//
// local=sliding takes p - j < L instead of the aligned block; rule=row moves whole keys by their Euclidean distance;
// rule=pairs moves, of each four channels, the two that changed most. The block of a query beyond the last key is that
// of the last key.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "methods/branch_merge.h"
#include "methods/registry.h"
#include "score/delta_keys.h"
#include "score/exponential.h"
#include "score/plan_rows.h"
#include "score/product.h"
#include "score/row_access.h"

namespace tessera {
namespace {

enum class Local : std::uint8_t { aligned, sliding };
enum class Scoring : std::uint8_t { automatic, held, sparse };

constexpr std::int64_t kTile = 128;
constexpr std::int64_t kManyRows = 64;
constexpr std::int64_t kFewRows = 16;
constexpr std::int64_t kRowsAtOnce = 256;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

/// The changes of every (sequence, kv head), by layer.
class DeltaState final : public MethodState {
 public:
  std::vector<score::DeltaKeys>& of_layer(std::int64_t layer) { return layers_[layer]; }
  std::size_t memory_bytes() const override {
    std::size_t bytes = 0;
    for (const auto& [layer, heads] : layers_) {
      for (const score::DeltaKeys& keys : heads) bytes += keys.memory_bytes();
    }
    return bytes;
  }

 private:
  std::map<std::int64_t, std::vector<score::DeltaKeys>> layers_;
};

class DeltaLlm {
 public:
  struct Params {
    double theta = 0.6;
    double scale = 0.05;
    std::int64_t sinks = 0;
    Local local = Local::aligned;
    score::DeltaRule rule = score::DeltaRule::channel;
    Scoring scoring = Scoring::automatic;
    void visit(ParameterList& v) {
      v("theta", theta, 0, 1e9, "change up to which a channel (rule=row: a key) is held");
      v("scale", scale, 0, 1, "local region as a share of the keys; 1 is dense");
      v("sinks", sinks, 0, kMostTokens, "first keys that are scored exactly");
      v("local", local, {"aligned", "sliding"}, "the query's aligned block, or the nearest keys");
      v("rule", rule, {"channel", "row", "pairs"}, "what moves: channels, whole keys, or two channels of four");
      v("scoring", scoring, {"auto", "held", "sparse"},
        "held keys in the usual kernel, sums over changes, or auto: changes for decoding only");
    }
  };
  static MethodInfo info() {
    return {.name = "delta-llm",
            .family = "prefill",
            .summary = "keys held until a channel changes by more than a threshold, exact near the query",
            .paper =
                "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference, "
                "arXiv:2507.19608",
            .phases = {.prefill = true, .decode = true},
            .domain = {.bidirectional = false, .reason = "its keys change in the order of time"},
            .budget = {{"scale", 0, 1}}};
  }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    return plan_of(problem, true, context.run.threads);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    require(inputs.modifiers.alibi_slopes.empty() && inputs.modifiers.key_bias.data == nullptr,
            "delta-llm: held keys have no position and no bias of their own; expected neither ALiBi nor key bias");
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < problem.batch; ++s) longest = std::max(longest, problem.q_len_of(s));
    const bool few = longest * problem.group() <= kFewRows;
    const bool sparse = params.scoring == Scoring::sparse || (params.scoring == Scoring::automatic && few);
    RunReport report = sparse ? attend_by_changes(problem, inputs, outputs, context, few)
                              : attend_held(problem, inputs, outputs, context);
    if (executed != nullptr) *executed = plan_of(problem, true, context.run.threads);
    return report;
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<DeltaState>(); }

  /// First key of the local region of a query.
  std::int64_t local_begin(const score::QueryTiles& tiles, std::int64_t position) const {
    const std::int64_t length = std::max<std::int64_t>(1, std::llround(params.scale * static_cast<double>(tiles.keys)));
    const std::int64_t p = std::min(position, tiles.keys - 1);
    const std::int64_t begin = params.local == Local::aligned ? p / length * length : p - length + 1;
    return std::clamp<std::int64_t>(begin, 0, tiles.keys_visible_from(position));
  }
  /// Keys [sinks, n) are scored as held.
  std::int64_t held_end(const score::QueryTiles& tiles, std::int64_t position) const {
    if (position < 0 || tiles.keys == 0) return 0;
    return std::max(std::min(params.sinks, tiles.keys), local_begin(tiles, position));
  }

  /// What is scored exactly from source 0, and with_held the rest from source 1.
  Plan plan_of(const Problem& problem, bool with_held, int threads) const {
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < problem.batch; ++s) longest = std::max(longest, problem.kv_len_of(s));
    std::vector<Plan> parts(static_cast<std::size_t>(problem.batch));
    parallel_for(problem.batch, threads, [&](std::int64_t s, int) {
      PlanBuilder builder = PlanBuilder::for_block(problem, kTile, kTile, 1, problem.batch, s);
      if (with_held) builder.add_source({"held keys", longest, false});
      const score::QueryTiles tiles(problem, s, kTile, kTile);
      for (std::int64_t t = 0; t < tiles.count(); ++t) {
        add_row(tiles, t, with_held, builder);
        builder.end_row();
      }
      parts[s] = std::move(builder).finish();
    });
    return concatenate_blocks(problem, 1, problem.batch, parts);
  }

  void add_row(const score::QueryTiles& tiles, std::int64_t tile, bool with_held, PlanBuilder& builder) const {
    const std::int64_t visible = tiles.visible_keys(tile);
    if (visible == 0) return;
    const std::int64_t rows = tiles.rows(tile);
    const std::int64_t sinks = std::min(params.sinks, visible);
    const auto mask = [&](std::int64_t end) {
      return end <= tiles.common_keys(tile) ? EntryMask::none : EntryMask::band;
    };
    // Rows before the first key see nothing; the first that sees one has the earliest region.
    const std::int64_t first_position = std::max<std::int64_t>(0, tiles.first_position(tile));
    const std::int64_t lowest = std::clamp(held_end(tiles, first_position), sinks, visible);
    const std::int64_t highest = std::clamp(held_end(tiles, tiles.last_position(tile)), lowest, visible);
    builder.run(0, sinks, mask(sinks));
    if (with_held && lowest > sinks) builder.run(sinks, lowest - sinks, mask(lowest), 0, 1);
    if (highest > lowest) {
      // Keys that are held for some rows and exact, or not yet seen, for others.
      const std::int64_t words = (highest - lowest + 63) / 64;
      std::vector<std::uint64_t> exact(static_cast<std::size_t>(rows * words), 0);
      std::vector<std::uint64_t> held(exact.size(), 0);
      bool any_exact = false;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t position = tiles.first_position(tile) + r;
        const std::int64_t seen = tiles.keys_visible_from(position);
        const std::int64_t end = held_end(tiles, position);
        for (std::int64_t j = lowest; j < std::min(highest, seen); ++j) {
          auto& bits = j < end ? held : exact;
          bits[r * words + (j - lowest) / 64] |= std::uint64_t{1} << ((j - lowest) % 64);
          any_exact = any_exact || j >= end;
        }
      }
      if (with_held) builder.run(lowest, highest - lowest, EntryMask::bitmask, builder.add_mask(held), 1);
      if (any_exact) builder.run(lowest, highest - lowest, EntryMask::bitmask, builder.add_mask(exact));
    }
    builder.run(highest, visible - highest, mask(visible));
  }

  /// The changes of all (sequence, kv head) pairs, from the state as far as they are there.
  std::vector<score::DeltaKeys>& changes(const Problem& problem, const AttentionInputs& inputs,
                                         const PlanContext& context, std::vector<score::DeltaKeys>& once) const {
    auto* state = dynamic_cast<DeltaState*>(context.state);
    std::vector<score::DeltaKeys>& all = state == nullptr ? once : state->of_layer(context.layer);
    const auto pairs = static_cast<std::size_t>(problem.batch * problem.kv_heads);
    if (all.size() != pairs) {
      all.clear();
      for (std::size_t i = 0; i < pairs; ++i) {
        all.emplace_back(problem.head_dim, params.rule, static_cast<float>(params.theta));
      }
    }
    parallel_for(static_cast<std::int64_t>(pairs), context.run.threads, [&](std::int64_t pair, int) {
      const std::int64_t s = pair / problem.kv_heads;
      const std::int64_t keys = problem.kv_len_of(s);
      // Keys of this call may differ from those of one that failed.
      std::int64_t known = all[pair].truncate(std::max<std::int64_t>(0, keys - problem.q_len_of(s)));
      std::vector<float> rows(static_cast<std::size_t>(kRowsAtOnce * problem.head_dim));
      for (; known < keys; known = all[pair].keys()) {
        const std::int64_t count = std::min(kRowsAtOnce, keys - known);
        score::load_keys(problem, inputs, s, pair % problem.kv_heads, known, count, rows.data());
        all[pair].append(rows.data(), count);
      }
    });
    return all;
  }

  static double milliseconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }

  RunReport attend_held(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                        const PlanContext& context) const {
    const auto start = std::chrono::steady_clock::now();
    const Plan plan = plan_of(problem, true, context.run.threads);
    const std::int64_t longest = plan.sources[1].keys;
    PlanContext without_state = context;
    without_state.state = nullptr;
    std::vector<score::DeltaKeys> once;
    const std::vector<score::DeltaKeys>& all = changes(problem, inputs, without_state, once);
    const auto size = static_cast<std::int64_t>(size_of(inputs.k.dtype));
    const std::int64_t k_row = problem.head_dim * size;
    const std::int64_t v_row = problem.value_dim * static_cast<std::int64_t>(size_of(inputs.v.dtype));
    const bool view = !problem.variable_length() && !inputs.pages.used();
    // One row more: a source without keys still has an address.
    std::vector<std::byte> k(static_cast<std::size_t>((problem.batch * problem.kv_heads * longest + 1) * k_row));
    std::vector<std::byte> v(
        static_cast<std::size_t>(view ? 0 : (problem.batch * problem.kv_heads * longest + 1) * v_row));
    parallel_for(static_cast<std::int64_t>(all.size()), context.run.threads, [&](std::int64_t pair, int) {
      const std::int64_t s = pair / problem.kv_heads;
      std::vector<float> rows(static_cast<std::size_t>(kRowsAtOnce * std::max(problem.head_dim, problem.value_dim)));
      for (std::int64_t first = 0; first < problem.kv_len_of(s); first += kRowsAtOnce) {
        const std::int64_t count = std::min(kRowsAtOnce, problem.kv_len_of(s) - first);
        all[pair].expand(first, count, rows.data());
        from_float(rows.data(), count * problem.head_dim, inputs.k.dtype, k.data() + (pair * longest + first) * k_row);
        if (view) continue;
        score::load_values(problem, inputs, s, pair % problem.kv_heads, first, count, rows.data());
        from_float(rows.data(), count * problem.value_dim, inputs.v.dtype, v.data() + (pair * longest + first) * v_row);
      }
    });
    AttentionInputs with_held = inputs;
    const std::array<std::int64_t, 4> shape{problem.batch, problem.kv_heads, longest, problem.value_dim};
    with_held.sources = {
        {view_of(k.data(), inputs.k.dtype, {problem.batch, problem.kv_heads, longest, problem.head_dim}),
         view ? inputs.v : view_of(v.data(), inputs.v.dtype, shape),
         {}}};
    const double planned = milliseconds_since(start);
    RunReport report = run(plan, with_held, outputs, context.run);
    report.plan_ms = planned;
    return report;
  }

  RunReport attend_by_changes(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                              const PlanContext& context, bool few) const {
    require(!inputs.modifiers.changes_scores(),
            "delta-llm: scoring=sparse has scores of its own; expected no softcap, query scales or other weights");
    require(outputs.scores.data == nullptr, "delta-llm: scores are no by-product of scoring=sparse");
    const auto start = std::chrono::steady_clock::now();
    const Plan exact = plan_of(problem, false, context.run.threads);
    std::vector<score::DeltaKeys> once;
    const std::vector<score::DeltaKeys>& all = changes(problem, inputs, context, once);
    const double planned = milliseconds_since(start);

    const std::int64_t dim = problem.value_dim;
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    const std::int64_t rows = batch * problem.q_heads * problem.q_len;
    std::vector<float> o(static_cast<std::size_t>(rows * dim));
    std::vector<float> lse(static_cast<std::size_t>(rows));
    RunReport report =
        run(exact, inputs, {mutable_view_of(o.data(), DType::f32, {batch, problem.q_heads, problem.q_len, dim}), lse},
            context.run);

    const auto began = std::chrono::steady_clock::now();
    const Isa isa = context.run.isa.value_or(default_isa());
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      const std::int64_t queries = problem.q_len_of(s);
      const std::int64_t tiles = few ? 1 : (queries + kManyRows - 1) / kManyRows * problem.group();
      parallel_for(queries == 0 ? 0 : tiles * problem.kv_heads, context.run.threads, [&](std::int64_t i, int) {
        const std::int64_t kv_head = i % problem.kv_heads;
        const std::int64_t tile = tiles - 1 - i / problem.kv_heads;
        std::vector<Row> own;
        if (few) {
          for (std::int64_t g = 0; g < problem.group(); ++g) {
            for (std::int64_t r = 0; r < queries; ++r) own.push_back({kv_head * problem.group() + g, r});
          }
        } else {
          const std::int64_t first = tile / problem.group() * kManyRows;
          for (std::int64_t r = first; r < std::min(first + kManyRows, queries); ++r) {
            own.push_back({kv_head * problem.group() + tile % problem.group(), r});
          }
        }
        attend_tile(problem, inputs, all[s * problem.kv_heads + kv_head], s, kv_head, own, few ? kFewRows : kManyRows,
                    isa, o, lse);
      });
    }
    parallel_for(
        rows, context.run.threads,
        [&](std::int64_t row, int) {
          const std::int64_t head = row / problem.q_len;
          from_float(o.data() + row * dim, dim, outputs.o.dtype,
                     outputs.o.row(head / problem.q_heads, head % problem.q_heads, row % problem.q_len));
        },
        kRowsAtOnce);
    if (!outputs.lse.empty()) std::copy(lse.begin(), lse.end(), outputs.lse.begin());
    report.kernel_ms += milliseconds_since(began);
    report.plan_ms = planned;
    return report;
  }

  struct Row {
    std::int64_t head;
    std::int64_t query;
  };

  /// Adds the held keys of a few rows that read one kv head. `width` lanes hold the rows.
  void attend_tile(const Problem& problem, const AttentionInputs& inputs, const score::DeltaKeys& keys, std::int64_t s,
                   std::int64_t kv_head, std::span<const Row> rows, std::int64_t width, Isa isa, std::vector<float>& o,
                   std::vector<float>& lse) const {
    const score::QueryTiles tiles(problem, s, 1, 1);
    const std::int64_t dim = problem.head_dim;
    const std::int64_t value_dim = problem.value_dim;
    const std::int64_t begin = std::min(params.sinks, tiles.keys);
    std::vector<std::int64_t> ends(static_cast<std::size_t>(width), 0);
    std::vector<float> queries(static_cast<std::size_t>(dim * width), 0.0F);
    std::vector<float> row(static_cast<std::size_t>(dim));
    std::int64_t end = 0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      ends[r] = std::min(held_end(tiles, tiles.offset + rows[r].query),
                         tiles.keys_visible_from(tiles.offset + rows[r].query));
      end = std::max(end, ends[r]);
      score::load_queries(problem, inputs, s, rows[r].head, rows[r].query, 1, row.data());
      for (std::int64_t d = 0; d < dim; ++d) queries[d * width + static_cast<std::int64_t>(r)] = row[d];
    }
    if (end <= begin) return;
    for (float& x : queries) x *= problem.softmax_scale();

    std::vector<float> held;
    std::vector<float> scores(static_cast<std::size_t>(score::kDeltaPanel * width));
    std::vector<float> weights(scores.size());
    std::vector<float> values(static_cast<std::size_t>(score::kDeltaPanel * value_dim));
    std::vector<float> columns(values.size());
    std::vector<float> added(static_cast<std::size_t>(width * value_dim));
    std::vector<float> sums(added.size(), 0.0F);
    std::vector<float> maximum(static_cast<std::size_t>(width), kHidden);
    std::vector<float> raised(maximum.size(), kHidden);
    std::vector<float> mass(static_cast<std::size_t>(width), 0.0F);
    for (std::int64_t panel = begin / score::kDeltaPanel; panel * score::kDeltaPanel < end; ++panel) {
      const std::int64_t first = panel * score::kDeltaPanel;
      const std::int64_t count =
          std::min(keys.panel_scores(panel, queries.data(), width, isa, held, scores.data()), end - first);
      std::copy(maximum.begin(), maximum.end(), raised.begin());
      for (std::int64_t n = 0; n < count; ++n) {
        float* line = scores.data() + n * width;
        for (std::int64_t r = 0; r < width; ++r) {
          if (first + n < begin || first + n >= ends[r]) line[r] = kHidden;
          raised[r] = raised[r] > line[r] ? raised[r] : line[r];
        }
      }
      for (std::int64_t r = 0; r < width; ++r) {
        const float shift = raised[r] == kHidden ? 0.0F : raised[r];
        const float factor = maximum[r] == kHidden ? 0.0F : score::exponential(maximum[r] - shift);
        float* to = weights.data() + r * count;
        for (std::int64_t n = 0; n < count; ++n) to[n] = scores[n * width + r];
        score::exponentiate(to, count, shift);
        mass[r] = mass[r] * factor + score::row_sum(to, count);
        for (std::int64_t d = 0; d < value_dim; ++d) sums[r * value_dim + d] *= factor;
        maximum[r] = raised[r];
      }
      score::load_values(problem, inputs, s, kv_head, first, count, values.data());
      add_values(weights, values, count, width, value_dim, columns, added, sums);
    }
    for (std::size_t r = 0; r < rows.size(); ++r) {
      if (mass[r] == 0) continue;
      float* out = sums.data() + static_cast<std::int64_t>(r) * value_dim;
      for (std::int64_t d = 0; d < value_dim; ++d) out[d] /= mass[r];
      const std::int64_t to = (problem.tensor_batch_of(s) * problem.q_heads + rows[r].head) * problem.q_len +
                              problem.q_begin_of(s) + rows[r].query;
      merge_row(maximum[r] + std::log(mass[r]), out, value_dim, lse[to], o.data() + to * value_dim);
    }
  }

  /// sums [width][value_dim] += weights [width][count] * values [count][value_dim].
  static void add_values(std::span<const float> weights, std::span<const float> values, std::int64_t count,
                         std::int64_t width, std::int64_t value_dim, std::vector<float>& columns,
                         std::vector<float>& added, std::vector<float>& sums) {
    bool finite = true;
    for (std::int64_t n = 0; n < count; ++n) {
      for (std::int64_t d = 0; d < value_dim; ++d) {
        const float x = values[n * value_dim + d];
        columns[d * count + n] = x;
        finite = finite && std::isfinite(x);
      }
    }
    if (finite) {
      score::multiply_transposed(weights.data(), width, count, columns.data(), value_dim, count, count, 1.0F,
                                 added.data(), value_dim);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += added[i];
      return;
    }
    // A value that a row does not see must not reach it through a weight of 0.
    for (std::int64_t r = 0; r < width; ++r) {
      for (std::int64_t n = 0; n < count; ++n) {
        const float weight = weights[r * count + n];
        if (weight == 0) continue;
        for (std::int64_t d = 0; d < value_dim; ++d) sums[r * value_dim + d] += weight * values[n * value_dim + d];
      }
    }
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(delta_llm, tessera::DeltaLlm);
