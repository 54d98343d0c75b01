// Heavy hitters and recent tokens, evicted step by step.
//
// H2O (H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv:2306.14048). Every
// key of every kv head has a score: the sum of the probabilities it ever got, over all queries and the query heads of
// the group. While the prompt comes in nothing is evicted and s_j = sum_i P[i, j] (dense probabilities: column sums of
// exp(score - log-sum-exp), a block of queries at a time; a sparse prefill method needs a pass more for the latter).
// When its N tokens are in, the budget is heavy = floor(heavy_ratio * N) and recent = floor(recent_ratio * N), or the
// absolute sizes; the last `recent` tokens stay and the `heavy` best of the others. Each decoded token attends to what
// is kept and itself, adds its probabilities to the scores, and then evicts the worst of the tokens that are not
// recent. Positions stay true.
//
// Differs from the authors' code: one list per kv head with the scores summed over its query heads, where theirs
// repeats keys per query head; recent is at least 1. A further prompt attends to what is kept and sets the budget anew
// from the length of the whole sequence.
//
// plan() is dense: the prompt runs dense unless another prefill method is named, and eviction is the cache's affair.
// The scores of the prompt are those of dense attention in any case.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/evicting_cache.h"
#include "methods/registry.h"
#include "score/row_probe.h"
#include "score/top_k.h"

namespace tessera {
namespace {

struct H2OParams {
  double heavy_ratio = 0.1;
  double recent_ratio = 0.1;
  std::int64_t heavy = -1;
  std::int64_t recent = -1;
  void visit(ParameterList& v) {
    v("heavy_ratio", heavy_ratio, 0, 1, "heavy hitters as a share of the prompt");
    v("recent_ratio", recent_ratio, 0, 1, "recent tokens as a share of the prompt");
    v("heavy", heavy, -1, kMostTokens, "heavy hitters kept; -1: by heavy_ratio");
    v("recent", recent, -1, kMostTokens, "recent tokens kept, at least 1; -1: by recent_ratio");
  }
};

class H2OCache final : public EvictingCache {
 public:
  H2OCache(const H2OParams& params, const LayerCacheShape& shape)
      : EvictingCache(shape),
        params_(params),
        scores_(static_cast<std::size_t>(shape.kv_heads)),
        pending_(static_cast<std::size_t>(shape.kv_heads)) {}

 private:
  /// The probabilities of this pass count once the next one comes, for until then it can be taken back.
  void observe_prompt(const CacheCall& call, std::span<const float> lse, const PlanContext& context) override {
    settle();
    const LayerCacheShape& layer = shape();
    std::vector<std::vector<float>> columns(static_cast<std::size_t>(layer.q_heads));
    parallel_for(layer.q_heads, context.run.threads, [&](std::int64_t q_head, int) {
      std::vector<float>& sums = columns[static_cast<std::size_t>(q_head)];
      sums.assign(static_cast<std::size_t>(size_of_head(q_head / layer.group())), 0.0F);
      add_probabilities(call.q, lse, q_head, sums);
    });
    for (std::int64_t q_head = 0; q_head < layer.q_heads; ++q_head) {
      std::vector<float>& pending = pending_[static_cast<std::size_t>(q_head / layer.group())];
      const std::vector<float>& sums = columns[static_cast<std::size_t>(q_head)];
      pending.resize(sums.size());
      for (std::size_t j = 0; j < sums.size(); ++j) pending[j] += sums[j];
    }
  }

  void settle() {
    for (std::size_t head = 0; head < scores_.size(); ++head) {
      scores_[head].resize(std::max(scores_[head].size(), pending_[head].size()));
      for (std::size_t j = 0; j < pending_[head].size(); ++j) scores_[head][j] += pending_[head][j];
      std::vector<float>().swap(pending_[head]);
    }
  }

  bool evicts() const override { return true; }

  KeptSlots choose(const PlanContext&) override {
    settle();
    const auto share = [&](double ratio) {
      return static_cast<std::int64_t>(std::floor(ratio * static_cast<double>(tokens())));
    };
    heavy_ = params_.heavy >= 0 ? params_.heavy : share(params_.heavy_ratio);
    recent_ = std::max<std::int64_t>(1, params_.recent >= 0 ? params_.recent : share(params_.recent_ratio));
    KeptSlots kept;
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) kept.push_back(choose_for_head(head));
    return kept;
  }

