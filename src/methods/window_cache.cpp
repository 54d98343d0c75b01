#include "methods/window_cache.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/convert.h"
#include "core/error.h"
#include "kernels/key_rows.h"

namespace tessera {

EvictingCache::KeptSlots WindowCache::choose(const PlanContext&) {
  KeptSlots kept;
  for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
    std::vector<std::int32_t> slots = slots_by_position(head);
    const HeadWindow& window = windows_[static_cast<std::size_t>(head)];
    if (window.limited && std::ssize(slots) > window.sinks + tail_) {
      slots.erase(slots.begin() + window.sinks, slots.end() - tail_);
    }
    kept.push_back(std::move(slots));
  }
  return kept;
}

void WindowCache::observe_decode(const CacheCall&, std::span<const float>, const PlanContext&) {
  for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
    const HeadWindow& window = windows_[static_cast<std::size_t>(head)];
    while (window.limited && size_of_head(head) > window.sinks + tail_) evict_oldest(head, window.sinks);
  }
}

SlotCache::SlotCache(const LayerCacheShape& shape, std::int64_t sinks, std::int64_t recent)
    : EvictingCache(shape), sinks_(sinks), recent_(recent) {
  require(shape.rope_theta > 0 && shape.head_dim % 2 == 0,
          "positions=slot moves keys: rope_theta is {}, head_dim {}; expected rotary embedding of an even number",
          shape.rope_theta, shape.head_dim);
  for (std::int64_t i = 0; i < shape.head_dim; i += 2) {
    frequencies_.push_back(std::pow(shape.rope_theta, -static_cast<double>(i) / static_cast<double>(shape.head_dim)));
  }
}

EvictingCache::KeptSlots SlotCache::choose(const PlanContext&) {
  std::vector<std::int32_t> slots = slots_by_position(0);  // the same for all heads
  if (std::ssize(slots) > sinks_ + recent_) slots.erase(slots.begin() + sinks_, slots.end() - recent_);
  return KeptSlots(static_cast<std::size_t>(shape().kv_heads), slots);
}

void SlotCache::make_room(std::int64_t rows) {
  const std::int64_t most = sinks_ + std::max(rows, recent_);
  const std::int64_t size = size_of_head(0);
  if (size <= most) return;
  if (rows == 1) {
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      while (size_of_head(head) > most) evict_oldest(head, sinks_);
    }
    return;
  }
  std::vector<std::int32_t> slots = slots_by_position(0);
  slots.erase(slots.begin() + sinks_, slots.end() - (most - sinks_));
  // Heads take the same steps, so that their slots agree.
  keep(KeptSlots(static_cast<std::size_t>(shape().kv_heads), slots));
}

void SlotCache::rotate_sinks(std::int64_t shift) {
  const LayerCacheShape& layer = shape();
  const auto half = static_cast<std::int64_t>(frequencies_.size());
  const auto element = static_cast<std::int64_t>(size_of(layer.dtype));
  const std::int64_t key_bytes = layer.kv_heads * sinks_ * layer.head_dim * element;
  sinks_rows_.resize(static_cast<std::size_t>(key_bytes + layer.kv_heads * sinks_ * layer.value_dim * element));
  std::vector<float> row(static_cast<std::size_t>(layer.head_dim));
  for (std::int64_t head = 0; head < layer.kv_heads; ++head) {
    const AttentionInputs inputs = inputs_of_head(head);
    const Problem problem = problem_of_head(head, 0);
    const kernels::KeyRows keys = kernels::key_rows_of(problem, inputs.k, inputs.pages, 0, 0);
    const kernels::KeyRows values = kernels::key_rows_of(problem, inputs.v, inputs.pages, 0, 0);
    for (std::int64_t sink = 0; sink < sinks_; ++sink) {
      to_float(keys.row(sink), layer.dtype, layer.head_dim, row.data());
      for (std::int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(shift) * frequencies_[static_cast<std::size_t>(i)];
        const double low = row[static_cast<std::size_t>(i)];
        const double high = row[static_cast<std::size_t>(i + half)];
        row[static_cast<std::size_t>(i)] = static_cast<float>(low * std::cos(angle) - high * std::sin(angle));
        row[static_cast<std::size_t>(i + half)] = static_cast<float>(high * std::cos(angle) + low * std::sin(angle));
      }
      const std::int64_t place = head * sinks_ + sink;
      from_float(row.data(), layer.head_dim, layer.dtype, sinks_rows_.data() + place * layer.head_dim * element);
      std::copy_n(values.row(sink), layer.value_dim * element,
                  sinks_rows_.data() + key_bytes + place * layer.value_dim * element);
    }
  }
  moved_.k = view_of(sinks_rows_.data(), layer.dtype, {layer.kv_heads, 1, sinks_, layer.head_dim});
  moved_.v = view_of(sinks_rows_.data() + key_bytes, layer.dtype, {layer.kv_heads, 1, sinks_, layer.value_dim});
}

RunReport SlotCache::attend_kept_rows(const CacheCall& call, const PlanContext& context) {
  constexpr std::int64_t tile_q = 128;
  const LayerCacheShape& layer = shape();
  const std::int64_t rows = call.q.tokens();
  if (rows > 1) sort_slots();
  make_room(rows);
  const std::int64_t size = size_of_head(0);
  const std::int64_t shift = tokens() - size;
  if (shift == 0 || sinks_ == 0) {
    return attend_kept(pages(), call.q, {}, nullptr, call.outputs, context, call.executed);
  }
  rotate_sinks(shift);
  LayerCacheShape head = layer;
  head.q_heads = layer.group();
  head.kv_heads = 1;
  Problem problem = cache_problem(head, rows, size);
  problem.batch = layer.kv_heads;
  PlanBuilder builder(problem, tile_q, tile_q, 1, layer.kv_heads);
  const std::uint16_t moved = builder.add_source({"moved sinks", sinks_, false});
  const std::int64_t causal = builder.add_band({-1, 0});
  for (std::int64_t kv_head = 0; kv_head < layer.kv_heads; ++kv_head) {
    for (std::int64_t tile = 0; tile < rows; tile += tile_q) {
      builder.run(0, sinks_, EntryMask::none, 0, moved);
      const std::int64_t common = size - rows + tile + 1;  // what the first row of the tile sees, all see
      const std::int64_t end = std::min(size, size - rows + tile + tile_q);
      builder.run(sinks_, common - sinks_);
      builder.run(common, end - common, EntryMask::band, causal);
      builder.end_row();
    }
  }
  Plan plan = std::move(builder).finish();
  AttentionInputs inputs = pages().inputs();
  inputs.q = heads_as_batch(call.q, layer.kv_heads);
  inputs.sources.push_back(moved_);
  const RunReport report =
      run(plan, inputs, {heads_as_batch(call.outputs.o, layer.kv_heads), call.outputs.lse}, context.run);
  if (call.executed != nullptr) *call.executed = std::move(plan);
  return report;
}

void SlotCache::truncated(std::int64_t tokens) {
  if (tokens == 0) std::vector<std::byte>().swap(sinks_rows_);
}

}  // namespace tessera
