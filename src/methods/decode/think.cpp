// ThinK (ThinK: Thinner Key Cache by Query-Driven Pruning, arXiv:2407.21018): keys of the prompt lose channels.
//
// When the prompt is in, channel d of kv head h scores mean over the last w queries (and over the query heads of the
// group) of q_d^2, times mean over the keys of k_d^2: up to a constant the squared Frobenius norm of what the channel
// adds to the window's scores. The floor(ratio * D) lowest channels of each kv head are dropped from the prompt's keys,
// except the last `recent` tokens; those and all later tokens keep every channel. Scores of pruned keys are products
// over the channels that are left, still divided by sqrt(D); pruned and whole keys share one softmax; values stay.
//
// Differs from the authors' code: the query factor is averaged over the group (their code repeats the keys per query
// head), and the pruned keys are stored narrow and multiplied so, not filled up with zeros. Norms are those of rotated
// keys, and pairs of a rotation may be split. The mask of the first prompt stays for the whole sequence.
//
// plan() is dense: every token is attended to, only its key is narrower.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/convert.h"
#include "methods/compressing_cache.h"
#include "methods/prompt_window.h"
#include "methods/registry.h"

namespace tessera {
namespace {

struct ThinKParams {
  double ratio = 0.4;
  std::int64_t window = 32;
  std::int64_t recent = 32;
  void visit(ParameterList& v) {
    v("ratio", ratio, 0, 0.99, "share of the key channels that the prompt loses");
    v("window", window, 1, 4096, "last queries of the prompt, which judge the channels");
    v("recent", recent, 0, kMostTokens, "last tokens of the prompt that keep every channel");
  }
};

class ThinKCache final : public CompressingCache {
 public:
  ThinKCache(const ThinKParams& params, const LayerCacheShape& shape)
      : CompressingCache(shape),
        params_(params),
        dropped_(static_cast<std::int64_t>(params.ratio * static_cast<double>(shape.head_dim))),
        narrow_(narrow_shape()),
        window_(params.window, shape) {}

 private:
  std::int64_t kept_channels() const { return shape().head_dim - dropped_; }
  LayerCacheShape narrow_shape() const {
    LayerCacheShape narrow = shape();
    narrow.head_dim = kept_channels();
    return narrow;
  }

  void observe_pass(const CacheCall& call, std::span<const float>, const PlanContext&) override {
    if (call.prompt && whole()) window_.observe(call.q, tokens());
  }

  /// Only the first prompt is pruned, and only once.
  std::int64_t due(std::int64_t whole_tokens, bool prompt_ended) const override {
    return prompt_ended && whole() && dropped_ > 0 ? whole_tokens - params_.recent : 0;
  }

  void compress(const WholeRows& rows, std::int64_t count, const PlanContext&) override {
    const LayerCacheShape& layer = shape();
    std::vector<float> key(static_cast<std::size_t>(layer.head_dim));
    std::vector<float> value(static_cast<std::size_t>(layer.value_dim));
    std::vector<float> narrow(static_cast<std::size_t>(kept_channels()));
    for (std::int64_t head = 0; head < layer.kv_heads; ++head) {
      const kernels::KeyRows& keys = rows.keys[static_cast<std::size_t>(head)];
      channels_.push_back(choose_channels(head, keys));
      const std::vector<std::int32_t>& kept = channels_.back();
      for (std::int64_t token = 0; token < count; ++token) {
        to_float(keys.row(token), layer.dtype, layer.head_dim, key.data());
        to_float(rows.values[static_cast<std::size_t>(head)].row(token), layer.dtype, layer.value_dim, value.data());
        for (std::size_t d = 0; d < kept.size(); ++d) narrow[d] = key[static_cast<std::size_t>(kept[d])];
        narrow_.append(head, token, narrow.data(), value.data());
      }
    }
    window_.clear();
  }

