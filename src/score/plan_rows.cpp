#include "score/plan_rows.h"

#include <algorithm>
#include <utility>

namespace tessera::score {

namespace {

/// Shorter stretches of neighbouring keys are cheaper as part of a gather list than as entries of their own.
constexpr std::size_t kShortestRun = 16;

}  // namespace

void PlanRow::run(std::int64_t first, std::int64_t end, EntryMask mask, std::int64_t mask_index) {
  if (first >= end) return;
  entries.push_back({.begin = first,
                     .count = static_cast<std::int32_t>(end - first),
                     .kind = EntryKind::run,
                     .mask = mask,
                     .mask_index = mask_index});
}

void PlanRow::tiles(std::int64_t first, std::int64_t end, EntryMask mask) {
  if (first >= end) return;
  entries.push_back(
      {.begin = first, .count = static_cast<std::int32_t>(end - first), .kind = EntryKind::tile, .mask = mask});
}

void PlanRow::gather(std::span<const std::int32_t> keys, EntryMask mask, std::int64_t mask_index) {
  if (keys.empty()) return;
  entries.push_back({.begin = static_cast<std::int64_t>(tokens.size()),
                     .count = static_cast<std::int32_t>(keys.size()),
                     .kind = EntryKind::gather,
                     .mask = mask,
                     .mask_index = mask_index});
  tokens.insert(tokens.end(), keys.begin(), keys.end());
}

void PlanRow::bits(std::int64_t first, std::int64_t end, std::span<const std::uint64_t> words) {
  if (first >= end) return;
  run(first, end, EntryMask::bitmask, static_cast<std::int64_t>(mask_words.size()));
  mask_words.insert(mask_words.end(), words.begin(), words.end());
}

void PlanRow::everything(const QueryTiles& geometry, std::int64_t tile) {
  visible_run(geometry, tile, 0, geometry.keys);
}

void PlanRow::visible_run(const QueryTiles& geometry, std::int64_t tile, std::int64_t first, std::int64_t end) {
  end = std::min(end, geometry.visible_keys(tile));
  run(first, end, end <= geometry.common_keys(tile) ? EntryMask::none : EntryMask::band);
}

void PlanRow::selected_tiles(const QueryTiles& geometry, std::int64_t tile, std::span<const std::int32_t> selected) {
  const std::int64_t common = geometry.common_keys(tile);
  const std::int64_t whole = common >= geometry.keys ? geometry.key_tiles() : common / geometry.tile_k;
  for (std::size_t i = 0; i < selected.size();) {
    std::size_t end = i + 1;
    while (end < selected.size() && selected[end] == selected[end - 1] + 1) ++end;
    const std::int64_t first = selected[i];
    const std::int64_t last = selected[end - 1] + 1;
    const std::int64_t cut = std::clamp(whole, first, last);
    tiles(first, cut);
    tiles(cut, last, EntryMask::band);
    i = end;
  }
}

void PlanRow::flagged_tiles(const QueryTiles& geometry, std::int64_t tile, std::span<const std::uint8_t> flags) {
  std::vector<std::int32_t> selected;
  for (std::size_t j = 0; j < flags.size(); ++j) {
    if (flags[j] != 0) selected.push_back(static_cast<std::int32_t>(j));
  }
  selected_tiles(geometry, tile, selected);
}

void PlanRow::selected_keys(const QueryTiles& geometry, std::int64_t tile, std::span<const std::int32_t> selected) {
  const std::int64_t common = geometry.common_keys(tile);
  std::vector<std::int32_t> single;
  std::size_t i = 0;
  while (i < selected.size() && selected[i] < common) {
    std::size_t end = i + 1;
    while (end < selected.size() && selected[end] < common && selected[end] == selected[end - 1] + 1) ++end;
    if (end - i >= kShortestRun) {
      run(selected[i], selected[i] + static_cast<std::int64_t>(end - i));
    } else {
      single.insert(single.end(), selected.begin() + static_cast<std::ptrdiff_t>(i),
                    selected.begin() + static_cast<std::ptrdiff_t>(end));
    }
    i = end;
  }
  gather(single);
  gather(selected.subspan(i), EntryMask::band);
}

PlanRows::PlanRows(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k, std::int64_t plan_heads,
                   bool share_sequences)
    : problem_(problem),
      tile_q_(tile_q),
      tile_k_(tile_k),
      plan_heads_(plan_heads),
      plan_sequences_(share_sequences ? 1 : problem.batch),
      first_row_(static_cast<std::size_t>(plan_heads_ * plan_sequences_ + 1)) {
  for (std::int64_t b = 0; b < blocks(); ++b) first_row_[b + 1] = first_row_[b] + geometry(b).count();
  rows_.resize(static_cast<std::size_t>(first_row_.back()));
}

std::int64_t PlanRows::add_band(Window band) {
  const auto found = std::find(bands_.begin(), bands_.end(), band);
  if (found != bands_.end()) return found - bands_.begin();
  bands_.push_back(band);
  return static_cast<std::int64_t>(bands_.size()) - 1;
}

Plan PlanRows::finish(int threads) && {
  std::vector<Plan> parts(static_cast<std::size_t>(blocks()));
  parallel_for(blocks(), threads, [&](std::int64_t block, int) {
    PlanBuilder builder = PlanBuilder::for_block(problem_, tile_q_, tile_k_, plan_heads_, plan_sequences_, block);
    std::vector<std::int64_t> band_index;
    band_index.reserve(bands_.size());
    for (const Window& band : bands_) band_index.push_back(builder.add_band(band));
    std::size_t entries = 0, tokens = 0, mask_words = 0;
    for (std::int64_t r = first_row_[block]; r < first_row_[block + 1]; ++r) {
      entries += rows_[r].entries.size();
      tokens += rows_[r].tokens.size();
      mask_words += rows_[r].mask_words.size();
    }
    builder.reserve(entries, tokens, mask_words);
    for (std::int64_t r = first_row_[block]; r < first_row_[block + 1]; ++r) {
      const PlanRow& row = rows_[r];
      const std::int64_t pool = row.tokens.empty() ? 0 : builder.add_tokens(row.tokens);
      const std::int64_t words = row.mask_words.empty() ? 0 : builder.add_mask(row.mask_words);
      for (const PlanEntry& entry : row.entries) {
        std::int64_t mask_index = entry.mask_index;
        if (entry.mask == EntryMask::band) mask_index = band_index[mask_index];
        if (entry.mask == EntryMask::bitmask) mask_index += words;
        if (entry.kind == EntryKind::tile) builder.tiles(entry.begin, entry.count, entry.mask, mask_index);
        if (entry.kind == EntryKind::run) builder.run(entry.begin, entry.count, entry.mask, mask_index);
        if (entry.kind == EntryKind::gather) builder.gather(pool + entry.begin, entry.count, entry.mask, mask_index);
      }
      builder.end_row();
      rows_[r] = {};
    }
    parts[block] = std::move(builder).finish();
  });
  return concatenate_blocks(problem_, plan_heads_, plan_sequences_, parts);
}

}  // namespace tessera::score
