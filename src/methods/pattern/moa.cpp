// MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, arXiv:2406.14909: every head keeps
// sinks and a local span whose length is a linear function of the input's, alpha + beta * N. A search chooses the rules
// (src/tune/span_search.h).
//
// Prefill: in blocks of 64, a row keeps the sink block and the latest blocks up to its own. Decode: 64 static sinks and
// a ring of the latest tokens, both together as large as the rule says for the prompt plus the tokens to come. The
// cache holds no more than that per kv head, from the end of the prompt on. Where there is none, plan() names the same
// tokens: with a state the prompt's length is that of the last prefill of the layer; without one, the keys so far stand
// for it. A head that sees everything (alpha 0, beta 1) does so however many tokens come.
//
// Differs from the authors' code: sinks count inside the span in prefill too, as in their cache (their prefill masks
// add a block). In chunked prefill the keys so far are the length N. Heads are not reordered by size: every kv head has
// pages of its own. A further prompt attends to what is kept and sets the sizes anew.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/elastic_spans.h"
#include "methods/evicting_cache.h"
#include "methods/registry.h"
#include "score/plan_rows.h"

namespace tessera {
namespace {

/// Lengths of the prompts that were prefilled last.
class PromptLengths final : public MethodState {
 public:
  void set(std::int64_t layer, std::int64_t sequence, std::int64_t length) {
    const std::lock_guard lock(mutex_);
    lengths_[{layer, sequence}] = length;
  }
  /// `otherwise` where none is known.
  std::int64_t get(std::int64_t layer, std::int64_t sequence, std::int64_t otherwise) const {
    const std::lock_guard lock(mutex_);
    const auto found = lengths_.find({layer, sequence});
    return found == lengths_.end() ? otherwise : found->second;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> lengths_;
};

/// Sinks and a ring of the latest tokens, of a size of its own for each kv head.
class SpanCache final : public EvictingCache {
 public:
  SpanCache(const LayerCacheShape& shape, std::vector<ElasticSpan> rules, std::int64_t new_tokens)
      : EvictingCache(shape), rules_(std::move(rules)), new_tokens_(new_tokens) {}

 private:
  bool evicts() const override { return true; }

  KeptSlots choose(const PlanContext&) override {
    most_.clear();
    KeptSlots kept;
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      const ElasticSpan& rule = rules_[static_cast<std::size_t>(head)];
      // The next token takes the last place.
      most_.push_back(rule == ElasticSpan{} ? kMostTokens : span_cache_tokens(rule, tokens() + new_tokens_) - 1);
      std::vector<std::int32_t> slots = slots_by_position(head);
      if (std::ssize(slots) > most_.back()) {
        slots.erase(slots.begin() + kSpanBlock, slots.end() - (most_.back() - kSpanBlock));
      }
      kept.push_back(std::move(slots));
    }
    return kept;
  }

  void observe_decode(const CacheCall&, std::span<const float>, const PlanContext&) override {
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      while (size_of_head(head) > most_[static_cast<std::size_t>(head)]) evict_oldest(head, kSpanBlock);
    }
  }

  std::vector<ElasticSpan> rules_;  ///< [kv_heads]
  std::int64_t new_tokens_;
  std::vector<std::int64_t> most_;  ///< tokens that each kv head keeps between two steps
};

class MixtureOfSpans {
 public:
  struct Params {
    std::int64_t alpha = 0;
    double beta = 0.5;
    std::int64_t new_tokens = 1024;
    Configuration config;
    void visit(ParameterList& v) {
      v("alpha", alpha, -kMostTokens, kMostTokens, "tokens of the span that do not depend on the length");
      v("beta", beta, 0, 1, "share of the length that the span grows by");
      v("new_tokens", new_tokens, 0, kMostTokens, "tokens to be generated that the decode cache is sized for");
      v("config", config,
        "JSON {\"heads\": table} with a rule per layer and kv head, as the search writes; replaces alpha and beta");
    }
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {
        .name = "moa",
        .family = "pattern",
        .summary = "sinks plus a local span per head that grows linearly with the input",
        .paper = "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, arXiv:2406.14909",
        .phases = {.prefill = true, .decode = true},
        .domain = {.bidirectional = false, .reason = "spans reach back from the query"},
        .budget = {{"beta", 0, 1}}};
  }

  explicit MixtureOfSpans(Params params) : params_(std::move(params)) {
    if (!params_.config.empty()) table_ = read_span_table(params_.config);
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<PromptLengths>(); }

  void check_model(std::int64_t layers, std::int64_t, std::int64_t kv_heads) const {
    if (table_.empty()) return;
    require(std::ssize(table_) == layers && std::ssize(table_[0]) == kv_heads,
            "moa: '{}' is for {} layers of {} kv heads; the model has {} of {}", params_.config.name(), table_.size(),
            table_[0].size(), layers, kv_heads);
  }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext& context) const {
    std::vector<ElasticSpan> rules = rules_of(shape.kv_heads, context.layer);
    if (rules.size() == 1) rules.resize(static_cast<std::size_t>(shape.kv_heads), rules[0]);
    if (std::all_of(rules.begin(), rules.end(), [](const ElasticSpan& rule) { return rule == ElasticSpan{}; })) {
      return nullptr;
    }
    return std::make_unique<SpanCache>(shape, std::move(rules), params_.new_tokens);
  }

