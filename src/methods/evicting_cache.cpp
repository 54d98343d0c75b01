#include "methods/evicting_cache.h"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cmath>
#include <numeric>

#include "kernels/key_rows.h"

namespace tessera {

namespace {

constexpr std::int64_t kTileQ = 128;

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

/// A plan row of queries whose own slots are [first, first + count).
void add_row(const HeadWindow& window, std::int64_t first, std::int64_t count, std::int64_t causal, std::int64_t near,
             PlanBuilder& builder) {
  const auto visible_run = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t common = std::clamp(first + 1, begin, end);  // what the first query sees, all see
    builder.run(begin, common - begin);
    builder.run(common, end - common, EntryMask::band, causal);
  };
  const std::int64_t end = first + count;
  if (!window.limited) {
    visible_run(0, end);
  } else {
    visible_run(0, std::min(window.sinks, end));
    const std::int64_t begin = std::max(window.sinks, first - window.recent + 1);
    if (begin < end) builder.run(begin, end - begin, EntryMask::band, near);
  }
  builder.end_row();
}

Plan kept_plan(const HeadPages& pages, std::int64_t rows, std::span<const HeadWindow> windows,
               const KeySource* stand_in) {
  const LayerCacheShape& shape = pages.shape();
  Problem problem;
  problem.batch = shape.kv_heads;
  problem.q_heads = shape.group();
  problem.kv_heads = 1;
  problem.q_len = rows;
  problem.kv_len = pages.longest();
  problem.head_dim = shape.head_dim;
  problem.value_dim = shape.value_dim;
  // Positions are slots of the shortest heads: windows are counted in them, and the others are shifted to the right.
  std::int64_t offset = problem.kv_len;
  for (std::int64_t head = 0; head < shape.kv_heads; ++head) offset = std::min(offset, pages.size(head) - rows);
  problem.q_offset = offset;
  PlanBuilder builder(problem, kTileQ, kTileQ, 1, shape.kv_heads);
  const std::uint16_t source = stand_in == nullptr ? std::uint16_t{0} : builder.add_source({"stand-in", 1, false});
  for (std::int64_t head = 0; head < shape.kv_heads; ++head) {
    const std::int64_t before = pages.size(head) - rows;
    const bool stands_in = stand_in != nullptr && std::isfinite(stand_in->log_weight[static_cast<std::size_t>(head)]);
    // A single query sees all that is kept.
    const HeadWindow window = windows.empty() || rows == 1 ? HeadWindow{} : windows[static_cast<std::size_t>(head)];
    assert(!window.limited || before == offset);
    const std::int64_t causal = builder.add_band({-1, before - offset});
    const std::int64_t near = window.limited ? builder.add_band({window.recent - 1, 0}) : 0;
    for (std::int64_t tile = 0; tile < rows; tile += kTileQ) {
      if (stands_in) builder.run(0, 1, EntryMask::none, 0, source);
      add_row(window, before + tile, std::min(kTileQ, rows - tile), causal, near, builder);
    }
  }
  return std::move(builder).finish();
}

}  // namespace

RunReport attend_kept(const HeadPages& pages, const TensorView& q, std::span<const HeadWindow> windows,
                      const KeySource* stand_in, const AttentionOutputs& outputs, const PlanContext& context,
                      Plan* executed) {
  const auto start = std::chrono::steady_clock::now();
  Plan plan = kept_plan(pages, q.tokens(), windows, stand_in);
  const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
  AttentionInputs inputs = pages.inputs();
  inputs.q = heads_as_batch(q, pages.shape().kv_heads);
  if (stand_in != nullptr) inputs.sources.push_back(*stand_in);
  const AttentionOutputs by_head{heads_as_batch(outputs.o, pages.shape().kv_heads), outputs.lse};
  RunReport report = run(plan, inputs, by_head, context.run);
  report.plan_ms = planned.count();
  if (executed != nullptr) *executed = std::move(plan);
  return report;
}

TensorView queries_of_kv_head(const TensorView& q, std::int64_t group, std::int64_t kv_head) {
  TensorView own = q;
  own.data = q.row(0, kv_head * group, 0);
  own.shape[1] = group;
  return own;
}

EvictingCache::EvictingCache(const LayerCacheShape& shape, bool prompt_whole)
    : shape_(shape), prompt_(shape), pages_(shape), prompt_whole_(prompt_whole), whole_(prompt_whole) {}

