#include "methods/paged_layer_cache.h"

#include <algorithm>
#include <cassert>

#include "core/error.h"
#include "core/parallel.h"

namespace tessera {

Problem cache_problem(const LayerCacheShape& shape, std::int64_t rows, std::int64_t tokens) {
  Problem problem;
  problem.q_heads = shape.q_heads;
  problem.kv_heads = shape.kv_heads;
  problem.q_len = rows;
  problem.kv_len = tokens;
  problem.head_dim = shape.head_dim;
  problem.value_dim = shape.value_dim;
  problem.causal = true;
  problem.q_offset = tokens - rows;
  return problem;
}

PagedLayerCache::PagedLayerCache(const LayerCacheShape& shape) : shape_(shape), pages_(shape.pages()) {}

void PagedLayerCache::append(std::int64_t count, const float* keys, const float* values, int threads) {
  const std::int64_t position = pages_.tokens();
  pages_.grow_to(position + count);
  constexpr std::int64_t rows_per_item = 32;
  parallel_for((count + rows_per_item - 1) / rows_per_item, threads, [&](std::int64_t item, int) {
    const std::int64_t begin = item * rows_per_item;
    pages_.write(0, position + begin, std::min(rows_per_item, count - begin),
                 keys + begin * shape_.kv_heads * shape_.head_dim, values + begin * shape_.kv_heads * shape_.value_dim);
  });
  pages_.set_tokens(position + count);
}

AttentionInputs PagedLayerCache::inputs() const {
  AttentionInputs inputs;
  inputs.k = pages_.keys(0);
  inputs.v = pages_.values(0);
  inputs.pages = pages_.page_table();
  return inputs;
}

AttentionInputs PagedLayerCache::inputs_of_head(std::int64_t kv_head) const {
  AttentionInputs one = inputs();
  for (TensorView* view : {&one.k, &one.v}) {
    view->data = view->row(0, kv_head, 0);
    view->shape[1] = 1;
  }
  return one;
}

RunReport PagedLayerCache::attend(const CacheCall& call, const PlanContext& context) const {
  AttentionInputs all = inputs();
  all.q = call.q;
  return call.method->attend(cache_problem(shape_, call.q.tokens(), pages_.tokens()), all, call.outputs, context,
                             call.executed);
}

bool PagedLayerCache::truncate(std::int64_t tokens) {
  assert(tokens >= 0);
  if (tokens < pages_.tokens()) pages_.set_tokens(tokens);
  return true;
}

std::unique_ptr<LayerCache> make_paged_cache(const LayerCacheShape& shape) {
  require(shape.q_heads > 0 && shape.kv_heads > 0 && shape.q_heads % shape.kv_heads == 0,
          "cache of {} q_heads and {} kv_heads; expected positive numbers, the second dividing the first",
          shape.q_heads, shape.kv_heads);
  return std::make_unique<PagedLayerCache>(shape);
}

}  // namespace tessera
