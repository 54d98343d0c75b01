// Mustafar (arXiv:2505.22913): every cached key and value loses its smallest numbers; decoding computes on bitmaps.
//
// Per token and kv head, the rows of K (rotated) and V keep the numbers whose magnitude reaches the n-th smallest one,
// n = max(1, floor(sparsity * D)). The last `window` tokens stay whole; whenever at least 256 tokens lie before them,
// the oldest 256 are pruned, compressed (cache/bitmap_store.h) and given up. A decoding step attends to the compressed
// tokens straight from their bitmaps and to the whole ones, under one softmax. The prompt runs on the whole tokens.
//
// Differs from the authors' code: bits count from the low end, numbers have the cache's dtype (there f16), and ties are
// stored, however many. plan() is dense: every token is attended to.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "cache/bitmap_store.h"
#include "cache/head_pages.h"
#include "core/convert.h"
#include "core/parallel.h"
#include "kernels/bitmap_attention.h"
#include "kernels/key_rows.h"
#include "methods/branch_merge.h"
#include "methods/evicting_cache.h"
#include "methods/paged_layer_cache.h"
#include "methods/registry.h"

namespace tessera {
namespace {

/// Tokens that are compressed together.
constexpr std::int64_t kBatch = 256;

struct MustafarParams {
  double key_sparsity = 0.7;
  double value_sparsity = 0.7;
  std::int64_t window = 32;
  void visit(ParameterList& v) {
    v("key_sparsity", key_sparsity, 0, 1, "share of the numbers that a key loses");
    v("value_sparsity", value_sparsity, 0, 1, "share of the numbers that a value loses");
    v("window", window, 1, kMostTokens, "last tokens that stay whole");
  }
};

class MustafarCache final : public LayerCache {
 public:
  MustafarCache(const MustafarParams& params, const LayerCacheShape& shape)
      : params_(params), shape_(shape), prompt_(shape), whole_(shape) {
    for (std::int64_t head = 0; head < shape.kv_heads; ++head) {
      keys_.emplace_back(BitmapStore::Orientation::keys, shape.head_dim, shape.dtype);
      values_.emplace_back(BitmapStore::Orientation::values, shape.value_dim, shape.dtype);
    }
  }

  void append(std::int64_t count, const float* keys, const float* values, int threads) override {
    if (!compressed_) {
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
    if (!compressed_ && call.prompt) return prompt_.attend(call, context);
    if (!compressed_) {
      Plan plan = dense_plan(cache_problem(shape_, call.q.tokens(), tokens_));
      AttentionInputs inputs = prompt_.inputs();
      inputs.q = call.q;
      const RunReport report = run(plan, inputs, call.outputs, context.run);
      if (call.executed != nullptr) *call.executed = std::move(plan);
      // What is decoded fills batches as the prompt does.
      if (tokens_ - params_.window >= kBatch) move_to_compressed(context);
      return report;
    }
    const RunReport report = attend_both(call, context);
    if (call.executed != nullptr) *call.executed = dense_plan(cache_problem(shape_, call.q.tokens(), tokens_));
    if (!call.prompt) compress_full_batches(context);
    return report;
  }

  void finish_prefill(const PlanContext& context) override {
    if (compressed_) {
      compress_full_batches(context);
    } else if (tokens_ - params_.window >= kBatch) {
      move_to_compressed(context);
    }
  }

  bool truncate(std::int64_t tokens) override {
    if (tokens >= tokens_) return true;
    if (tokens < settled_) return false;
    if (!compressed_) {
      prompt_.truncate(tokens);
    } else {
      keep_slots(0, whole_.size(0) - (tokens_ - tokens));
    }
    tokens_ = tokens;
    return true;
  }

  void reset() override {
    prompt_.reset();
    whole_.reset();
    for (BitmapStore& store : keys_) store.clear();
    for (BitmapStore& store : values_) store.clear();
    compressed_ = false;
    tokens_ = settled_ = 0;
  }

  std::int64_t tokens() const override { return tokens_; }
  std::int64_t rows_kept() const override { return tokens_ * shape_.kv_heads; }
  std::size_t memory_bytes() const override {
    std::size_t bytes = prompt_.memory_bytes() + whole_.memory_bytes();
    for (const BitmapStore& store : keys_) bytes += store.memory_bytes();
    for (const BitmapStore& store : values_) bytes += store.memory_bytes();
    return bytes;
  }

 private:
  /// From whole pages of all heads to compressed batches and whole rows per head.
  void move_to_compressed(const PlanContext& context) {
    const std::int64_t batches = (tokens_ - params_.window) / kBatch;
    const AttentionInputs inputs = prompt_.inputs();
    const Problem problem = cache_problem(shape_, 0, tokens_);
    const auto rows_of = [&](std::int64_t head, bool keys) {
      return kernels::key_rows_of(problem, keys ? inputs.k : inputs.v, inputs.pages, 0, head);
    };
    compress(batches, 0, rows_of, context);
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      const auto keys = rows_of(head, true);
      const auto values = rows_of(head, false);
      for (std::int64_t token = batches * kBatch; token < tokens_; ++token) {
        whole_.append_stored(head, token, keys.row(token), values.row(token));
      }
    }
    prompt_.reset();
    compressed_ = true;
    settled_ = tokens_;
  }

