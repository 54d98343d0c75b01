#include "methods/prompt_first_cache.h"

#include <algorithm>
#include <numeric>

#include "kernels/key_rows.h"

namespace tessera {

TensorView queries_of_kv_head(const TensorView& q, std::int64_t group, std::int64_t kv_head) {
  TensorView own = q;
  own.data = q.row(0, kv_head * group, 0);
  own.shape[1] = group;
  return own;
}

PromptFirstCache::PromptFirstCache(const LayerCacheShape& shape, bool prompt_whole)
    : shape_(shape), prompt_(shape), pages_(shape), prompt_whole_(prompt_whole), whole_(prompt_whole) {}

void PromptFirstCache::append(std::int64_t count, const float* keys, const float* values, int threads) {
  if (whole_) {
    prompt_.append(count, keys, values, threads);
  } else {
    for (std::int64_t token = 0; token < count; ++token) {
      for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
        const std::int64_t row = token * shape_.kv_heads + head;
        pages_.append(head, tokens_ + token, keys + row * shape_.head_dim, values + row * shape_.value_dim);
      }
    }
  }
  tokens_ += count;
}

RunReport PromptFirstCache::attend(const CacheCall& call, const PlanContext& context) {
  std::vector<float> lse(static_cast<std::size_t>(shape_.q_heads * call.q.tokens()));
  CacheCall with_lse = call;
  with_lse.outputs.lse = lse;
  const bool dense = !whole_ || !call.prompt || shape_.own_prompt || call.method->info().name == "dense";
  const RunReport report = whole_ ? attend_whole(with_lse, context) : attend_kept_rows(with_lse, context);
  std::copy(lse.begin(), lse.begin() + std::ssize(call.outputs.lse), call.outputs.lse.begin());
  observe(call, dense ? std::span<const float>(lse) : std::span<const float>(), context);
  return report;
}

RunReport PromptFirstCache::attend_whole(const CacheCall& call, const PlanContext& context) const {
  if (call.prompt) return prompt_.attend(call, context);
  Plan plan = dense_plan(cache_problem(shape_, call.q.tokens(), tokens_));
  AttentionInputs inputs = prompt_.inputs();
  inputs.q = call.q;
  const RunReport report = run(plan, inputs, call.outputs, context.run);
  if (call.executed != nullptr) *call.executed = std::move(plan);
  return report;
}

bool PromptFirstCache::truncate(std::int64_t tokens) {
  if (tokens >= tokens_) return true;
  if (tokens < settled_) return false;
  if (whole_) {
    prompt_.truncate(tokens);
  } else {
    std::vector<std::int32_t> slots;
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      // Rows that came after the last settling lie behind the others.
      slots.resize(static_cast<std::size_t>(pages_.size(head) - (tokens_ - tokens)));
      std::iota(slots.begin(), slots.end(), 0);
      pages_.keep(head, slots);
    }
  }
  tokens_ = tokens;
  truncated(tokens);
  return true;
}

void PromptFirstCache::reset() {
  prompt_.reset();
  pages_.reset();
  whole_ = prompt_whole_;
  tokens_ = settled_ = 0;
  truncated(0);
}

std::int64_t PromptFirstCache::size_of_head(std::int64_t kv_head) const {
  return whole_ ? tokens_ : pages_.size(kv_head);
}

Problem PromptFirstCache::problem_of_head(std::int64_t kv_head, std::int64_t rows) const {
  LayerCacheShape head = shape_;
  head.q_heads = shape_.group();
  head.kv_heads = 1;
  return cache_problem(head, rows, size_of_head(kv_head));
}

AttentionInputs PromptFirstCache::inputs_of_head(std::int64_t kv_head) const {
  return whole_ ? prompt_.inputs_of_head(kv_head) : pages_.inputs_of_head(kv_head);
}

void PromptFirstCache::keep_only(const KeptSlots& kept) {
  for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
    const std::vector<std::int32_t>& slots = kept[static_cast<std::size_t>(head)];
    if (!whole_) {
      pages_.keep(head, slots);
      continue;
    }
    const AttentionInputs inputs = prompt_.inputs_of_head(head);
    const Problem problem = problem_of_head(head, 0);
    const auto keys = kernels::key_rows_of(problem, inputs.k, inputs.pages, 0, 0);
    const auto values = kernels::key_rows_of(problem, inputs.v, inputs.pages, 0, 0);
    for (const std::int32_t slot : slots) pages_.append_stored(head, slot, keys.row(slot), values.row(slot));
  }
  prompt_.reset();
  pages_.release_unused();
  whole_ = false;
  forbid_truncation();
}

}  // namespace tessera
