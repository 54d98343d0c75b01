#include "methods/evicting_cache.h"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cmath>
#include <numeric>

namespace tessera {

namespace {

constexpr std::int64_t kTileQ = 128;

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

void EvictingCache::observe(const CacheCall& call, std::span<const float> lse, const PlanContext& context) {
  // Until a first prompt has ended everything is there, and decoded tokens are as good as a prompt's.
  if (call.prompt || whole()) {
    observe_prompt(call, lse, context);
  } else {
    observe_decode(call, lse, context);
  }
}

RunReport EvictingCache::attend_kept_rows(const CacheCall& call, const PlanContext& context) {
  const std::span<const HeadWindow> limits = windows();
  if (call.q.tokens() > 1 && !limits.empty()) sort_slots();
  return attend_kept(pages(), call.q, limits, stand_in(), call.outputs, context, call.executed);
}

std::vector<std::int32_t> EvictingCache::slots_by_position(std::int64_t kv_head) const {
  std::vector<std::int32_t> slots(static_cast<std::size_t>(size_of_head(kv_head)));
  std::iota(slots.begin(), slots.end(), 0);
  if (whole()) return slots;
  const auto positions = pages().positions(kv_head);
  std::sort(slots.begin(), slots.end(), [&](std::int32_t a, std::int32_t b) {
    return positions[static_cast<std::size_t>(a)] < positions[static_cast<std::size_t>(b)];
  });
  return slots;
}

void EvictingCache::sort_slots() {
  for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
    const auto positions = pages().positions(head);
    if (!std::is_sorted(positions.begin(), positions.end())) pages().keep(head, slots_by_position(head));
  }
}

void EvictingCache::keep(const KeptSlots& kept) {
  assert(!whole());
  bool fewer = false;
  for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
    const std::vector<std::int32_t>& slots = kept[static_cast<std::size_t>(head)];
    if (std::ssize(slots) == pages().size(head)) continue;
    pages().keep(head, slots);
    fewer = true;
  }
  if (!fewer) return;
  pages().release_unused();
  forbid_truncation();
}

void EvictingCache::finish_prefill(const PlanContext& context) {
  if (!evicts()) return;
  const KeptSlots kept = choose(context);
  keep_only(kept);
  evicted(kept);
}

std::int64_t EvictingCache::position_of(std::int64_t kv_head, std::int64_t slot) const {
  return whole() ? slot : pages().positions(kv_head)[static_cast<std::size_t>(slot)];
}

void EvictingCache::evict_oldest(std::int64_t kv_head, std::int64_t sinks) {
  std::int64_t oldest = -1;
  for (std::int64_t slot = 0; slot < size_of_head(kv_head); ++slot) {
    if (position_of(kv_head, slot) < sinks) continue;
    if (oldest < 0 || position_of(kv_head, slot) < position_of(kv_head, oldest)) oldest = slot;
  }
  evict_slot(kv_head, oldest);
}

void EvictingCache::evict_slot(std::int64_t kv_head, std::int64_t slot) {
  assert(!whole());
  pages().replace_by_last(kv_head, slot);
  forbid_truncation();
}

}  // namespace tessera
