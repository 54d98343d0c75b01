#include "model/int8_cache.h"

#include <algorithm>
#include <chrono>

#include "cache/quantized_store.h"
#include "core/error.h"
#include "core/parallel.h"
#include "kernels/quantized_attention.h"
#include "methods/branch_merge.h"
#include "methods/compressing_cache.h"

namespace tessera::model {

namespace {

/// One of keys and values: codes, and the newest rows as they came, [tokens][kv_heads * dim].
class Side {
 public:
  Side(QuantizedSide side, std::int64_t heads, std::int64_t dim)
      : heads_(heads),
        dim_(dim),
        codes_(side, heads, dim, {.bits = 8, .scales = QuantizedScales::token, .group = 0, .channel_factors = false}) {}

  void append(std::int64_t count, const float* rows) {
    newest_.insert(newest_.end(), rows, rows + count * heads_ * dim_);
  }
  void quantise(std::int64_t count, int threads) {
    codes_.append(
        count,
        [this](std::int64_t head, std::int64_t token, float* row) {
          std::copy_n(newest_.data() + (token * heads_ + head) * dim_, dim_, row);
        },
        threads);
    std::vector<float>(newest_.begin() + count * heads_ * dim_, newest_.end()).swap(newest_);  // gives memory back
  }
  void keep_newest(std::int64_t count) { newest_.resize(static_cast<std::size_t>(count * heads_ * dim_)); }
  void clear() {
    codes_.clear();
    std::vector<float>().swap(newest_);
  }
  std::int64_t newest() const { return std::ssize(newest_) / (heads_ * dim_); }
  const QuantizedStore& codes() const { return codes_; }
  TensorView newest_view() const {
    return view_of(newest_.data(), DType::f32, {1, heads_, newest(), dim_}, Layout::bnhd);
  }
  /// All rows as floats, [heads][tokens][dim].
  TensorView widen(std::vector<float>& out, int threads) const {
    const std::int64_t tokens = codes_.tokens() + newest();
    out.resize(static_cast<std::size_t>(heads_ * tokens * dim_));
    parallel_for(heads_, threads, [&](std::int64_t head, int) {
      float* to = out.data() + head * tokens * dim_;
      for (std::size_t batch = 0; batch < codes_.batches(); ++batch) {
        const std::vector<float> rows = codes_.expand(head, batch);
        to = std::copy(rows.begin(), rows.end(), to);
      }
      for (std::int64_t token = 0; token < newest(); ++token) {
        to = std::copy_n(newest_.data() + (token * heads_ + head) * dim_, dim_, to);
      }
    });
    return view_of(out.data(), DType::f32, {1, heads_, tokens, dim_});
  }
  std::size_t memory_bytes() const { return codes_.memory_bytes() + newest_.capacity() * sizeof(float); }

 private:
  std::int64_t heads_;
  std::int64_t dim_;
  QuantizedStore codes_;
  std::vector<float> newest_;
};

class Int8Cache final : public LayerCache {
 public:
  Int8Cache(const LayerCacheShape& shape, WidenedRows& widened, bool plain)
      : shape_(shape),
        widened_(widened),
        plain_(plain),
        keys_(QuantizedSide::keys, shape.kv_heads, shape.head_dim),
        values_(QuantizedSide::values, shape.kv_heads, shape.value_dim) {}

  void append(std::int64_t count, const float* keys, const float* values, int) override {
    require(tokens() + count <= shape_.capacity, "{} tokens exceed the cache's capacity of {}", tokens() + count,
            shape_.capacity);
    keys_.append(count, keys);
    values_.append(count, values);
  }

  RunReport attend(const CacheCall& call, const PlanContext& context) override {
    const bool by_codes = plain_ && !call.prompt && call.method->info().name == "dense" && keys_.codes().tokens() > 0;
    const RunReport report = by_codes ? attend_codes(call, context) : attend_widened(call, context);
    if (const std::int64_t whole = keys_.newest() / kQuantizedBlock * kQuantizedBlock; whole > 0) {
      keys_.quantise(whole, context.run.threads);
      values_.quantise(whole, context.run.threads);
    }
    return report;
  }

  void finish_prefill(const PlanContext&) override {}

  bool truncate(std::int64_t tokens) override {
    const std::int64_t quantised = keys_.codes().tokens();
    if (tokens < quantised) return false;
    if (tokens < this->tokens()) {
      keys_.keep_newest(tokens - quantised);
      values_.keep_newest(tokens - quantised);
    }
    return true;
  }

  void reset() override {
    keys_.clear();
    values_.clear();
  }
  std::int64_t tokens() const override { return keys_.codes().tokens() + keys_.newest(); }
  std::int64_t rows_kept() const override { return tokens() * shape_.kv_heads; }
  std::size_t memory_bytes() const override { return keys_.memory_bytes() + values_.memory_bytes(); }

 private:
  RunReport attend_widened(const CacheCall& call, const PlanContext& context) {
    AttentionInputs inputs;
    inputs.q = call.q;
    inputs.k = keys_.widen(widened_.keys, context.run.threads);
    inputs.v = values_.widen(widened_.values, context.run.threads);
    return call.method->attend(cache_problem(shape_, call.q.tokens(), tokens()), inputs, call.outputs, context,
                               call.executed);
  }

  /// The codes and the newest rows are two branches of one softmax.
  RunReport attend_codes(const CacheCall& call, const PlanContext& context) const {
    const std::int64_t rows = call.q.tokens();
    const std::int64_t count = shape_.q_heads * rows;
    Branch codes(count, shape_.value_dim);
    Branch newest(count, shape_.value_dim);
    AttentionInputs inputs;
    inputs.q = call.q;
    inputs.k = keys_.newest_view();
    inputs.v = values_.newest_view();
    const MutableTensorView o =
        mutable_view_of(newest.o.data(), DType::f32, {1, shape_.q_heads, rows, shape_.value_dim});
    RunReport report =
        run(dense_plan(cache_problem(shape_, rows, keys_.newest())), inputs, {o, newest.lse}, context.run);
    const auto start = std::chrono::steady_clock::now();
    std::vector<kernels::QuantizedHead> heads(static_cast<std::size_t>(shape_.kv_heads));
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      auto& own = heads[static_cast<std::size_t>(head)];
      for (std::size_t batch = 0; batch < keys_.codes().batches(); ++batch) {
        own.keys.push_back(keys_.codes().tiles(head, batch));
        own.values.push_back(values_.codes().tiles(head, batch));
      }
    }
    const kernels::QuantizedProblem problem{.rows = shape_.group() * rows,
                                            .head_dim = shape_.head_dim,
                                            .value_dim = shape_.value_dim,
                                            .scale = cache_problem(shape_, rows, tokens()).softmax_scale()};
    kernels::attend_quantized(problem, heads, queries_as_float(call.q).data(), codes.o.data(), codes.lse.data(),
                              context.run);
    merge_branches(codes, newest, call.outputs, context.run.threads);
    report.kernel_ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    if (call.executed != nullptr) *call.executed = dense_plan(cache_problem(shape_, rows, tokens()));
    return report;
  }

  LayerCacheShape shape_;
  WidenedRows& widened_;
  bool plain_;
  Side keys_;
  Side values_;
};

}  // namespace

std::unique_ptr<LayerCache> make_int8_cache(const LayerCacheShape& shape, WidenedRows& widened, bool plain) {
  return std::make_unique<Int8Cache>(shape, widened, plain);
}

}  // namespace tessera::model
