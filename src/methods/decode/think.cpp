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

#include "cache/head_pages.h"
#include "core/convert.h"
#include "core/error.h"
#include "kernels/key_rows.h"
#include "methods/branch_merge.h"
#include "methods/paged_layer_cache.h"
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

/// Rows of a [1, heads, rows, dim] tensor with the kv heads as batch: [kv_heads, group, rows, dim].
template <class View>
View heads_as_batch(const View& view, std::int64_t kv_heads) {
  View batch = view;
  const std::int64_t group = view.shape[1] / kv_heads;
  batch.shape[0] = kv_heads;
  batch.shape[1] = group;
  batch.strides[0] = group * view.strides[1];
  return batch;
}

class ThinKCache final : public LayerCache {
 public:
  ThinKCache(const ThinKParams& params, const LayerCacheShape& shape)
      : params_(params),
        shape_(shape),
        dropped_(static_cast<std::int64_t>(params.ratio * static_cast<double>(shape.head_dim))),
        prompt_(shape),
        narrow_(narrow_shape()),
        whole_(shape),
        window_(params.window, shape) {}

  void append(std::int64_t count, const float* keys, const float* values, int threads) override {
    if (!pruned_) {
      prompt_.append(count, keys, values, threads);
    } else {
      for (std::int64_t token = 0; token < count; ++token) {
        for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
          const std::int64_t row = token * shape_.kv_heads + head;
          whole_.append(head, tokens_ + token, keys + row * shape_.head_dim, values + row * shape_.value_dim);
        }
      }
    }
    tokens_ += count;
  }

  RunReport attend(const CacheCall& call, const PlanContext& context) override {
    RunReport report;
    if (!pruned_) {
      report = call.prompt ? prompt_.attend(call, context) : attend_unpruned(call, context);
    } else {
      report = attend_both(call, context);
    }
    if (call.prompt && !pruned_) window_.observe(call.q, tokens_);
    return report;
  }

  void finish_prefill(const PlanContext&) override {
    const std::int64_t pruned_rows = tokens_ - params_.recent;
    if (pruned_ || dropped_ == 0 || pruned_rows <= 0) return;
    const AttentionInputs all = prompt_.inputs();
    const Problem problem = cache_problem(shape_, 0, tokens_);
    std::vector<float> row(static_cast<std::size_t>(shape_.head_dim));
    std::vector<float> value(static_cast<std::size_t>(shape_.value_dim));
    std::vector<float> kept_row(static_cast<std::size_t>(kept_channels()));
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      const auto keys = kernels::key_rows_of(problem, all.k, all.pages, 0, head);
      const auto values = kernels::key_rows_of(problem, all.v, all.pages, 0, head);
      channels_.push_back(choose_channels(head, keys));
      const std::vector<std::int32_t>& kept = channels_.back();
      for (std::int64_t token = 0; token < tokens_; ++token) {
        if (token >= pruned_rows) {
          whole_.append_stored(head, token, keys.row(token), values.row(token));
          continue;
        }
        to_float(keys.row(token), shape_.dtype, shape_.head_dim, row.data());
        to_float(values.row(token), shape_.dtype, shape_.value_dim, value.data());
        for (std::size_t d = 0; d < kept.size(); ++d) kept_row[d] = row[static_cast<std::size_t>(kept[d])];
        narrow_.append(head, token, kept_row.data(), value.data());
      }
    }
    prompt_.reset();
    window_.clear();
    pruned_ = true;
    settled_ = tokens_;
  }

  bool truncate(std::int64_t tokens) override {
    if (tokens >= tokens_) return true;
    if (tokens < settled_) return false;
    if (!pruned_) {
      prompt_.truncate(tokens);
      window_.truncate(tokens);
    } else {
      std::vector<std::int32_t> slots(static_cast<std::size_t>(whole_.size(0) - (tokens_ - tokens)));
      std::iota(slots.begin(), slots.end(), 0);
      for (std::int64_t head = 0; head < shape_.kv_heads; ++head) whole_.keep(head, slots);
    }
    tokens_ = tokens;
    return true;
  }

  void reset() override {
    prompt_.reset();
    narrow_.reset();
    whole_.reset();
    window_.clear();
    channels_.clear();
    pruned_ = false;
    tokens_ = settled_ = 0;
  }

  std::int64_t tokens() const override { return tokens_; }
  std::int64_t rows_kept() const override { return tokens_ * shape_.kv_heads; }
  std::size_t memory_bytes() const override {
    return prompt_.memory_bytes() + narrow_.memory_bytes() + whole_.memory_bytes() + window_.memory_bytes();
  }

 private:
  std::int64_t kept_channels() const { return shape_.head_dim - dropped_; }
  LayerCacheShape narrow_shape() const {
    LayerCacheShape shape = shape_;
    shape.head_dim = kept_channels();
    return shape;
  }

  /// The channels that a kv head keeps, ascending.
  std::vector<std::int32_t> choose_channels(std::int64_t head, const kernels::KeyRows& keys) const {
    const auto dim = static_cast<std::size_t>(shape_.head_dim);
    const std::int64_t rows = window_.rows(tokens_);
    const TensorView queries = window_.last(rows);
    std::vector<double> query_squares(dim, rows == 0 ? 1.0 : 0.0);
    std::vector<double> key_squares(dim, 0.0);
    for (std::int64_t q_head = head * shape_.group(); q_head < (head + 1) * shape_.group(); ++q_head) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const auto* q = reinterpret_cast<const float*>(queries.row(0, q_head, r));
        for (std::size_t d = 0; d < dim; ++d) query_squares[d] += static_cast<double>(q[d]) * q[d];
      }
    }
    std::vector<float> key(dim);
    for (std::int64_t token = 0; token < tokens_; ++token) {
      to_float(keys.row(token), shape_.dtype, shape_.head_dim, key.data());
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

  RunReport attend_unpruned(const CacheCall& call, const PlanContext& context) const {
    Plan plan = dense_plan(cache_problem(shape_, call.q.tokens(), tokens_));
    AttentionInputs inputs = prompt_.inputs();
    inputs.q = call.q;
    const RunReport report = run(plan, inputs, call.outputs, context.run);
    if (call.executed != nullptr) *call.executed = std::move(plan);
    return report;
  }

  /// Pruned keys and whole keys as two passes, merged by LSE.
  RunReport attend_both(const CacheCall& call, const PlanContext& context) {
    const std::int64_t rows = call.q.tokens();
    Branch narrow(shape_.q_heads * rows, shape_.value_dim);
    Branch whole(shape_.q_heads * rows, shape_.value_dim);
    const std::array<std::int64_t, 4> shape{shape_.kv_heads, shape_.group(), rows, shape_.value_dim};
    RunReport report = run_pages(narrow_, narrow_queries(call.q), false,
                                 {mutable_view_of(narrow.o.data(), DType::f32, shape), narrow.lse}, context);
    const RunReport second = run_pages(whole_, heads_as_batch(call.q, shape_.kv_heads), true,
                                       {mutable_view_of(whole.o.data(), DType::f32, shape), whole.lse}, context);
    report.kernel_ms += second.kernel_ms;
    merge_branches(narrow, whole, call.outputs);
    if (call.executed != nullptr) *call.executed = dense_plan(cache_problem(shape_, rows, tokens_));
    return report;
  }

  /// The channels of each kv head, gathered once per step: [kv_heads, group, rows, kept channels].
  TensorView narrow_queries(const TensorView& q) {
    const std::int64_t rows = q.tokens();
    const std::int64_t width = kept_channels();
    queries_.resize(static_cast<std::size_t>(shape_.q_heads * rows * width));
    std::vector<float> whole(static_cast<std::size_t>(shape_.head_dim));
    for (std::int64_t head = 0; head < shape_.q_heads; ++head) {
      const std::vector<std::int32_t>& kept = channels_[static_cast<std::size_t>(head / shape_.group())];
      for (std::int64_t r = 0; r < rows; ++r) {
        to_float(q.row(0, head, r), q.dtype, shape_.head_dim, whole.data());
        float* out = queries_.data() + (head * rows + r) * width;
        for (std::int64_t d = 0; d < width; ++d) {
          out[d] = whole[static_cast<std::size_t>(kept[static_cast<std::size_t>(d)])];
        }
      }
    }
    return view_of(queries_.data(), DType::f32, {shape_.kv_heads, shape_.group(), rows, width});
  }

  /// Queries [kv_heads, group, rows, dim] over the rows of every head; `causal`: the last rows are the queries' own.
  RunReport run_pages(const HeadPages& pages, const TensorView& queries, bool causal, const AttentionOutputs& outputs,
                      const PlanContext& context) const {
    AttentionInputs inputs = pages.inputs();
    inputs.q = queries;
    Problem problem;
    problem.batch = shape_.kv_heads;
    problem.q_heads = shape_.group();
    problem.kv_heads = 1;
    problem.q_len = queries.tokens();
    problem.kv_len = pages.longest();
    problem.head_dim = queries.dim();
    problem.value_dim = shape_.value_dim;
    problem.scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim));
    problem.causal = causal;
    return run(dense_plan(problem), inputs, outputs, context.run);
  }

  ThinKParams params_;
  LayerCacheShape shape_;
  std::int64_t dropped_;
  PagedLayerCache prompt_;  ///< every token, until the prompt is pruned
  HeadPages narrow_;        ///< the prompt but its end, with the channels that are left
  HeadPages whole_;         ///< the end of the prompt and what came after it
  PromptWindow window_;
  std::vector<std::vector<std::int32_t>> channels_;  ///< per kv head
  bool pruned_ = false;
  std::int64_t tokens_ = 0;
  std::int64_t settled_ = 0;    ///< tokens at the pruning: they cannot be taken back
  std::vector<float> queries_;  ///< of the last call, narrow
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

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext&) const {
    return std::make_unique<ThinKCache>(params, shape);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(think, tessera::ThinK);
