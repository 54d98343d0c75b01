// Writes a row of a plan from segments in ascending order, as few and as plain entries as they allow.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tessera/plan.h"

namespace tessera {

/// Neighbouring segments of one kind become one run (tiles where aligned); the short ones of a row share a gather list.
class RowWriter {
 public:
  explicit RowWriter(PlanBuilder& builder) : builder_(builder) {}

  /// Starts a row of `rows` queries over a source of `keys` keys.
  void begin_row(std::int64_t rows, std::int64_t keys, std::uint16_t source);
  void all(std::int64_t begin, std::int64_t end) { add({begin, end, EntryMask::none, 0, 0}); }
  void band(std::int64_t begin, std::int64_t end, const Window& window) {
    add({begin, end, EntryMask::band, builder_.add_band(window), 0});
  }
  /// At most 64 keys; one word per query.
  void bits(std::int64_t begin, std::int64_t end, std::span<const std::uint64_t> words);
  /// Writes the entries. Does not end the builder's row: other sources may follow.
  void finish_row();

 private:
  struct Segment {
    std::int64_t begin;
    std::int64_t end;
    EntryMask mask;
    std::int64_t band;
    std::int64_t words;  ///< place of the first word in words_
  };

  void add(const Segment& segment);
  void write_run(std::span<const Segment> segments);
  void write_gather(std::span<const Segment> segments);
  std::int64_t mask_index_of(std::span<const Segment> segments);

  PlanBuilder& builder_;
  std::int64_t rows_ = 0;
  std::int64_t keys_ = 0;
  std::uint16_t source_ = 0;
  std::vector<Segment> segments_;
  std::vector<Segment> short_;
  std::vector<std::uint64_t> words_;  ///< bits of the segments of this row
  std::vector<std::uint64_t> mask_;
  std::vector<std::int32_t> tokens_;
};

}  // namespace tessera