  void truncated(std::int64_t tokens) override {
    window_.truncate(tokens);
    if (tokens > 0) return;
    narrow_.reset();
    window_.clear();
    channels_.clear();
  }

  std::size_t bytes_of_compressed() const override { return narrow_.memory_bytes() + window_.memory_bytes(); }

  /// The channels that a kv head keeps, ascending.
  std::vector<std::int32_t> choose_channels(std::int64_t head, const kernels::KeyRows& keys) const {
    const auto dim = static_cast<std::size_t>(shape().head_dim);
    const std::int64_t rows = window_.rows(tokens());
    const TensorView queries = window_.last(rows);
    std::vector<double> query_squares(dim, rows == 0 ? 1.0 : 0.0);
    std::vector<double> key_squares(dim, 0.0);
    for (std::int64_t q_head = head * shape().group(); q_head < (head + 1) * shape().group(); ++q_head) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const auto* q = reinterpret_cast<const float*>(queries.row(0, q_head, r));
        for (std::size_t d = 0; d < dim; ++d) query_squares[d] += static_cast<double>(q[d]) * q[d];
      }
    }
    std::vector<float> key(dim);
    for (std::int64_t token = 0; token < tokens(); ++token) {
      to_float(keys.row(token), shape().dtype, shape().head_dim, key.data());
      for (std::size_t d = 0; d < dim; ++d) key_squares[d] += static_cast<double>(key[d]) * key[d];
    }
    std::vector<std::int32_t> order(dim);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      const auto i = static_cast<std::size_t>(a);
      const auto j = static_cast<std::size_t>(b);
      return query_squares[i] * key_squares[i] > query_squares[j] * key_squares[j];
    });
    order.resize(static_cast<std::size_t>(kept_channels()));
    std::sort(order.begin(), order.end());
    return order;
  }

  void attend_compressed(const TensorView& q, Branch& out, const PlanContext& context) override {
    const float scale = 1 / std::sqrt(static_cast<float>(shape().head_dim));
    attend_all_rows(narrow_, narrow_queries(q), scale, out, context.run);
  }

  /// The channels of each kv head, gathered once per step: [kv_heads, group, rows, kept channels].
  TensorView narrow_queries(const TensorView& q) {
    const std::int64_t rows = q.tokens();
    const std::int64_t width = kept_channels();
    queries_.resize(static_cast<std::size_t>(shape().q_heads * rows * width));
    std::vector<float> whole(static_cast<std::size_t>(shape().head_dim));
    for (std::int64_t head = 0; head < shape().q_heads; ++head) {
      const std::vector<std::int32_t>& kept = channels_[static_cast<std::size_t>(head / shape().group())];
      for (std::int64_t r = 0; r < rows; ++r) {
        to_float(q.row(0, head, r), q.dtype, shape().head_dim, whole.data());
        float* out = queries_.data() + (head * rows + r) * width;
        for (std::int64_t d = 0; d < width; ++d) {
          out[d] = whole[static_cast<std::size_t>(kept[static_cast<std::size_t>(d)])];
        }
      }
    }
    return view_of(queries_.data(), DType::f32, {shape().kv_heads, shape().group(), rows, width});
  }

  ThinKParams params_;
  std::int64_t dropped_;
  HeadPages narrow_;  ///< the first prompt but its end, with the channels that are left
  PromptWindow window_;
  std::vector<std::vector<std::int32_t>> channels_;  ///< per kv head
  std::vector<float> queries_;                       ///< of the last call, narrow
};

struct ThinK {
  using Params = ThinKParams;
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "think",
            .family = "decode",
            .summary = "drops the key channels of the prompt that its last queries make least of",
            .paper = "ThinK: Thinner Key Cache by Query-Driven Pruning, arXiv:2407.21018",
            .phases = {.prefill = true, .decode = true},
            .budget = {{"ratio", 0.9, 0}}};
  }

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext&) const {
    return std::make_unique<ThinKCache>(params, shape);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(think, tessera::ThinK);