  std::vector<std::int32_t> choose_for_head(std::int64_t head) const {
    const std::vector<std::int32_t> slots = slots_by_position(head);
    const std::int64_t others = std::max<std::int64_t>(0, std::ssize(slots) - recent_);
    std::vector<float> scores;
    for (std::int64_t i = 0; i < others; ++i) {
      scores.push_back(scores_[static_cast<std::size_t>(head)][static_cast<std::size_t>(slots[i])]);
    }
    std::vector<std::int32_t> kept;
    for (const std::int32_t i : score::top_k(scores, heavy_)) kept.push_back(slots[static_cast<std::size_t>(i)]);
    kept.insert(kept.end(), slots.begin() + others, slots.end());
    return kept;
  }

  void evicted(const KeptSlots& kept) override {
    for (std::size_t head = 0; head < kept.size(); ++head) {
      std::vector<float> scores;
      for (const std::int32_t slot : kept[head]) scores.push_back(scores_[head][static_cast<std::size_t>(slot)]);
      scores_[head] = std::move(scores);
    }
  }

  void observe_decode(const CacheCall& call, std::span<const float> lse, const PlanContext& context) override {
    const std::int64_t group = shape().group();
    parallel_for(shape().kv_heads, context.run.threads, [&](std::int64_t head, int) {
      std::vector<float>& scores = scores_[static_cast<std::size_t>(head)];
      scores.resize(static_cast<std::size_t>(size_of_head(head)));
      for (std::int64_t g = 0; g < group; ++g) add_probabilities(call.q, lse, head * group + g, scores);
    });
    // Pages are shared between the heads: one after the other.
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      while (size_of_head(head) > heavy_ + recent_) evict_worst(head);
    }
  }

  /// Adds the probabilities of the newest rows of one query head; `lse` [q_heads][rows], or empty: found in a pass
  /// more.
  void add_probabilities(const TensorView& q, std::span<const float> lse, std::int64_t q_head,
                         std::vector<float>& sums) const {
    const std::int64_t group = shape().group();
    const std::int64_t head = q_head / group;
    const std::int64_t rows = q.tokens();
    AttentionInputs inputs = inputs_of_head(head);
    inputs.q = queries_of_kv_head(q, group, head);
    std::vector<std::int64_t> visible(static_cast<std::size_t>(rows));
    std::iota(visible.begin(), visible.end(), size_of_head(head) - rows + 1);
    score::ProbeBuffers buffers;
    score::probe_columns(problem_of_head(head, rows), inputs, 0, q_head % group, visible,
                         lse.empty() ? lse : lse.subspan(static_cast<std::size_t>(q_head * rows), visible.size()), sums,
                         buffers);
  }

  /// The lowest score of the tokens that are not recent; among equals the latest, and undefined scores last.
  void evict_worst(std::int64_t head) {
    std::vector<float>& scores = scores_[static_cast<std::size_t>(head)];
    std::int64_t worst = -1;
    for (std::int64_t slot = 0; slot < size_of_head(head); ++slot) {
      const std::int64_t position = position_of(head, slot);
      if (position >= tokens() - recent_) continue;
      if (worst < 0) {
        worst = slot;
        continue;
      }
      const float a = scores[static_cast<std::size_t>(slot)];
      const float b = scores[static_cast<std::size_t>(worst)];
      const bool lower = a < b || (b != b && a == a);
      const bool same = a == b || (a != a && b != b);
      if (lower || (same && position > position_of(head, worst))) worst = slot;
    }
    scores[static_cast<std::size_t>(worst)] = scores.back();
    scores.pop_back();
    evict_slot(head, worst);
  }

  void truncated(std::int64_t tokens) override {
    for (std::size_t head = 0; head < scores_.size(); ++head) {
      std::vector<float>().swap(pending_[head]);
      if (tokens == 0) std::vector<float>().swap(scores_[head]);
      scores_[head].resize(
          std::min(scores_[head].size(), static_cast<std::size_t>(size_of_head(static_cast<std::int64_t>(head)))));
    }
  }

  std::size_t bytes_of_notes() const override {
    std::size_t floats = 0;
    for (const std::vector<float>& scores : scores_) floats += scores.capacity();
    for (const std::vector<float>& pending : pending_) floats += pending.capacity();
    return floats * sizeof(float);
  }

  H2OParams params_;
  std::int64_t heavy_ = 0;
  std::int64_t recent_ = 0;
  std::vector<std::vector<float>> scores_;   ///< [kv_heads][slots]
  std::vector<std::vector<float>> pending_;  ///< [kv_heads][slots]: of the last pass of the prompt
};

struct H2O {
  using Params = H2OParams;
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "h2o",
            .family = "decode",
            .summary = "keeps heavy hitters by accumulated probability plus recent tokens, one eviction per step",
            .paper =
                "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, "
                "arXiv:2306.14048",
            .phases = {.prefill = true, .decode = true},
            .budget = {{"heavy_ratio", 0, 1}}};
  }

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext&) const {
    return std::make_unique<H2OCache>(params, shape);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(h2o, tessera::H2O);
