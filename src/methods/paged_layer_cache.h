// The cache of methods without one of their own.
#pragma once

#include <utility>

#include "tessera/cache.h"
#include "tessera/method.h"

namespace tessera {

/// The geometry of `rows` queries at the end of `tokens` tokens.
Problem cache_problem(const LayerCacheShape& shape, std::int64_t rows, std::int64_t tokens);

/// Every token in pages; attention by the method of the call.
class PagedLayerCache final : public LayerCache {
 public:
  explicit PagedLayerCache(const LayerCacheShape& shape);

  void append(std::int64_t count, const float* keys, const float* values, int threads) override;
  RunReport attend(const CacheCall& call, const PlanContext& context) override {
    return std::as_const(*this).attend(call, context);
  }
  RunReport attend(const CacheCall& call, const PlanContext& context) const;
  void finish_prefill(const PlanContext&) override {}
  bool truncate(std::int64_t tokens) override;
  void reset() override { pages_.reset(); }
  std::int64_t tokens() const override { return pages_.tokens(); }
  std::int64_t rows_kept() const override { return pages_.tokens() * shape_.kv_heads; }
  std::size_t memory_bytes() const override { return pages_.memory_bytes(); }

  /// Keys and values of all heads, or of one alone (as a tensor of one head); without queries.
  AttentionInputs inputs() const;
  AttentionInputs inputs_of_head(std::int64_t kv_head) const;

 private:
  LayerCacheShape shape_;
  PagedCache pages_;
};

}  // namespace tessera