void EvictingCache::append(std::int64_t count, const float* keys, const float* values, int threads) {
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

RunReport EvictingCache::attend(const CacheCall& call, const PlanContext& context) {
  std::vector<float> lse(static_cast<std::size_t>(shape_.q_heads * call.q.tokens()));
  CacheCall with_lse = call;
  with_lse.outputs.lse = lse;
  const RunReport report = attend_with_lse(with_lse, context);
  std::copy(lse.begin(), lse.begin() + std::ssize(call.outputs.lse), call.outputs.lse.begin());
  if (!call.prompt) {
    observe_decode(call, lse, context);
    return report;
  }
  const bool dense = !whole_ || shape_.own_prompt || call.method->info().name == "dense";
  observe_prompt(call, dense ? std::span<const float>(lse) : std::span<const float>(), context);
  return report;
}

RunReport EvictingCache::attend_with_lse(const CacheCall& call, const PlanContext& context) {
  if (!whole_) {
    const std::span<const HeadWindow> limits = windows();
    if (call.q.tokens() > 1 && !limits.empty()) sort_slots();
    return attend_kept(pages_, call.q, limits, stand_in(), call.outputs, context, call.executed);
  }
  if (call.prompt) return prompt_.attend(call, context);
  Plan plan = dense_plan(cache_problem(shape_, call.q.tokens(), tokens_));
  AttentionInputs inputs = prompt_.inputs();
  inputs.q = call.q;
  const RunReport report = run(plan, inputs, call.outputs, context.run);
  if (call.executed != nullptr) *call.executed = std::move(plan);
  return report;
}

std::vector<std::int32_t> EvictingCache::slots_by_position(std::int64_t kv_head) const {
  std::vector<std::int32_t> slots(static_cast<std::size_t>(size_of_head(kv_head)));
  std::iota(slots.begin(), slots.end(), 0);
  if (whole_) return slots;
  const auto positions = pages_.positions(kv_head);
  std::sort(slots.begin(), slots.end(), [&](std::int32_t a, std::int32_t b) {
    return positions[static_cast<std::size_t>(a)] < positions[static_cast<std::size_t>(b)];
  });
  return slots;
}

void EvictingCache::sort_slots() {
  for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
    const auto positions = pages_.positions(head);
    if (!std::is_sorted(positions.begin(), positions.end())) pages_.keep(head, slots_by_position(head));
  }
}

void EvictingCache::keep(const KeptSlots& kept) {
  assert(!whole_);
  bool fewer = false;
  for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
    const std::vector<std::int32_t>& slots = kept[static_cast<std::size_t>(head)];
    if (std::ssize(slots) == pages_.size(head)) continue;
    pages_.keep(head, slots);
    fewer = true;
  }
  if (!fewer) return;
  pages_.release_unused();
  settled_ = tokens_;
}

void EvictingCache::finish_prefill(const PlanContext& context) {
  if (!evicts()) return;
  const KeptSlots kept = choose(context);
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
  settled_ = tokens_;
  evicted(kept);
}

bool EvictingCache::truncate(std::int64_t tokens) {
  if (tokens >= tokens_) return true;
  if (tokens < settled_) return false;
  if (whole_) {
    prompt_.truncate(tokens);
  } else {
    std::vector<std::int32_t> slots;
    for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
      // Rows since the last eviction lie behind the others.
      slots.resize(static_cast<std::size_t>(pages_.size(head) - (tokens_ - tokens)));
      std::iota(slots.begin(), slots.end(), 0);
      pages_.keep(head, slots);
    }
  }
  tokens_ = tokens;
  truncated(tokens);
  return true;
}

void EvictingCache::reset() {
  prompt_.reset();
  pages_.reset();
  whole_ = prompt_whole_;
  tokens_ = settled_ = 0;
  truncated(0);
}

std::int64_t EvictingCache::size_of_head(std::int64_t kv_head) const {
  return whole_ ? tokens_ : pages_.size(kv_head);
}

std::int64_t EvictingCache::position_of(std::int64_t kv_head, std::int64_t slot) const {
  return whole_ ? slot : pages_.positions(kv_head)[static_cast<std::size_t>(slot)];
}

Problem EvictingCache::problem_of_head(std::int64_t kv_head, std::int64_t rows) const {
  LayerCacheShape head = shape_;
  head.q_heads = shape_.group();
  head.kv_heads = 1;
  return cache_problem(head, rows, size_of_head(kv_head));
}

AttentionInputs EvictingCache::inputs_of_head(std::int64_t kv_head) const {
  return whole_ ? prompt_.inputs_of_head(kv_head) : pages_.inputs_of_head(kv_head);
}

void EvictingCache::evict_slot(std::int64_t kv_head, std::int64_t slot) {
  assert(!whole_);
  pages_.replace_by_last(kv_head, slot);
  settled_ = tokens_;
}

}  // namespace tessera
