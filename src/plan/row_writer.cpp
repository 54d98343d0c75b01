#include "plan/row_writer.h"

#include <algorithm>

#include "plan/geometry.h"

namespace tessera {

namespace {

/// Stretches below this length are gathered: an entry costs as much memory as six tokens and a kernel pads it anyway.
constexpr std::int64_t kShortRun = 16;

}  // namespace

void RowWriter::begin_row(std::int64_t rows, std::int64_t keys, std::uint16_t source) {
  rows_ = rows;
  keys_ = keys;
  source_ = source;
  segments_.clear();
  words_.clear();
}

void RowWriter::bits(std::int64_t begin, std::int64_t end, std::span<const std::uint64_t> words) {
  const std::uint64_t whole = ~std::uint64_t{0} >> (64 - (end - begin));
  std::uint64_t any = 0;
  std::uint64_t every = whole;
  for (const std::uint64_t word : words) {
    any |= word;
    every &= word;
  }
  if (any == 0) return;
  if (every == whole) return all(begin, end);
  const auto at = static_cast<std::int64_t>(words_.size());
  words_.insert(words_.end(), words.begin(), words.end());
  add({begin, end, EntryMask::bitmask, 0, at});
}

void RowWriter::add(const Segment& segment) {
  if (segment.begin >= segment.end) return;
  if (!segments_.empty()) {
    Segment& last = segments_.back();
    if (last.end == segment.begin && last.mask == segment.mask && last.mask != EntryMask::bitmask &&
        last.band == segment.band) {
      last.end = segment.end;
      return;
    }
  }
  segments_.push_back(segment);
}

void RowWriter::finish_row() {
  const auto alike = [](const Segment& a, const Segment& b) { return a.mask == b.mask && a.band == b.band; };
  short_.clear();
  for (std::size_t i = 0; i < segments_.size();) {
    std::size_t last = i + 1;  // neighbours of one kind: only bitmasks are still apart
    while (last < segments_.size() && segments_[last].begin == segments_[last - 1].end &&
           alike(segments_[last], segments_[i])) {
      ++last;
    }
    const std::span<const Segment> group(segments_.data() + i, last - i);
    if (group.back().end - group.front().begin < kShortRun) {
      short_.insert(short_.end(), group.begin(), group.end());
    } else {
      write_run(group);
    }
    i = last;
  }
  std::stable_sort(short_.begin(), short_.end(), [](const Segment& a, const Segment& b) {
    return a.mask != b.mask ? a.mask < b.mask : a.band < b.band;
  });
  for (std::size_t i = 0; i < short_.size();) {
    std::size_t last = i + 1;
    while (last < short_.size() && alike(short_[last], short_[i])) ++last;
    const std::span<const Segment> group(short_.data() + i, last - i);
    group.size() == 1 ? write_run(group) : write_gather(group);
    i = last;
  }
}

void RowWriter::write_run(std::span<const Segment> segments) {
  const std::int64_t begin = segments.front().begin;
  const std::int64_t end = segments.back().end;
  const std::int64_t mask_index = mask_index_of(segments);
  const std::int64_t tile_k = builder_.tile_k();
  if (begin % tile_k == 0 && (end % tile_k == 0 || end == keys_)) {
    builder_.tiles(begin / tile_k, ceil_div(end, tile_k) - begin / tile_k, segments.front().mask, mask_index, source_);
  } else {
    builder_.run(begin, end - begin, segments.front().mask, mask_index, source_);
  }
}

void RowWriter::write_gather(std::span<const Segment> segments) {
  tokens_.clear();
  for (const Segment& segment : segments) {
    for (std::int64_t key = segment.begin; key < segment.end; ++key) tokens_.push_back(static_cast<std::int32_t>(key));
  }
  builder_.gather(builder_.add_tokens(tokens_), static_cast<std::int64_t>(tokens_.size()), segments.front().mask,
                  mask_index_of(segments), source_);
}

std::int64_t RowWriter::mask_index_of(std::span<const Segment> segments) {
  if (segments.front().mask != EntryMask::bitmask) return segments.front().band;
  std::int64_t keys = 0;
  for (const Segment& segment : segments) keys += segment.end - segment.begin;
  const std::int64_t words = mask_words_of(keys);
  mask_.assign(static_cast<std::size_t>(rows_ * words), 0);
  std::int64_t at = 0;
  for (const Segment& segment : segments) {
    for (std::int64_t row = 0; row < rows_; ++row) {
      const std::uint64_t bits = words_[segment.words + row];
      std::uint64_t* to = mask_.data() + row * words + at / 64;
      to[0] |= bits << (at % 64);
      if (at % 64 + segment.end - segment.begin > 64) to[1] |= bits >> (64 - at % 64);
    }
    at += segment.end - segment.begin;
  }
  return builder_.add_mask(mask_);
}

}  // namespace tessera
