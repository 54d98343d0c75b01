// Caches of sinks and recent tokens: what streaming heads of DuoAttention and StreamingLLM keep.
#pragma once

#include <cstdint>
#include <vector>

#include "methods/evicting_cache.h"

namespace tessera {

/// Heads with a window keep their sinks and the last tokens, the others everything. A prompt that the cache's own
/// method runs comes in by chunks, of which they keep no more than that, so that their memory is constant; one that
/// another method runs is whole until its end.
class WindowCache final : public EvictingCache {
 public:
  /// `windows` of the kv heads; they keep `tail` tokens behind their sinks from one pass to the next. With
  /// `whole_chunk` rows see all that is there when they come.
  WindowCache(const LayerCacheShape& shape, std::vector<HeadWindow> windows, std::int64_t tail, bool whole_chunk)
      : EvictingCache(shape, !shape.own_prompt), windows_(std::move(windows)), no_windows_(whole_chunk), tail_(tail) {}

 private:
  std::span<const HeadWindow> windows() const override {
    return no_windows_ ? std::span<const HeadWindow>() : std::span<const HeadWindow>(windows_);
  }
  void observe_prompt(const CacheCall&, std::span<const float>, const PlanContext& context) override {
    if (!whole()) keep(choose(context));
  }
  bool evicts() const override { return whole(); }
  KeptSlots choose(const PlanContext& context) override;
  void observe_decode(const CacheCall& call, std::span<const float> lse, const PlanContext& context) override;

  std::vector<HeadWindow> windows_;
  bool no_windows_;
  std::int64_t tail_;
};

/// StreamingLLM's cache (arXiv:2309.17453): all heads keep `sinks` first and `recent` last tokens, and positions are
/// slots of the cache: the key in slot i has position i, whatever its place in the text was. Tokens of a pass that find
/// the cache full make room before they attend; they see what is left and each other, causally. The prompt is whole, at
/// its true positions, until its end.
///
/// Keys come with their true positions rotated in, and rotations add up: tokens that follow each other are as far apart
/// as their slots, and only the sinks move, by the number of tokens that are gone.
class SlotCache final : public EvictingCache {
 public:
  /// Throws Error when shape.rope_theta is 0: nobody knows how keys were rotated.
  SlotCache(const LayerCacheShape& shape, std::int64_t sinks, std::int64_t recent);

 private:
  bool evicts() const override { return true; }
  KeptSlots choose(const PlanContext& context) override;
  RunReport attend_kept_rows(const CacheCall& call, const PlanContext& context) override;
  /// Drops the oldest tokens behind the sinks until those of the pass, `rows`, fit the window with the ones before
  /// them, or are alone with the sinks.
  void make_room(std::int64_t rows);
  /// The sinks of every head, `shift` positions later.
  void rotate_sinks(std::int64_t shift);
  std::size_t bytes_of_notes() const override { return sinks_rows_.size(); }
  void truncated(std::int64_t tokens) override;

  std::int64_t sinks_;
  std::int64_t recent_;
  std::vector<double> frequencies_;    ///< [head_dim / 2]
  std::vector<std::byte> sinks_rows_;  ///< [2][kv_heads, 1, sinks, dim]: rotated keys, and values
  KeySource moved_;
};

}  // namespace tessera