  /// Without a share of the length, or with all of it. A call of one query is a decode step.
  std::int64_t prefill_tile() const {
    const bool whole = params_.alpha == 0 && params_.beta == 1;
    return table_.empty() && (params_.beta == 0 || whole) ? 2 : 0;
  }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    const std::vector<ElasticSpan> rules = rules_of(problem.kv_heads, context.layer);
    const auto heads = static_cast<std::int64_t>(rules.size());
    score::PlanRows rows(problem, 128, kSpanBlock, heads, false);
    auto* state = dynamic_cast<PromptLengths*>(context.state);
    for (std::int64_t s = 0; state != nullptr && s < problem.batch; ++s) {
      if (problem.q_len_of(s) > 1) state->set(context.layer, s, problem.kv_len_of(s));
    }
    rows.for_each_band(8, context.run.threads, [&](std::int64_t block, std::int64_t first, std::int64_t count, int) {
      const score::QueryTiles tiles = rows.geometry(block);
      const ElasticSpan& rule = rules[block % heads];
      for (std::int64_t tile = first; tile < first + count; ++tile) {
        if (tiles.queries == 1) {
          const std::int64_t sequence = rows.sequence_of(block);
          add_ring(tiles, ring_tokens(problem, rule, sequence, context, state), rows.row(block, tile));
        } else {
          add_blocks(tiles, tile, span_blocks(rule, tiles.keys) - 1, rows.row(block, tile));
        }
      }
    });
    return std::move(rows).finish(context.run.threads);
  }

 private:
  /// One rule for all heads, or one per kv head.
  std::vector<ElasticSpan> rules_of(std::int64_t kv_heads, std::int64_t layer) const {
    if (table_.empty()) return {{static_cast<double>(params_.alpha), params_.beta}};
    require(layer < static_cast<std::int64_t>(table_.size()), "moa: layer is {}; '{}' has {} layers", layer,
            params_.config.name(), table_.size());
    const std::vector<ElasticSpan>& rules = table_[layer];
    require(static_cast<std::int64_t>(rules.size()) == kv_heads,
            "moa: layer {} of '{}' has {} heads; the problem has {} kv heads", layer, params_.config.name(),
            rules.size(), kv_heads);
    return rules;
  }

  std::int64_t ring_tokens(const Problem& problem, const ElasticSpan& rule, std::int64_t sequence,
                           const PlanContext& context, const PromptLengths* state) const {
    const std::int64_t keys = problem.kv_len_of(sequence);
    if (rule == ElasticSpan{}) return keys;
    const std::int64_t length =
        state == nullptr ? keys : state->get(context.layer, sequence, keys - params_.new_tokens) + params_.new_tokens;
    return span_cache_tokens(rule, length) - kSpanBlock;
  }

  /// A decode step: the sinks and the latest `ring` keys.
  static void add_ring(const score::QueryTiles& tiles, std::int64_t ring, score::PlanRow& row) {
    const std::int64_t position = tiles.first_position(0);
    const std::int64_t visible = tiles.keys_visible_from(position);
    // A query far behind the last key would slide its ring off the keys: it keeps the latest ones.
    const std::int64_t begin = std::clamp<std::int64_t>(std::min(position, tiles.keys - 1) - ring + 1, 0, visible);
    const std::int64_t sinks = std::min(kSpanBlock, begin);
    row.run(0, sinks);
    row.run(begin, visible);
  }

  /// Rows of a prefill: the sink block and `band` blocks that end with the row's own.
  static void add_blocks(const score::QueryTiles& tiles, std::int64_t tile, std::int64_t band, score::PlanRow& row) {
    const std::int64_t rows = tiles.rows(tile);
    const auto first_key = [&](std::int64_t r) {
      const std::int64_t position = std::min(tiles.first_position(tile) + r, tiles.keys - 1);
      return std::max<std::int64_t>(kSpanBlock, (block_of(position) - band + 1) * kSpanBlock);
    };
    row.visible_run(tiles, tile, 0, kSpanBlock);
    const std::int64_t from_all = first_key(rows - 1);  // keys from here on are in the span of every row
    const std::int64_t from_some = first_key(0);
    if (from_some < from_all) {
      // Only the earlier rows reach back to these keys; they lie before every row's own block or are cut by causality.
      const std::int64_t end = std::min(from_all, tiles.visible_keys(tile));
      const std::int64_t words = (end - from_some + 63) / 64;
      std::vector<std::uint64_t> bits(static_cast<std::size_t>(rows * std::max<std::int64_t>(words, 0)), 0);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t stop = std::min(end, tiles.keys_visible_from(tiles.first_position(tile) + r));
        for (std::int64_t key = first_key(r); key < stop; ++key) {
          bits[r * words + (key - from_some) / 64] |= std::uint64_t{1} << ((key - from_some) % 64);
        }
      }
      row.bits(from_some, end, bits);
    }
    row.visible_run(tiles, tile, from_all, tiles.keys);
  }

  static std::int64_t block_of(std::int64_t position) { return position < 0 ? 0 : position / kSpanBlock; }

  Params params_;
  SpanTable table_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(moa, tessera::MixtureOfSpans);
