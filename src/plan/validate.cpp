// Checks that a plan means what it says. Linear in the entries; only rows whose entries interleave are looked at
// closer.
#include <algorithm>
#include <cstddef>
#include <limits>

#include "core/error.h"
#include "plan/geometry.h"
#include "plan/pieces.h"
#include "plan/row_sweep.h"
#include "tessera/plan.h"

namespace tessera {

namespace {

constexpr std::int64_t kLargestIndex = std::numeric_limits<std::int32_t>::max();

/// Maximum of key positions over any range of places, by chunks.
class ChunkMaximum {
 public:
  explicit ChunkMaximum(std::span<const std::int32_t> values) : values_(values) {
    for (std::size_t i = 0; i < values.size(); i += chunk) {
      const auto part = values.subspan(i, std::min(chunk, values.size() - i));
      maxima_.push_back(*std::max_element(part.begin(), part.end()));
    }
  }
  std::int64_t over(std::int64_t begin, std::int64_t end) const {
    std::int32_t largest = std::numeric_limits<std::int32_t>::min();
    while (begin < end) {
      const bool whole = begin % static_cast<std::int64_t>(chunk) == 0 && begin + std::int64_t{chunk} <= end;
      largest = std::max(largest, whole ? maxima_[begin / std::int64_t{chunk}] : values_[begin]);
      begin += whole ? std::int64_t{chunk} : 1;
    }
    return largest;
  }

 private:
  static constexpr std::size_t chunk = 64;
  std::span<const std::int32_t> values_;
  std::vector<std::int32_t> maxima_;
};

/// Places in the token pool where a list cannot go on: tokens that are not above (or not at least) the one before.
struct TokenBreaks {
  std::vector<std::int64_t> not_above;
  std::vector<std::int64_t> below;

  explicit TokenBreaks(std::span<const std::int32_t> tokens) {
    for (std::size_t i = 1; i < tokens.size(); ++i) {
      if (tokens[i] > tokens[i - 1]) continue;
      not_above.push_back(static_cast<std::int64_t>(i));
      if (tokens[i] < tokens[i - 1]) below.push_back(static_cast<std::int64_t>(i));
    }
  }
  bool ascending(std::int64_t begin, std::int64_t count, bool repeats) const {
    const auto& breaks = repeats ? below : not_above;
    const auto next = std::upper_bound(breaks.begin(), breaks.end(), begin);
    return next == breaks.end() || *next >= begin + count;
  }
};

void check_order(const std::vector<std::int32_t>& order, std::string_view name, std::int64_t block, std::int64_t tokens,
                 bool whole) {
  if (order.empty()) return;
  const auto size = static_cast<std::int64_t>(order.size());
  require(whole ? size == tokens : size <= tokens, "{} of block {} has {} entries; expected {}{}", name, block, size,
          whole ? "" : "at most ", tokens);
  std::vector<bool> seen(static_cast<std::size_t>(tokens));
  for (const std::int32_t token : order) {
    require(token >= 0 && token < tokens, "{} of block {} holds {}; expected 0 to {}", name, block, token, tokens - 1);
    require(!seen[token], "{} of block {} holds {} twice", name, block, token);
    seen[token] = true;
  }
}

void check_frame(const Plan& plan) {
  const Problem& problem = plan.problem;
  problem.validate();
  check_division(problem, plan.tile_q, plan.tile_k, plan.plan_heads, plan.plan_sequences);
  const double pairs = static_cast<double>(problem.batch) * static_cast<double>(problem.q_heads) *
                       static_cast<double>(problem.q_len) * static_cast<double>(problem.kv_len);
  require(pairs < 4.0e18, "the problem has {} (query, key) pairs; expected fewer than 2^62", pairs);

  const std::int64_t blocks = plan.plan_heads * plan.plan_sequences;
  require(static_cast<std::int64_t>(plan.row_begin.size()) == blocks + 1,
          "row_begin has {} entries; expected {} (plan_heads {} x plan_sequences {} + 1)", plan.row_begin.size(),
          blocks + 1, plan.plan_heads, plan.plan_sequences);
  const auto expect_blocks = [&](std::size_t size, std::string_view name) {
    require(size == 0 || static_cast<std::int64_t>(size) == blocks, "{} has {} entries; expected 0 or {}", name, size,
            blocks);
  };
  expect_blocks(plan.query_order.size(), "query_order");
  expect_blocks(plan.key_order.size(), "key_order");
  require(plan.row_begin.front() == 0, "row_begin[0] is {}; expected 0", plan.row_begin.front());
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t sequence = plan.sequence_of_block(b);
    if (!plan.query_order.empty()) {
      check_order(plan.query_order[b], "query_order", b, problem.q_len_of(sequence), false);
    }
    if (!plan.key_order.empty()) check_order(plan.key_order[b], "key_order", b, problem.kv_len_of(sequence), true);
    const std::int64_t tiles = ceil_div(plan.queries_of(b), plan.tile_q);
    require(plan.row_begin[b + 1] - tiles == plan.row_begin[b], "block {} has rows {} to {}; expected {} query tiles",
            b, plan.row_begin[b], plan.row_begin[b + 1], tiles);
  }

