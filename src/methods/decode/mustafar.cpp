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
#include <cmath>

#include "cache/bitmap_store.h"
#include "core/convert.h"
#include "core/parallel.h"
#include "kernels/bitmap_attention.h"
#include "methods/compressing_cache.h"
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

class MustafarCache final : public CompressingCache {
 public:
  MustafarCache(const MustafarParams& params, const LayerCacheShape& shape)
      : CompressingCache(shape), params_(params), tiles_(static_cast<std::size_t>(shape.kv_heads)) {
    for (std::int64_t head = 0; head < shape.kv_heads; ++head) {
      keys_.emplace_back(BitmapStore::Orientation::keys, shape.head_dim, shape.dtype);
      values_.emplace_back(BitmapStore::Orientation::values, shape.value_dim, shape.dtype);
    }
  }

 private:
  std::int64_t due(std::int64_t whole, bool) const override {
    return std::max<std::int64_t>(0, whole - params_.window) / kBatch * kBatch;
  }

  void compress(const WholeRows& rows, std::int64_t count, const PlanContext& context) override {
    parallel_for(2 * shape().kv_heads, context.run.threads, [&](std::int64_t i, int) {
      const auto head = static_cast<std::size_t>(i / 2);
      kernels::BitmapHead& tiles = tiles_[head];
      if (i % 2 == 0) {
        compress_rows(rows.keys[head], count, shape().head_dim, params_.key_sparsity, keys_[head], tiles.keys);
      } else {
        compress_rows(rows.values[head], count, shape().value_dim, params_.value_sparsity, values_[head], tiles.values);
      }
    });
  }

  void compress_rows(const kernels::KeyRows& rows, std::int64_t count, std::int64_t dim, double sparsity,
                     BitmapStore& store, std::vector<BitmapTiles>& tiles) const {
    std::vector<float> batch(static_cast<std::size_t>(kBatch * dim));
    for (std::int64_t first = 0; first < count; first += kBatch) {
      for (std::int64_t r = 0; r < kBatch; ++r) {
        float* row = batch.data() + r * dim;
        to_float(rows.row(first + r), shape().dtype, dim, row);
        prune_by_magnitude({row, static_cast<std::size_t>(dim)}, sparsity);
      }
      store.append(kBatch / kBitmapTile, batch.data());
      tiles.push_back(store.tiles(store.batches() - 1));
    }
  }

  void attend_compressed(const TensorView& q, Branch& out, const PlanContext& context) override {
    const kernels::BitmapProblem problem{shape().group() * q.tokens(), shape().head_dim, shape().value_dim,
                                         1 / std::sqrt(static_cast<float>(shape().head_dim)), shape().dtype};
    kernels::attend_bitmap(problem, tiles_, queries_as_float(q).data(), out.o.data(), out.lse.data(), context.run);
  }

  void truncated(std::int64_t tokens) override {
    if (tokens > 0) return;
    for (BitmapStore& store : keys_) store.clear();
    for (BitmapStore& store : values_) store.clear();
    tiles_.assign(tiles_.size(), {});
  }

  std::size_t bytes_of_compressed() const override {
    std::size_t bytes = 0;
    for (const BitmapStore& store : keys_) bytes += store.memory_bytes();
    for (const BitmapStore& store : values_) bytes += store.memory_bytes();
    return bytes;
  }

  MustafarParams params_;
  std::vector<BitmapStore> keys_;           ///< per kv head
  std::vector<BitmapStore> values_;         ///< per kv head
  std::vector<kernels::BitmapHead> tiles_;  ///< the same as the kernel reads them
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

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext&) const {
    return std::make_unique<MustafarCache>(params, shape);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(mustafar, tessera::Mustafar);