  void compress_full_batches(const PlanContext& context) {
    const std::int64_t batches = (whole_.size(0) - params_.window) / kBatch;
    if (batches <= 0) return;
    const AttentionInputs inputs = whole_.inputs();
    Problem problem;
    problem.batch = shape_.kv_heads;
    problem.kv_len = whole_.longest();
    const auto rows_of = [&](std::int64_t head, bool keys) {
      return kernels::key_rows_of(problem, keys ? inputs.k : inputs.v, inputs.pages, head, 0);
    };
    compress(batches, 0, rows_of, context);
    keep_slots(batches * kBatch, whole_.size(0));
    whole_.release_unused();
    settled_ = tokens_;
  }

  /// Prunes and compresses batches of rows from `first` on; rows_of(head, keys) says where they lie.
  template <class RowsOf>
  void compress(std::int64_t batches, std::int64_t first, const RowsOf& rows_of, const PlanContext& context) {
    parallel_for(2 * shape_.kv_heads, context.run.threads, [&](std::int64_t i, int) {
      const std::int64_t head = i / 2;
      const bool keys = i % 2 == 0;
      const kernels::KeyRows rows = rows_of(head, keys);
      const std::int64_t dim = keys ? shape_.head_dim : shape_.value_dim;
      BitmapStore& store = (keys ? keys_ : values_)[static_cast<std::size_t>(head)];
      std::vector<float> batch(static_cast<std::size_t>(kBatch * dim));
      for (std::int64_t b = 0; b < batches; ++b) {
        for (std::int64_t r = 0; r < kBatch; ++r) {
          float* row = batch.data() + r * dim;
          to_float(rows.row(first + b * kBatch + r), shape_.dtype, dim, row);
          prune_by_magnitude({row, static_cast<std::size_t>(dim)},
                             keys ? params_.key_sparsity : params_.value_sparsity);
        }
        store.append(kBatch / kBitmapTile, batch.data());
      }
    });
  }

  void keep_slots(std::int64_t first, std::int64_t last) {
    std::vector<std::int32_t> slots(static_cast<std::size_t>(last - first));
    std::iota(slots.begin(), slots.end(), static_cast<std::int32_t>(first));
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) whole_.keep(head, slots);
  }

  /// Compressed and whole tokens, merged by LSE.
  RunReport attend_both(const CacheCall& call, const PlanContext& context) {
    const std::int64_t rows = call.q.tokens();
    const std::int64_t per_head = shape_.group() * rows;
    const std::int64_t count = shape_.q_heads * rows;
    std::vector<float> queries(static_cast<std::size_t>(count * shape_.head_dim));
    for (std::int64_t i = 0; i < count; ++i) {
      to_float(call.q.row(0, i / rows, i % rows), call.q.dtype, shape_.head_dim, queries.data() + i * shape_.head_dim);
    }
    Branch whole(count, shape_.value_dim);
    Branch compressed(count, shape_.value_dim);
    const MutableTensorView whole_o =
        mutable_view_of(whole.o.data(), DType::f32, {1, shape_.q_heads, rows, shape_.value_dim});
    RunReport report = attend_kept(whole_, call.q, {}, nullptr, {whole_o, whole.lse}, context, nullptr);

    const auto start = std::chrono::steady_clock::now();
    std::vector<kernels::BitmapHead> heads(keys_.size());
    for (std::size_t head = 0; head < heads.size(); ++head) {
      for (std::size_t batch = 0; batch < keys_[head].batches(); ++batch) {
        heads[head].keys.push_back(keys_[head].tiles(batch));
        heads[head].values.push_back(values_[head].tiles(batch));
      }
    }
    const kernels::BitmapProblem problem{per_head, shape_.head_dim, shape_.value_dim,
                                         1 / std::sqrt(static_cast<float>(shape_.head_dim)), shape_.dtype};
    kernels::attend_bitmap(problem, heads, queries.data(), compressed.o.data(), compressed.lse.data(), context.run);
    merge_branches(compressed, whole, call.outputs);
    report.kernel_ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    return report;
  }

  MustafarParams params_;
  LayerCacheShape shape_;
  PagedLayerCache prompt_;           ///< every token, until the first batch is compressed
  HeadPages whole_;                  ///< tokens behind the compressed ones
  std::vector<BitmapStore> keys_;    ///< per kv head
  std::vector<BitmapStore> values_;  ///< per kv head
  bool compressed_ = false;
  std::int64_t tokens_ = 0;
  std::int64_t settled_ = 0;  ///< tokens at the last compression: they cannot be taken back
};

struct Mustafar {
  using Params = MustafarParams;
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {
        .name = "mustafar",
        .family = "decode",
        .summary = "unstructured sparse keys and values as bitmaps, which decoding computes on directly",
        .paper = "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference, arXiv:2505.22913",
        .phases = {.prefill = true, .decode = true},
        .budget = {{"key_sparsity", 0.95, 0}}};
  }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext&) const {
    return std::make_unique<MustafarCache>(params, shape);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(mustafar, tessera::Mustafar);
