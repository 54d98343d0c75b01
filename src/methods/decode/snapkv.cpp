// Prompt compression by what the end of the prompt attends to.
//
// SnapKV (SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469). When the prompt of N tokens
// is in and N >= capacity C: the last w queries attend to all keys, A = softmax(q.k / sqrt D), causal within the
// window; key j < N - w gets a_j = sum of A over these queries, per query head; the votes are smoothed along j by a
// pool of odd size (stride 1, same padding); each kv head keeps the C - w best keys and the whole window. Decoding
// appends, and nothing more is evicted. A further prompt attends to what is kept and is compressed with it.
//
// Differs from the authors' code: keys are kept once per kv head, not once per query head. The query heads of a group
// vote together (vote = mean, as kvpress does: of the pooled scores; or max), or each keeps its own choice and the kv
// head holds the union (vote = union), which is what the authors' expanded heads keep. Kept keys stay in the order of
// the text with their true positions; the authors store them in the order of their scores.
//
// plan() is dense: the prompt runs dense unless another prefill method is named, and eviction is the cache's affair.
#include <algorithm>
#include <limits>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/evicting_cache.h"
#include "methods/prompt_window.h"
#include "methods/registry.h"
#include "score/row_probe.h"
#include "score/top_k.h"

namespace tessera {
namespace {

enum class Pooling : std::uint8_t { avg, max };
enum class Vote : std::uint8_t { mean, max, unite };

struct SnapKVParams {
  std::int64_t capacity = 2048;
  std::int64_t window = 32;
  std::int64_t kernel = 5;
  Pooling pooling = Pooling::avg;
  Vote vote = Vote::mean;
  void visit(ParameterList& v) {
    v("capacity", capacity, 2, kMostTokens, "tokens that a kv head keeps of the prompt, the window included");
    v("window", window, 1, 4096, "last queries of the prompt: they vote, and their tokens are kept");
    v("kernel", kernel, 1, 4095, "size of the pool that smooths the votes; odd");
    v("pooling", pooling, {"avg", "max"}, "kind of the pool");
    v("vote", vote, {"mean", "max", "union"},
      "query heads of a group: mean or maximum of their votes, or the union of what each would keep");
  }
};

/// Stride 1, same padding; the average counts places beyond the ends as zeros, as the authors' pool does.
void pool(std::span<const float> in, std::int64_t kernel, Pooling kind, std::vector<float>& out) {
  const auto count = static_cast<std::int64_t>(in.size());
  const std::int64_t reach = kernel / 2;
  out.resize(in.size());
  for (std::int64_t j = 0; j < count; ++j) {
    const std::int64_t end = std::min(count, j + reach + 1);
    float sum = 0;
    float largest = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = std::max<std::int64_t>(0, j - reach); i < end; ++i) {
      sum += in[static_cast<std::size_t>(i)];
      largest = in[static_cast<std::size_t>(i)] > largest ? in[static_cast<std::size_t>(i)] : largest;
    }
    // The sum of a pool with a NaN is NaN, and so is its maximum: an undefined vote is kept.
    out[static_cast<std::size_t>(j)] = kind == Pooling::avg || sum != sum ? sum / static_cast<float>(kernel) : largest;
  }
}

class SnapKVCache final : public EvictingCache {
 public:
  SnapKVCache(const SnapKVParams& params, const LayerCacheShape& shape)
      : EvictingCache(shape), params_(params), window_(params.window, shape) {}

 private:
  void observe_prompt(const CacheCall& call, std::span<const float>, const PlanContext&) override {
    window_.observe(call.q, tokens());
  }

  bool evicts() const override {
    std::int64_t longest = 0;
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) longest = std::max(longest, size_of_head(head));
    return longest >= params_.capacity;
  }

  KeptSlots choose(const PlanContext& context) override {
    const LayerCacheShape& layer = shape();
    const std::int64_t group = layer.group();
    const std::int64_t rows = window_.rows(tokens());  // those seen without a gap vote
    const TensorView queries = window_.last(rows);
    std::vector<std::vector<float>> votes(static_cast<std::size_t>(layer.q_heads));
    parallel_for(layer.q_heads, context.run.threads, [&](std::int64_t q_head, int) {
      const std::int64_t head = q_head / group;
      const std::int64_t before = size_of_head(head) - params_.window;
      if (before <= 0) return;
      AttentionInputs inputs = inputs_of_head(head);
      inputs.q = queries_of_kv_head(queries, group, head);
      score::LineScores lines;
      score::ProbeBuffers buffers;
      score::probe_rows(problem_of_head(head, rows), inputs, 0, q_head % group, 0, rows, false, lines, buffers);
      pool(std::span(lines.columns).first(static_cast<std::size_t>(before)), params_.kernel, params_.pooling,
           votes[static_cast<std::size_t>(q_head)]);
    });
    KeptSlots kept(static_cast<std::size_t>(layer.kv_heads));
    for (std::int64_t head = 0; head < layer.kv_heads; ++head) {
      kept[static_cast<std::size_t>(head)] = choose_for_head(
          std::span(votes).subspan(static_cast<std::size_t>(head * group), static_cast<std::size_t>(group)),
          size_of_head(head));
    }
    return kept;
  }

  std::vector<std::int32_t> choose_for_head(std::span<const std::vector<float>> votes, std::int64_t size) const {
    const std::int64_t before = std::max<std::int64_t>(0, size - params_.window);
    const std::int64_t budget = params_.capacity - params_.window;
    std::vector<std::int32_t> slots;
    if (params_.vote == Vote::unite) {
      std::vector<std::uint8_t> chosen(static_cast<std::size_t>(before));
      for (const std::vector<float>& own : votes) {
        for (const std::int32_t slot : score::top_k(own, budget)) chosen[static_cast<std::size_t>(slot)] = 1;
      }
      for (std::size_t slot = 0; slot < chosen.size(); ++slot) {
        if (chosen[slot] != 0) slots.push_back(static_cast<std::int32_t>(slot));
      }
    } else {
      std::vector<float> joint = votes[0];
      for (const std::vector<float>& own : votes.subspan(1)) {
        for (std::size_t j = 0; j < joint.size(); ++j) {
          const bool larger = own[j] > joint[j] || own[j] != own[j];
          joint[j] = params_.vote == Vote::mean ? joint[j] + own[j] : (larger ? own[j] : joint[j]);
        }
      }
      slots = score::top_k(joint, budget);
    }
    for (std::int64_t slot = before; slot < size; ++slot) slots.push_back(static_cast<std::int32_t>(slot));
    return slots;
  }

  void evicted(const KeptSlots&) override { window_.clear(); }
  void truncated(std::int64_t tokens) override { window_.truncate(tokens); }
  std::size_t bytes_of_notes() const override { return window_.memory_bytes(); }

  SnapKVParams params_;
  PromptWindow window_;
};

struct SnapKV {
  using Params = SnapKVParams;
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "snapkv",
            .family = "decode",
            .summary = "compresses the prompt once to the keys that its last queries attend to, smoothed",
            .paper = "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469",
            .phases = {.prefill = true, .decode = true},
            .budget = {{"capacity", 64, 1 << 20, true}}};
  }

  explicit SnapKV(Params given) : params(given) {
    require(params.capacity > params.window, "snapkv: capacity={} is not larger than window={}", params.capacity,
            params.window);
    require(params.kernel % 2 == 1, "snapkv: kernel={} is even; expected an odd number", params.kernel);
  }

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext&) const {
    return std::make_unique<SnapKVCache>(params, shape);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(snapkv, tessera::SnapKV);