  require(plan.rows() == plan.row_begin.back() && !plan.entry_begin.empty(), "entry_begin has {} rows; expected {}",
          plan.rows(), plan.row_begin.back());
  require(plan.entry_begin.front() == 0, "entry_begin[0] is {}; expected 0", plan.entry_begin.front());
  require(std::is_sorted(plan.entry_begin.begin(), plan.entry_begin.end()), "entry_begin decreases");
  require(plan.entry_begin.back() == static_cast<std::int64_t>(plan.entries.size()),
          "entry_begin ends at {}; the plan has {} entries", plan.entry_begin.back(), plan.entries.size());
}

void check_tables(const Plan& plan) {
  require(!plan.bands.empty() && plan.bands.front() == Window{-1, 0}, "bands[0] must be the causal window (-1, 0)");
  for (const Window& band : plan.bands) {
    require(band.left >= -1 && band.right >= -1 && band.left <= kLargestIndex && band.right <= kLargestIndex,
            "band is ({}, {}); expected -1 (unlimited) to {}", band.left, band.right, kLargestIndex);
  }
  require(!plan.sources.empty() && plan.sources.size() <= 65536, "the plan has {} key sources; expected 1 to 65536",
          plan.sources.size());
  require(plan.sources[0].keys == 0 && !plan.sources[0].repeats_allowed,
          "source 0 must be the raw keys: keys 0, no repeats");
  for (const KeySourceInfo& source : plan.sources) {
    require(source.keys >= 0 && source.keys <= kLargestIndex, "source '{}' has {} keys; expected 0 to {}", source.name,
            source.keys, kLargestIndex);
  }
}

/// Checks the rows of one block.
class BlockValidator {
 public:
  BlockValidator(const Plan& plan, std::int64_t block, const TokenBreaks& breaks)
      : plan_(plan), view_(plan, block), breaks_(breaks), largest_position_(view_.key_order) {}

  void check() {
    for (tile_ = 0; tile_ < view_.tiles(); ++tile_) check_row();
  }

 private:
  std::int64_t row_index() const { return plan_.row_begin[view_.block] + tile_; }

  template <class... Args>
  void expect(bool condition, fmt::format_string<Args...> format, Args&&... args) const {
    if (condition) return;
    fail("block {}, query tile {}, entry {}: {}", view_.block, tile_, entry_,
         fmt::format(format, std::forward<Args>(args)...));
  }

  void check_row() {
    rows_ = view_.rows_of(tile_);
    const std::int64_t first_place = tile_ * plan_.tile_q;
    first_position_ = view_.query_position(first_place);
    if (!view_.query_order.empty()) {
      positions_.resize(static_cast<std::size_t>(rows_));
      for (std::int64_t r = 0; r < rows_; ++r) positions_[r] = view_.query_position(first_place + r);
      std::sort(positions_.begin(), positions_.end());
      first_position_ = positions_.front();
    }
    bool interleaved = false;
    std::uint16_t source = 0;
    std::int64_t end = 0;
    entry_ = 0;
    for (const PlanEntry& entry : plan_.row(row_index())) {
      const Piece hull = check_entry(entry);
      interleaved = interleaved || entry.source < source || (entry.source == source && hull.begin < end);
      source = entry.source;
      end = hull.end;
      ++entry_;
    }
    if (interleaved) check_overlap();
  }

