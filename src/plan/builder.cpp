// Building plans: the builder, joining of blocks, and dense attention as a plan.
#include <algorithm>
#include <cstddef>
#include <limits>
#include <numeric>
#include <utility>

#include "core/error.h"
#include "core/parallel.h"
#include "plan/geometry.h"
#include "tessera/plan.h"

namespace tessera {

namespace {

template <class T>
std::size_t bytes_of(const std::vector<T>& values) {
  return values.capacity() * sizeof(T);
}

}  // namespace

void check_division(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k, std::int64_t plan_heads,
                    std::int64_t plan_sequences) {
  constexpr std::int64_t maximum = std::numeric_limits<std::int32_t>::max();
  require(tile_q >= 1 && tile_q <= maximum, "tile_q is {}; expected 1 to {}", tile_q, maximum);
  require(tile_k >= 1 && tile_k <= maximum, "tile_k is {}; expected 1 to {}", tile_k, maximum);
  require(plan_heads == 1 || plan_heads == problem.kv_heads || plan_heads == problem.q_heads,
          "plan_heads is {}; expected 1, kv_heads {} or q_heads {}", plan_heads, problem.kv_heads, problem.q_heads);
  require(plan_sequences == problem.batch || (plan_sequences == 1 && !problem.variable_length()),
          "plan_sequences is {}; expected the batch {}{}", plan_sequences, problem.batch,
          problem.variable_length() ? "" : " or 1");
}

std::int64_t Plan::queries_of(std::int64_t block) const {
  if (!query_order.empty() && !query_order[block].empty()) return static_cast<std::int64_t>(query_order[block].size());
  return problem.q_len_of(sequence_of_block(block));
}

std::int64_t Plan::source_keys(std::uint16_t source, std::int64_t block) const {
  return source == 0 ? problem.kv_len_of(sequence_of_block(block)) : sources[source].keys;
}

Plan::KeyRange Plan::keys_of(const PlanEntry& entry, std::int64_t block) const {
  if (entry.kind != EntryKind::tile) return {entry.begin, entry.count};
  const std::int64_t begin = entry.begin * tile_k;
  const std::int64_t end = std::min((entry.begin + entry.count) * tile_k, source_keys(entry.source, block));
  return {begin, end - begin};
}

std::size_t Plan::memory_bytes() const {
  std::size_t bytes = bytes_of(row_begin) + bytes_of(entry_begin) + bytes_of(entries) + bytes_of(tokens) +
                      bytes_of(mask_words) + bytes_of(bands) + bytes_of(sources) + bytes_of(query_order) +
                      bytes_of(key_order) + bytes_of(problem.cu_seqlens_q) + bytes_of(problem.cu_seqlens_k);
  for (const auto& order : query_order) bytes += bytes_of(order);
  for (const auto& order : key_order) bytes += bytes_of(order);
  return bytes;
}

bool same_problem(const Problem& a, const Problem& b) {
  return a.batch == b.batch && a.q_heads == b.q_heads && a.kv_heads == b.kv_heads && a.q_len == b.q_len &&
         a.kv_len == b.kv_len && a.head_dim == b.head_dim && a.value_dim == b.value_dim && a.scale == b.scale &&
         a.causal == b.causal && a.q_offset == b.q_offset && a.cu_seqlens_q == b.cu_seqlens_q &&
         a.cu_seqlens_k == b.cu_seqlens_k && a.grid == b.grid;
}

bool operator==(const Plan& a, const Plan& b) {
  return same_problem(a.problem, b.problem) && a.tile_q == b.tile_q && a.tile_k == b.tile_k &&
         a.plan_sequences == b.plan_sequences && a.plan_heads == b.plan_heads && a.row_begin == b.row_begin &&
         a.entry_begin == b.entry_begin && a.entries == b.entries && a.tokens == b.tokens &&
         a.mask_words == b.mask_words && a.bands == b.bands && a.sources == b.sources &&
         a.query_order == b.query_order && a.key_order == b.key_order;
}

PlanBuilder::PlanBuilder(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k, std::int64_t plan_heads,
                         std::int64_t plan_sequences) {
  problem.validate();
  check_division(problem, tile_q, tile_k, plan_heads, plan_sequences);
  plan_.problem = problem;
  plan_.tile_q = tile_q;
  plan_.tile_k = tile_k;
  plan_.plan_heads = plan_heads;
  plan_.plan_sequences = plan_sequences;
  part_blocks_ = blocks();
  plan_.entry_begin.push_back(0);
}

PlanBuilder PlanBuilder::for_block(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k,
                                   std::int64_t plan_heads, std::int64_t plan_sequences, std::int64_t block) {
  PlanBuilder builder(problem, tile_q, tile_k, plan_heads, plan_sequences);
  require(block >= 0 && block < builder.blocks(), "block is {}; expected 0 to {}", block, builder.blocks() - 1);
  builder.first_block_ = block;
  builder.part_blocks_ = 1;
  return builder;
}

std::int64_t PlanBuilder::query_tiles(std::int64_t block) const {
  const auto local = static_cast<std::size_t>(block - first_block_);
  const bool subset = local < plan_.query_order.size() && !plan_.query_order[local].empty();
  const std::int64_t queries = subset ? static_cast<std::int64_t>(plan_.query_order[local].size())
                                      : plan_.problem.q_len_of(plan_.sequence_of_block(block));
  return ceil_div(queries, plan_.tile_q);
}

void PlanBuilder::reserve(std::size_t entries, std::size_t tokens, std::size_t mask_words) {
  plan_.entries.reserve(plan_.entries.size() + entries);
  plan_.tokens.reserve(plan_.tokens.size() + tokens);
  plan_.mask_words.reserve(plan_.mask_words.size() + mask_words);
  std::int64_t rows = 1;
  for (std::int64_t b = 0; b < part_blocks_; ++b) rows += query_tiles(first_block_ + b);
  plan_.entry_begin.reserve(static_cast<std::size_t>(rows));
}

std::uint16_t PlanBuilder::add_source(KeySourceInfo source) {
  require(plan_.sources.size() < std::numeric_limits<std::uint16_t>::max(), "more than {} key sources",
          plan_.sources.size());
  require(source.keys >= 0, "source '{}' has {} keys; expected 0 or more", source.name, source.keys);
  plan_.sources.push_back(std::move(source));
  return static_cast<std::uint16_t>(plan_.sources.size() - 1);
}

std::int64_t PlanBuilder::add_band(Window band) {
  require(band.left >= -1 && band.right >= -1, "band is ({}, {}); expected -1 (unlimited) or more", band.left,
          band.right);
  const auto found = std::find(plan_.bands.begin(), plan_.bands.end(), band);
  if (found != plan_.bands.end()) return found - plan_.bands.begin();
  plan_.bands.push_back(band);
  return static_cast<std::int64_t>(plan_.bands.size()) - 1;
}

void PlanBuilder::set_query_order(std::int64_t block, std::vector<std::int32_t> order) {
  require(block >= first_block_ && block < first_block_ + part_blocks_, "block is {}; expected {} to {}", block,
          first_block_, first_block_ + part_blocks_ - 1);
  plan_.query_order.resize(static_cast<std::size_t>(part_blocks_));
  plan_.query_order[block - first_block_] = std::move(order);
}

void PlanBuilder::set_key_order(std::int64_t block, std::vector<std::int32_t> order) {
  require(block >= first_block_ && block < first_block_ + part_blocks_, "block is {}; expected {} to {}", block,
          first_block_, first_block_ + part_blocks_ - 1);
  plan_.key_order.resize(static_cast<std::size_t>(part_blocks_));
  plan_.key_order[block - first_block_] = std::move(order);
}

Plan PlanBuilder::finish() && {
  plan_.row_begin.assign(1, 0);
  for (std::int64_t b = 0; b < part_blocks_; ++b) {
    plan_.row_begin.push_back(plan_.row_begin.back() + query_tiles(first_block_ + b));
  }
  require(plan_.rows() == plan_.row_begin.back(), "{} plan rows were ended; expected {} ({} blocks, tile_q {})",
          plan_.rows(), plan_.row_begin.back(), part_blocks_, plan_.tile_q);
  return std::move(plan_);
}

Plan concatenate_blocks(const Problem& problem, std::int64_t plan_heads, std::int64_t plan_sequences,
                        std::span<const Plan> parts) {
  require(!parts.empty(), "no parts to join");
  const Plan& first = parts.front();
  check_division(problem, first.tile_q, first.tile_k, plan_heads, plan_sequences);
  require(static_cast<std::int64_t>(parts.size()) == plan_heads * plan_sequences,
          "{} parts to join; expected {} (plan_heads {} x plan_sequences {})", parts.size(),
          plan_heads * plan_sequences, plan_heads, plan_sequences);

  Plan joined;
  joined.problem = problem;
  joined.tile_q = first.tile_q;
  joined.tile_k = first.tile_k;
  joined.plan_heads = plan_heads;
  joined.plan_sequences = plan_sequences;
  joined.sources = first.sources;

  struct Placement {
    std::int64_t row = 0, entry = 0, token = 0, mask_word = 0;
    std::vector<std::int64_t> band;  // index in the part -> index in the joined plan
  };
  std::vector<Placement> placements(parts.size());
  Placement end;
  joined.row_begin.push_back(0);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Plan& part = parts[i];
    require(part.tile_q == first.tile_q && part.tile_k == first.tile_k,
            "part {} has tiles {} x {}; the first part has {} x {}", i, part.tile_q, part.tile_k, first.tile_q,
            first.tile_k);
    require(part.row_begin.size() == 2, "part {} holds {} blocks; expected 1", i, part.row_begin.size() - 1);
    require(part.sources == first.sources, "part {} has other key sources than the first part", i);
    placements[i] = end;
    for (const Window& band : part.bands) {
      auto found = std::find(joined.bands.begin(), joined.bands.end(), band);
      if (found == joined.bands.end()) found = joined.bands.insert(found, band);
      placements[i].band.push_back(found - joined.bands.begin());
    }
    if (!part.query_order.empty()) {
      joined.query_order.resize(parts.size());
      joined.query_order[i] = part.query_order.front();
    }
    if (!part.key_order.empty()) {
      joined.key_order.resize(parts.size());
      joined.key_order[i] = part.key_order.front();
    }
    end.row += part.rows();
    end.entry += static_cast<std::int64_t>(part.entries.size());
    end.token += static_cast<std::int64_t>(part.tokens.size());
    end.mask_word += static_cast<std::int64_t>(part.mask_words.size());
    joined.row_begin.push_back(end.row);
  }
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::int64_t tiles = ceil_div(joined.queries_of(static_cast<std::int64_t>(i)), joined.tile_q);
    require(parts[i].rows() == tiles, "part {} has {} rows; block {} has {} query tiles", i, parts[i].rows(), i, tiles);
  }

  joined.entry_begin.resize(static_cast<std::size_t>(end.row + 1));
  joined.entries.resize(static_cast<std::size_t>(end.entry));
  joined.tokens.resize(static_cast<std::size_t>(end.token));
  joined.mask_words.resize(static_cast<std::size_t>(end.mask_word));
  joined.entry_begin.back() = end.entry;
  parallel_for(static_cast<std::int64_t>(parts.size()), 0, [&](std::int64_t i, int) {
    const Plan& part = parts[i];
    const Placement& at = placements[i];
    for (std::int64_t r = 0; r < part.rows(); ++r) joined.entry_begin[at.row + r] = at.entry + part.entry_begin[r];
    for (std::size_t e = 0; e < part.entries.size(); ++e) {
      PlanEntry entry = part.entries[e];
      if (entry.kind == EntryKind::gather) entry.begin += at.token;
      if (entry.mask == EntryMask::band) entry.mask_index = at.band.at(static_cast<std::size_t>(entry.mask_index));
      if (entry.mask == EntryMask::bitmask) entry.mask_index += at.mask_word;
      joined.entries[at.entry + static_cast<std::int64_t>(e)] = entry;
    }
    std::copy(part.tokens.begin(), part.tokens.end(), joined.tokens.begin() + at.token);
    std::copy(part.mask_words.begin(), part.mask_words.end(), joined.mask_words.begin() + at.mask_word);
  });
  return joined;
}

Plan dense_plan(const Problem& problem, std::int64_t tile_q, std::int64_t tile_k) {
  const std::int64_t sequences = problem.variable_length() ? problem.batch : 1;
  PlanBuilder builder(problem, tile_q, tile_k, 1, sequences);
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t queries = problem.q_len_of(s);
    const std::int64_t keys = problem.kv_len_of(s);
    const std::int64_t offset = problem.q_offset_of(s);
    for (std::int64_t first = 0; first < queries; first += tile_q) {
      if (!problem.causal) {
        builder.run(0, keys);
      } else {
        const std::int64_t last = std::min(first + tile_q, queries) - 1;
        const std::int64_t visible = std::clamp<std::int64_t>(offset + last + 1, 0, keys);
        // The first row of the tile sees every key that the last one sees only beyond the diagonal's end.
        const bool entire = offset + first + 1 >= visible;
        builder.run(0, visible, entire ? EntryMask::none : EntryMask::band);
      }
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

}  // namespace tessera
