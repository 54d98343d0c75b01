// Retrieval heads keep every token; the others keep sinks, a buffer, and one token that stands for all the rest.
//
// RazorAttention (RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv:2407.15891). A file
// says for every layer and kv head whether it is a retrieval head; those are dense. When a prompt of N tokens is in,
// another head keeps the first N0 = `sink` tokens and the last L = max(S0, N / C); the N_d tokens between become one
// compensation token, k^ = mean of their keys (after RoPE) and v^ = mean of their values, which enters the softmax N_d
// times: its logit gets log N_d. While decoding, a token that leaves the buffer joins the mean.
//
// Differs from the paper: the rule for tokens that leave while decoding is ours (the paper has none), and the mean is
// kept as a sum in float64, rounded to the cache's type when it is read. There is no public code; the defaults of S0, C
// and N0 are as reported. A further prompt attends to what is kept and sets L anew. The search for the heads (echo and
// induction scores) is src/tune/head_probe.h. Without a file all heads are retrieval heads.
//
// plan() is dense: the prompt runs dense unless another prefill method is named.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/convert.h"
#include "core/error.h"
#include "kernels/key_rows.h"
#include "methods/evicting_cache.h"
#include "methods/head_classes.h"
#include "methods/registry.h"

namespace tessera {
namespace {

struct RazorParams {
  Configuration heads;
  std::int64_t sink = 4;
  std::int64_t least = 4000;
  double divisor = 5;
  double threshold = 0.5;
  double sparsity = -1;
  void visit(ParameterList& v) {
    v("heads", heads,
      "JSON {\"retrieval\": [[gate of each kv head] per layer]} or {\"heads\": table}; none: all are retrieval heads");
    v("sink", sink, 0, kMostTokens, "N0: first tokens that other heads keep");
    v("least", least, 1, kMostTokens, "S0: least tokens of their buffer of last tokens");
    v("divisor", divisor, 1, 1e9, "C: the buffer holds at least the prompt's length divided by this");
    v("threshold", threshold, 0, 1, "least gate of a retrieval head");
    v("sparsity", sparsity, -1, 1, "share of all heads that are none, those of the lowest gates; -1: by threshold");
  }
};

class RazorCache final : public EvictingCache {
 public:
  RazorCache(const RazorParams& params, const LayerCacheShape& shape, std::vector<bool> retrieval)
      : EvictingCache(shape), params_(params), retrieval_(std::move(retrieval)) {
    forget_dropped();
  }

 private:
  bool is_retrieval(std::int64_t head) const { return retrieval_[static_cast<std::size_t>(head)]; }

  bool evicts() const override { return true; }

  KeptSlots choose(const PlanContext&) override {
    buffer_ =
        std::max(params_.least, static_cast<std::int64_t>(std::floor(static_cast<double>(tokens()) / params_.divisor)));
    KeptSlots kept;
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      std::vector<std::int32_t> slots = slots_by_position(head);
      if (!is_retrieval(head) && std::ssize(slots) > params_.sink + buffer_) {
        // What is about to be dropped joins the mean.
        for (std::int64_t i = params_.sink; i < std::ssize(slots) - buffer_; ++i) {
          fold(head, slots[static_cast<std::size_t>(i)]);
        }
        slots.erase(slots.begin() + params_.sink, slots.end() - buffer_);
      }
      kept.push_back(std::move(slots));
    }
    write_stand_in();
    return kept;
  }

  void observe_decode(const CacheCall&, std::span<const float>, const PlanContext&) override {
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      while (!is_retrieval(head) && size_of_head(head) > params_.sink + buffer_) {
        const std::int64_t slot = oldest_of_buffer(head);
        fold(head, slot);
        evict_slot(head, slot);
      }
    }
    write_stand_in();
  }

  std::int64_t oldest_of_buffer(std::int64_t head) const {
    std::int64_t oldest = -1;
    for (std::int64_t slot = 0; slot < size_of_head(head); ++slot) {
      if (position_of(head, slot) < params_.sink) continue;
      if (oldest < 0 || position_of(head, slot) < position_of(head, oldest)) oldest = slot;
    }
    return oldest;
  }

  /// Adds a row to the sums of what its head dropped.
  void fold(std::int64_t head, std::int64_t slot) {
    const LayerCacheShape& layer = shape();
    const AttentionInputs inputs = inputs_of_head(head);
    const Problem problem = problem_of_head(head, 0);
    std::vector<float> row(static_cast<std::size_t>(std::max(layer.head_dim, layer.value_dim)));
    const auto add = [&](const TensorView& view, std::int64_t dim, std::vector<double>& sums) {
      to_float(kernels::key_rows_of(problem, view, inputs.pages, 0, 0).row(slot), view.dtype, dim, row.data());
      for (std::int64_t d = 0; d < dim; ++d) {
        sums[static_cast<std::size_t>(head * dim + d)] += static_cast<double>(row[static_cast<std::size_t>(d)]);
      }
    };
    add(inputs.k, layer.head_dim, key_sums_);
    add(inputs.v, layer.value_dim, value_sums_);
    dropped_[static_cast<std::size_t>(head)] += 1;
  }