  /// Checks an entry by itself and returns the keys from its first to its last.
  Piece check_entry(const PlanEntry& entry) const {
    expect(entry.kind <= EntryKind::gather && entry.mask <= EntryMask::bitmask, "unknown kind or mask");
    expect(entry.source < plan_.sources.size(), "source {} does not exist; the plan has {}", entry.source,
           plan_.sources.size());
    const std::int64_t keys = plan_.source_keys(entry.source, view_.block);
    const std::int64_t units = entry.kind == EntryKind::tile  ? ceil_div(keys, plan_.tile_k)
                               : entry.kind == EntryKind::run ? keys
                                                              : static_cast<std::int64_t>(plan_.tokens.size());
    expect(entry.count > 0 && entry.begin >= 0 && entry.begin <= units - entry.count,
           "begin {} and count {} are out of range; expected a part of 0 to {}", entry.begin, entry.count, units);
    const Plan::KeyRange range = plan_.keys_of(entry, view_.block);
    Piece hull{range.begin, range.begin + range.count, entry.source, entry.mask, entry.mask_index, 0, 0};
    if (entry.kind == EntryKind::gather) {
      const bool repeats = plan_.sources[entry.source].repeats_allowed;
      expect(breaks_.ascending(entry.begin, entry.count, repeats), "the tokens of a gather must ascend");
      hull.begin = plan_.tokens[entry.begin];
      hull.end = std::int64_t{plan_.tokens[entry.begin + entry.count - 1]} + 1;
      expect(hull.begin >= 0 && hull.end <= keys, "tokens {} to {} are out of range; the source has {} keys",
             hull.begin, hull.end - 1, keys);
    }
    check_mask(entry, range.count);
    if (plan_.problem.causal && entry.source == 0) check_causal(entry, hull);
    return hull;
  }

  void check_mask(const PlanEntry& entry, std::int64_t keys) const {
    if (entry.mask == EntryMask::band) {
      expect(entry.source == 0, "a band needs positions, which source {} does not have", entry.source);
      expect(entry.mask_index >= 0 && entry.mask_index < static_cast<std::int64_t>(plan_.bands.size()),
             "band {} does not exist; the plan has {}", entry.mask_index, plan_.bands.size());
    } else if (entry.mask == EntryMask::bitmask) {
      const std::int64_t words = mask_words_of(keys);
      const auto pool = static_cast<std::int64_t>(plan_.mask_words.size());
      expect(entry.mask_index >= 0 && entry.mask_index <= pool - rows_ * words,
             "bitmask at {} needs {} words; the pool has {}", entry.mask_index, rows_ * words, pool);
      if (keys % 64 == 0) return;
      const std::uint64_t unused = ~std::uint64_t{0} << (keys % 64);
      for (std::int64_t r = 0; r < rows_; ++r) {
        expect((plan_.mask_words[entry.mask_index + (r + 1) * words - 1] & unused) == 0,
               "bitmask row {} has bits beyond its {} keys", r, keys);
      }
    }
  }

  /// No pair of the entry may hold a key after the query.
  void check_causal(const PlanEntry& entry, const Piece& hull) const {
    if (view_.key_order.empty() && hull.end <= first_position_ + 1) return;  // every row sees every key
    if (entry.mask == EntryMask::band && plan_.bands[entry.mask_index].right == 0) return;
    if (entry.mask == EntryMask::none) {
      std::int64_t last = hull.end - 1;
      if (!view_.key_order.empty()) {
        last = -1;
        for_each_piece(
            entry, [&](const Piece& piece) { last = std::max(last, largest_position_.over(piece.begin, piece.end)); });
      }
      expect(last <= first_position_, "key {} comes after query {} although the problem is causal", last,
             first_position_);
      return;
    }
    for_each_piece(entry, [&](const Piece& piece) {
      if (piece.mask == EntryMask::bitmask) return check_causal_bits(piece);
      const std::int64_t right = plan_.bands[piece.mask_index].right;
      expect(!any_pair(1, right < 0 ? unlimited : right, piece.begin, piece.end),
             "band {} reaches keys after the query although the problem is causal", piece.mask_index);
    });
  }

  /// Whether a query of the tile at position p and a key of places [begin, end) at position j have
  /// nearest <= j - p <= farthest. Never walks queries x keys: their number comes from a file.
  bool any_pair(std::int64_t nearest, std::int64_t farthest, std::int64_t begin, std::int64_t end) const {
    if (nearest > farthest || begin >= end) return false;
    if (view_.key_order.empty() && view_.query_order.empty()) {
      return std::max(begin, first_position_ + nearest) <= std::min(end - 1, first_position_ + rows_ - 1 + farthest);
    }
    if (view_.key_order.empty()) {
      return std::any_of(positions_.begin(), positions_.end(), [&](std::int64_t p) {
        return std::max(begin, p + nearest) <= std::min(end - 1, p + farthest);
      });
    }
    for (std::int64_t place = begin; place < end; ++place) {
      const std::int64_t low = view_.key_position(place) - farthest;  // positions of queries that make a pair
      const std::int64_t high = view_.key_position(place) - nearest;
      if (view_.query_order.empty()) {
        if (std::max(low, first_position_) <= std::min(high, first_position_ + rows_ - 1)) return true;
        continue;
      }
      const auto next = std::lower_bound(positions_.begin(), positions_.end(), low);
      if (next != positions_.end() && *next <= high) return true;
    }
    return false;
  }

