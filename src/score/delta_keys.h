// Keys as changes against the key before: a bitmap of the channels that moved, and their new values.
//
// DeltaLLM (arXiv 2507.19608): a channel moves only when it differs from the reference by more than theta, and the
// reference moves with it, so that what is held never strays further. Scores of the held keys are running sums over the
// channels that moved.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tessera/attention.h"

namespace tessera::score {

/// Which channels of a key move.
enum class DeltaRule : std::uint8_t {
  channel,  ///< those that differ by more than theta
  row,      ///< all, if the key differs by more than theta in the Euclidean norm
  pairs     ///< of each four the two that differ most, if by more than theta
};

/// Scores start anew from a held key so often: running sums do not drift.
inline constexpr std::int64_t kDeltaPanel = 256;

/// Neighbouring keys of one panel as the kernel reads them.
struct DeltaSpan {
  const std::uint64_t* bits;  ///< [keys][words]
  const float* values;        ///< of the channels that moved, key by key
  std::int64_t keys;
  std::int64_t words;
  std::int64_t dim;
};

/// The kernel text of one instruction set: scores [keys][rows] of queries [dim][rows], from the held key before the
/// span, which moves along.
struct DeltaLevel {
  using Running = void (*)(const DeltaSpan& span, const float* queries, float* held, float* scores);
  Running rows_16;
  Running rows_64;
};

/// The keys of one (sequence, kv head), in order of the tokens.
class DeltaKeys {
 public:
  DeltaKeys(std::int64_t dim, DeltaRule rule, float theta) : dim_(dim), rule_(rule), theta_(theta) {}

  /// Adds rows [count][dim]. All channels of the very first key move.
  void append(const float* rows, std::int64_t count);
  /// Held keys [first, first + count) as rows.
  void expand(std::int64_t first, std::int64_t count, float* out) const;
  /// Forgets all keys from the panel of `count` on; returns how many are left.
  std::int64_t truncate(std::int64_t count);

  std::int64_t keys() const { return keys_; }
  std::int64_t moved() const { return static_cast<std::int64_t>(values_.size()); }
  std::size_t memory_bytes() const;

  /// scores [keys of the panel][rows] (without scale) of queries [dim][rows], rows = 16 or 64; returns the keys.
  std::int64_t panel_scores(std::int64_t panel, const float* queries, std::int64_t rows, Isa isa,
                            std::vector<float>& held, float* scores) const;

 private:
  std::int64_t words() const { return (dim_ + 63) / 64; }
  bool moves(const float* row, std::int64_t channel) const;

  std::int64_t dim_;
  DeltaRule rule_;
  float theta_;
  std::int64_t keys_ = 0;
  std::vector<std::uint64_t> bits_;       ///< [keys][words]
  std::vector<float> values_;             ///< packed
  std::vector<std::size_t> panel_begin_;  ///< [panels] in values_
  std::vector<float> panel_held_;         ///< [panels][dim]: held before the panel's first key
  std::vector<float> held_;               ///< [dim]: the newest
};

}  // namespace tessera::score