  void write_stand_in() {
    const LayerCacheShape& layer = shape();
    const auto write = [&](const std::vector<double>& sums, std::int64_t dim, std::vector<std::byte>& bytes) {
      bytes.resize(sums.size() * size_of(layer.dtype));
      std::vector<float> mean(sums.size());
      for (std::size_t i = 0; i < sums.size(); ++i) {
        const auto count = static_cast<double>(dropped_[i / static_cast<std::size_t>(dim)]);
        mean[i] = count == 0 ? 0.0F : static_cast<float>(sums[i] / count);
      }
      from_float(mean.data(), std::ssize(mean), layer.dtype, bytes.data());
      return view_of(bytes.data(), layer.dtype, {layer.kv_heads, 1, 1, dim});
    };
    stand_in_.k = write(key_sums_, layer.head_dim, key_bytes_);
    stand_in_.v = write(value_sums_, layer.value_dim, value_bytes_);
    for (std::size_t head = 0; head < dropped_.size(); ++head) {
      // -inf, for which there is no entry in the plan, while nothing was dropped.
      log_counts_[head] = std::log(static_cast<float>(dropped_[head]));
    }
    stand_in_.log_weight = log_counts_;
    any_dropped_ = std::any_of(dropped_.begin(), dropped_.end(), [](std::int64_t count) { return count > 0; });
  }

  const KeySource* stand_in() const override { return any_dropped_ ? &stand_in_ : nullptr; }

  void truncated(std::int64_t tokens) override {
    if (tokens == 0) forget_dropped();
  }

  std::size_t bytes_of_notes() const override {
    return any_dropped_ ? (key_sums_.size() + value_sums_.size()) * sizeof(double) + key_bytes_.size() +
                              value_bytes_.size() + dropped_.size() * (sizeof(std::int64_t) + sizeof(float))
                        : 0;
  }

  void forget_dropped() {
    const auto heads = static_cast<std::size_t>(shape().kv_heads);
    key_sums_.assign(heads * static_cast<std::size_t>(shape().head_dim), 0.0);
    value_sums_.assign(heads * static_cast<std::size_t>(shape().value_dim), 0.0);
    dropped_.assign(heads, 0);
    log_counts_.assign(heads, -std::numeric_limits<float>::infinity());
    any_dropped_ = false;
  }

  RazorParams params_;
  std::vector<bool> retrieval_;        ///< [kv_heads]
  std::int64_t buffer_ = 0;            ///< L
  std::vector<double> key_sums_;       ///< [kv_heads][head_dim], of the dropped tokens
  std::vector<double> value_sums_;     ///< [kv_heads][value_dim]
  std::vector<std::int64_t> dropped_;  ///< N_d of each kv head
  std::vector<float> log_counts_;
  std::vector<std::byte> key_bytes_;
  std::vector<std::byte> value_bytes_;
  KeySource stand_in_;
  bool any_dropped_ = false;
};

class Razor {
 public:
  using Params = RazorParams;
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "razor",
            .family = "decode",
            .summary = "full cache for retrieval heads; sinks, a buffer and a compensation token for the others",
            .paper = "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv:2407.15891",
            .phases = {.prefill = true, .decode = true},
            .budget = {{"sparsity", 1, 0}}};
  }

  explicit Razor(const Params& params) : params_(params) {
    require(params.sparsity >= 0 || params.sparsity == -1, "razor: sparsity={} is neither -1 nor in [0, 1]",
            params.sparsity);
    if (!params.heads.empty()) {
      retrieval_ = read_head_classes(params.heads).retrieval(params.threshold, params.sparsity);
    }
  }

  void check_model(std::int64_t layers, std::int64_t, std::int64_t kv_heads) const {
    if (retrieval_.empty()) return;
    require(std::ssize(retrieval_) == layers && std::ssize(retrieval_[0]) == kv_heads,
            "head classes '{}' are for {} layers of {} kv heads; the model has {} of {}", params_.heads.name(),
            retrieval_.size(), retrieval_[0].size(), layers, kv_heads);
  }

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext& context) const {
    if (retrieval_.empty()) return nullptr;
    check_model(context.layers, shape.q_heads, shape.kv_heads);
    const std::vector<bool>& heads = retrieval_[static_cast<std::size_t>(context.layer)];
    if (std::find(heads.begin(), heads.end(), false) == heads.end()) return nullptr;
    return std::make_unique<RazorCache>(params_, shape, heads);
  }

 private:
  Params params_;
  std::vector<std::vector<bool>> retrieval_;  ///< [layer][kv head]; empty: all
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(razor, tessera::Razor);