  void check_causal_bits(const Piece& piece) const {
    for (std::int64_t begin = piece.begin; begin < piece.end; begin += chunk_keys) {
      const std::int64_t end = std::min(begin + chunk_keys, piece.end);
      if (view_.key_order.empty() && end <= first_position_ + 1) continue;
      std::uint64_t words[chunk_keys / 64];
      for (std::int64_t r = 0; r < rows_; ++r) {
        row_bits(plan_, view_, tile_, r, piece, begin, end, words);
        const std::int64_t position = view_.query_position(tile_ * plan_.tile_q + r);
        for (std::int64_t i = 0; i < end - begin; ++i) {
          if (words[i / 64] == 0) {
            i += 63 - i % 64;
            continue;
          }
          const bool counts = (words[i / 64] >> (i % 64) & 1) != 0;
          expect(!counts || view_.key_position(begin + i) <= position,
                 "key {} comes after query {} although the problem is causal", view_.key_position(begin + i), position);
        }
      }
    }
  }

  template <class Visit>
  void for_each_piece(const PlanEntry& entry, const Visit& visit) const {
    std::vector<Piece> pieces;
    append_pieces(plan_, view_.block, entry, pieces);
    std::for_each(pieces.begin(), pieces.end(), visit);
  }

  /// No pair twice: pieces of a row may share keys only where their masks are disjoint.
  void check_overlap() const {
    std::vector<Piece> pieces;
    for (const PlanEntry& entry : plan_.row(row_index())) {
      if (!plan_.sources[entry.source].repeats_allowed) append_pieces(plan_, view_.block, entry, pieces);
    }
    if (view_.in_order()) resolve_bands(plan_, view_, tile_, pieces);
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
      return a.source != b.source ? a.source < b.source : a.begin < b.begin;
    });
    std::vector<const Piece*> open;
    for (const Piece& piece : pieces) {
      std::erase_if(open, [&](const Piece* p) { return p->source != piece.source || p->end <= piece.begin; });
      for (const Piece* other : open) check_disjoint(*other, piece);
      open.push_back(&piece);
    }
  }

  void check_disjoint(const Piece& a, const Piece& b) const {
    const std::int64_t last = std::min(a.end, b.end);
    if (a.mask != EntryMask::bitmask && b.mask != EntryMask::bitmask) {
      const Window any{-1, -1};
      const Window both = intersection_of(a.mask == EntryMask::band ? plan_.bands[a.mask_index] : any,
                                          b.mask == EntryMask::band ? plan_.bands[b.mask_index] : any);
      require(
          !any_pair(both.left < 0 ? -unlimited : -both.left, both.right < 0 ? unlimited : both.right, b.begin, last),
          "block {}, query tile {}: two entries cover the same pair, with a key in {} to {} of source {}", view_.block,
          tile_, b.begin, last - 1, a.source);
      return;
    }
    for (std::int64_t begin = b.begin; begin < last; begin += chunk_keys) {
      const std::int64_t end = std::min(begin + chunk_keys, last);
      std::uint64_t a_words[chunk_keys / 64];
      std::uint64_t b_words[chunk_keys / 64];
      const auto words = static_cast<std::size_t>(mask_words_of(end - begin));
      for (std::int64_t r = 0; r < rows_; ++r) {
        row_bits(plan_, view_, tile_, r, a, begin, end, {a_words, words});
        row_bits(plan_, view_, tile_, r, b, begin, end, {b_words, words});
        for (std::size_t w = 0; w < words; ++w) {
          require((a_words[w] & b_words[w]) == 0,
                  "block {}, query tile {}: two entries cover the same pair, query row {} and a key in {} to {} of "
                  "source {}",
                  view_.block, tile_, r, begin, end - 1, a.source);
        }
      }
    }
  }

  static constexpr std::int64_t chunk_keys = 1024;
  static constexpr std::int64_t unlimited = std::int64_t{1} << 40;  ///< beyond every distance of positions

  const Plan& plan_;
  BlockView view_;
  const TokenBreaks& breaks_;
  ChunkMaximum largest_position_;
  std::int64_t tile_ = 0;
  std::int64_t entry_ = 0;
  std::int64_t rows_ = 0;
  std::int64_t first_position_ = 0;      ///< smallest position of the tile's queries
  std::vector<std::int64_t> positions_;  ///< of the tile's queries, sorted; only with a query order
};

}  // namespace

void validate(const Plan& plan) {
  check_frame(plan);
  check_tables(plan);
  const TokenBreaks breaks(plan.tokens);
  for (std::int64_t block = 0; block < plan.plan_heads * plan.plan_sequences; ++block) {
    BlockValidator(plan, block, breaks).check();
  }
}

}  // namespace tessera
