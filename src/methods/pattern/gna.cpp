// Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light, arXiv:2504.16922, on
// grids of one to three axes. Sliding windows (NATTEN), blocked windows (Swin), strided ones (HaloNet, STA) and dilated
// ones are its special cases.
//
// Per axis, a query sees a window of keys: exactly `window` of them, shifted inwards at the borders; `stride` queries
// in a row share the window of the one in their middle; dilation splits an axis into interleaved groups that do not see
// each other; on a causal axis the window ends at the query. A pair counts when every axis allows it. Text keys are
// seen by every query and text queries see everything. src/score/neighborhood.h holds the arithmetic.
//
// Queries and keys are ordered tile by tile, each with its own tile shape, so that what a query tile sees are few dense
// runs of keys; tiles that the window cuts carry a bitmask, which equal tiles share. The simulator chooses the shapes.
//
// Differs from the authors' code: windows and strides beyond an axis are cut to it instead of refused; the ragged tiles
// at the end of an axis are real tiles instead of padding; a plain sequence is a grid of one axis, which is causal in a
// causal problem; on larger grids causality is that of the raster order, on top of the window.
//
// The defaults are those of HunyuanVideo on a grid of 30x48x80, whose first 15 of 50 denoising steps run dense: the
// caller's choice, call by call. `tessera simulate` says what other windows cost.
#include <algorithm>
#include <bit>
#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/neighborhood_parameters.h"
#include "methods/registry.h"

namespace tessera {
namespace {

using score::Extent;
using score::GridTile;
using score::Interval;

/// Larger tiles than this are cut by the kernels anyway.
constexpr std::int64_t kMostTileTokens = 128;
/// Grids of awkward lengths have only tiny tiles that divide them: then rows straddle several.
constexpr std::int64_t kFewestRows = 32;

/// Keys [begin, end) of the key order for all rows, or with words of a bitmask.
struct Piece {
  std::int64_t begin;
  std::int64_t end;
  std::vector<std::uint64_t> words;
};

/// The pattern on one sequence.
class Pattern {
 public:
  Pattern(const Problem& problem, std::int64_t sequence, const score::Neighborhood& axes,
          const score::TileShapes& tiles)
      : grid_(problem.grid_of(sequence)),
        axes_(axes),
        tiles_(tiles),
        key_tiling_(grid_.extent, tiles.k, dilations(axes)),
        offset_(problem.q_offset_of(sequence)) {
    const bool one_axis = grid_.extent[0] == 1 && grid_.extent[1] == 1;
    raster_causal_ = problem.causal && (!one_axis || !axes[2].causal || grid_.prefix + grid_.suffix > 0);
    query_order_ = score::queries_in_order(
        problem, sequence, score::with_text(grid_, score::GridTiling(grid_.extent, tiles.q, dilations(axes)).order()));
    key_order_ = score::with_text(grid_, key_tiling_.order());
  }

  const std::vector<std::int32_t>& query_order() const { return query_order_; }
  const std::vector<std::int32_t>& key_order() const { return key_order_; }

  /// What queries [first, first + count) of the order see, in order of the keys.
  std::vector<Piece> row(std::int64_t first, std::int64_t count) const {
    std::vector<Query> queries;
    queries.reserve(static_cast<std::size_t>(count));
    for (std::int64_t i = first; i < first + count; ++i) queries.push_back(query_at(offset_ + query_order_[i]));

    std::map<std::int64_t, std::int64_t> rows_that_see_all;  // of the key tiles that some row sees
    for (std::size_t begin = 0; begin < queries.size();) {
      std::size_t end = begin + 1;
      while (end < queries.size() && same_tile(queries[begin], queries[end])) ++end;
      visit(std::span(queries).subspan(begin, end - begin), rows_that_see_all);
      begin = end;
    }
    std::vector<Piece> pieces;
    for (const auto& [index, rows] : rows_that_see_all) {
      const GridTile& tile = key_tiling_.tiles()[index];
      if (rows == count) {
        append(pieces, {tile.begin, tile.begin + tile.cells, {}});
      } else {
        append_masked(pieces, tile.begin, tile.cells, queries,
                      [&](const Query& query, std::uint64_t* bits) { set_bits(query, tile, bits); });
      }
    }
    append_text(pieces, grid_.cells(), 0, grid_.prefix, queries);
    append_text(pieces, grid_.cells() + grid_.prefix, grid_.prefix + grid_.cells(), grid_.suffix, queries);
    return pieces;
  }

 private:
  struct Query {
    std::int64_t position = 0;
    bool text = false;
    Extent group{};
    Extent place{};
    std::array<Interval, 3> keys{};
  };

  static Extent dilations(const score::Neighborhood& axes) {
    return {axes[0].dilation, axes[1].dilation, axes[2].dilation};
  }

  Query query_at(std::int64_t position) const {
    Query query;
    query.position = position;
    const std::int64_t cell = position - grid_.prefix;
    query.text = grid_.prefix + grid_.suffix > 0 && (cell < 0 || cell >= grid_.cells());
    if (query.text || grid_.cells() == 0) return query;
    // Without a grid, queries may lie outside the keys: the last axis takes what the others cannot hold.
    const std::int64_t frame =
        std::clamp<std::int64_t>(score::floor_div(cell, grid_.extent[1] * grid_.extent[2]), 0, grid_.extent[0] - 1);
    const std::int64_t in_frame = cell - frame * grid_.extent[1] * grid_.extent[2];
    const std::int64_t row =
        std::clamp<std::int64_t>(score::floor_div(in_frame, grid_.extent[2]), 0, grid_.extent[1] - 1);
    const Extent at{frame, row, in_frame - row * grid_.extent[2]};
    for (int a = 0; a < 3; ++a) {
      query.group[a] = axes_[a].group_of(at[a]);
      query.place[a] = axes_[a].place_of(at[a]);
      query.keys[a] = axes_[a].keys_of(query.place[a], axes_[a].length_of(query.group[a]));
    }
    return query;
  }

  bool same_tile(const Query& x, const Query& y) const {
    if (x.text || y.text) return x.text == y.text;
    for (int a = 0; a < 3; ++a) {
      if (score::floor_div(x.place[a], tiles_.q[a]) != score::floor_div(y.place[a], tiles_.q[a])) return false;
    }
    return x.group == y.group;
  }

  std::int64_t position_of(const GridTile& tile, const Extent& place) const {
    Extent at{};
    for (int a = 0; a < 3; ++a) at[a] = axes_[a].coordinate(tile.group[a], place[a]);
    return grid_.prefix + (at[0] * grid_.extent[1] + at[1]) * grid_.extent[2] + at[2];
  }

  /// Marks the key tiles that queries of one tile see.
  void visit(std::span<const Query> queries, std::map<std::int64_t, std::int64_t>& rows_that_see_all) const {
    const Query& first = queries.front();
    std::int64_t first_position = first.position;
    std::array<Interval, 3> some = first.keys;
    std::array<Interval, 3> all = first.keys;
    for (const Query& query : queries) {
      first_position = std::min(first_position, query.position);
      for (int a = 0; a < 3; ++a) {
        some[a] = {std::min(some[a].begin, query.keys[a].begin), std::max(some[a].end, query.keys[a].end)};
        all[a] = {std::max(all[a].begin, query.keys[a].begin), std::min(all[a].end, query.keys[a].end)};
      }
    }
    const auto count = static_cast<std::int64_t>(queries.size());
    const auto mark = [&](std::int64_t index) {
      const GridTile& tile = key_tiling_.tiles()[index];
      bool whole = true;
      Extent last{};
      for (int a = 0; a < 3; ++a) {
        whole = whole && (first.text || (all[a].begin <= tile.box[a].begin && all[a].end >= tile.box[a].end));
        last[a] = tile.box[a].end - 1;
      }
      if (raster_causal_ && position_of(tile, last) > first_position) whole = false;
      rows_that_see_all[index] += whole ? count : 0;
    };
    if (first.text) {
      for (std::size_t i = 0; i < key_tiling_.tiles().size(); ++i) mark(static_cast<std::int64_t>(i));
      return;
    }
    const Extent counts = key_tiling_.counts_of(first.group);
    std::array<Interval, 3> range{};
    for (int a = 0; a < 3; ++a) {
      if (some[a].size() <= 0) return;
      range[a] = {some[a].begin / tiles_.k[a], (some[a].end - 1) / tiles_.k[a] + 1};
    }
    const std::int64_t base = key_tiling_.first_tile_of(first.group);
    for (std::int64_t t = range[0].begin; t < range[0].end; ++t) {
      for (std::int64_t h = range[1].begin; h < range[1].end; ++h) {
        for (std::int64_t w = range[2].begin; w < range[2].end; ++w) mark(base + (t * counts[1] + h) * counts[2] + w);
      }
    }
  }

  /// Bits of the cells of a key tile that the query sees.
  void set_bits(const Query& query, const GridTile& tile, std::uint64_t* bits) const {
    if (!query.text && query.group != tile.group) return;
    std::array<Interval, 3> seen = tile.box;
    for (int a = 0; a < 3 && !query.text; ++a) {
      seen[a] = {std::max(seen[a].begin, query.keys[a].begin), std::min(seen[a].end, query.keys[a].end)};
    }
    for (std::int64_t t = seen[0].begin; t < seen[0].end; ++t) {
      for (std::int64_t h = seen[1].begin; h < seen[1].end; ++h) {
        for (std::int64_t w = seen[2].begin; w < seen[2].end; ++w) {
          if (raster_causal_ && position_of(tile, {t, h, w}) > query.position) continue;
          const std::int64_t in_tile =
              ((t - tile.box[0].begin) * tile.box[1].size() + h - tile.box[1].begin) * tile.box[2].size() + w -
              tile.box[2].begin;
          bits[in_tile / 64] |= std::uint64_t{1} << (in_tile % 64);
        }
      }
    }
  }

  /// Text keys at places [begin, begin + count), which have positions [position, position + count).
  void append_text(std::vector<Piece>& pieces, std::int64_t begin, std::int64_t position, std::int64_t count,
                   std::span<const Query> queries) const {
    if (count == 0) return;
    if (!raster_causal_) return append(pieces, {begin, begin + count, {}});
    append_masked(pieces, begin, count, queries, [&](const Query& query, std::uint64_t* bits) {
      for (std::int64_t i = 0; i < std::min(count, query.position - position + 1); ++i) {
        bits[i / 64] |= std::uint64_t{1} << (i % 64);
      }
    });
  }

  /// Appends keys with the bits that `set` gives each query; nothing when no bit is set, no mask when all are.
  template <class Set>
  static void append_masked(std::vector<Piece>& pieces, std::int64_t begin, std::int64_t count,
                            std::span<const Query> queries, const Set& set) {
    const std::int64_t words = (count + 63) / 64;
    Piece piece{begin, begin + count, std::vector<std::uint64_t>(queries.size() * static_cast<std::size_t>(words), 0)};
    std::int64_t pairs = 0;
    for (std::size_t r = 0; r < queries.size(); ++r) set(queries[r], piece.words.data() + r * words);
    for (const std::uint64_t word : piece.words) pairs += std::popcount(word);
    if (pairs == 0) return;
    if (pairs == count * static_cast<std::int64_t>(queries.size())) piece.words.clear();
    append(pieces, std::move(piece));
  }

  static void append(std::vector<Piece>& pieces, Piece piece) {
    if (!pieces.empty() && pieces.back().end == piece.begin && pieces.back().words.empty() && piece.words.empty()) {
      pieces.back().end = piece.end;
    } else {
      pieces.push_back(std::move(piece));
    }
  }

  TokenGrid grid_;
  score::Neighborhood axes_;
  score::TileShapes tiles_;
  score::GridTiling key_tiling_;
  std::int64_t offset_;
  bool raster_causal_ = false;  ///< masks by position, beyond what the axes say
  std::vector<std::int32_t> query_order_;
  std::vector<std::int32_t> key_order_;
};

/// Bitmasks of a plan, each stored once.
class MaskPool {
 public:
  explicit MaskPool(PlanBuilder& builder) : builder_(builder) {}

  std::int64_t index_of(std::vector<std::uint64_t>&& words) {
    const auto found = known_.find(words);
    if (found != known_.end()) return found->second;
    const std::int64_t index = builder_.add_mask(words);
    known_.emplace(std::move(words), index);
    return index;
  }

 private:
  struct Hash {
    std::size_t operator()(const std::vector<std::uint64_t>& words) const {
      std::uint64_t hash = words.size();
      for (const std::uint64_t word : words) hash = (hash ^ word) * 0x9E3779B97F4A7C15U + (hash >> 29);
      return hash;
    }
  };
  PlanBuilder& builder_;
  std::unordered_map<std::vector<std::uint64_t>, std::int64_t, Hash> known_;
};

class GeneralizedNeighborhood {
 public:
  struct Params : NeighborhoodTexts {
    void visit(ParameterList& v) {
      v("window", window, "keys that a query sees on each axis, TxHxW, HxW or W; 0 or an axis not named: all");
      v("stride", stride, "queries in a row that share a window, per axis; at most the window");
      v("dilation", dilation, "distance of the keys of a window, per axis");
      v("causal", causal, "1 where the window ends at the query, per axis");
      v("tile_q", tile_q, "shape of the query tiles; 0: the cheapest by the simulator");
      v("tile_k", tile_k, "shape of the key tiles; 0: the cheapest by the simulator");
    }
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "gna",
            .family = "pattern",
            .summary = "neighbourhoods on a grid of one to three axes: windows with stride, dilation, causal axes",
            .paper =
                "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light, "
                "arXiv:2504.16922",
            .phases = {.prefill = true, .decode = true, .backward = true}};
  }

  explicit GeneralizedNeighborhood(const Params& params) : parameters_(params) {}

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    const std::int64_t sequences = problem.variable_length() ? problem.batch : 1;
    std::int64_t longest = 0;
    for (std::int64_t s = 1; s < sequences; ++s) {
      if (problem.kv_len_of(s) > problem.kv_len_of(longest)) longest = s;
    }
    const score::TileShapes tiles = parameters_.tiles_for(parameters_.axes_of(problem, longest));
    const std::int64_t chosen = tiles.q[0] * tiles.q[1] * tiles.q[2];
    const std::int64_t rows = parameters_.names_query_tile() || chosen >= kFewestRows ? chosen : kMostTileTokens / 2;
    PlanBuilder builder(problem, rows, tiles.k[0] * tiles.k[1] * tiles.k[2], 1, sequences);
    MaskPool masks(builder);
    for (std::int64_t s = 0; s < sequences; ++s) add_rows(builder, masks, problem, s, tiles, context);
    return std::move(builder).finish();
  }

 private:
  void add_rows(PlanBuilder& builder, MaskPool& masks, const Problem& problem, std::int64_t sequence,
                const score::TileShapes& tiles, const PlanContext& context) const {
    constexpr std::int64_t rows_at_once = 256;
    const Pattern pattern(problem, sequence, parameters_.axes_of(problem, sequence), tiles);
    if (!score::is_identity(pattern.query_order())) builder.set_query_order(sequence, pattern.query_order());
    if (!score::is_identity(pattern.key_order())) builder.set_key_order(sequence, pattern.key_order());
    const std::int64_t queries = problem.q_len_of(sequence);
    const std::int64_t rows = builder.query_tiles(sequence);
    for (std::int64_t first = 0; first < rows; first += rows_at_once) {
      std::vector<std::vector<Piece>> pieces(static_cast<std::size_t>(std::min(rows_at_once, rows - first)));
      parallel_for(static_cast<std::int64_t>(pieces.size()), context.run.threads, [&](std::int64_t i, int) {
        const std::int64_t place = (first + i) * builder.tile_q();
        pieces[static_cast<std::size_t>(i)] = pattern.row(place, std::min(builder.tile_q(), queries - place));
      });
      for (std::vector<Piece>& row : pieces) {
        for (Piece& piece : row) {
          const bool masked = !piece.words.empty();
          builder.run(piece.begin, piece.end - piece.begin, masked ? EntryMask::bitmask : EntryMask::none,
                      masked ? masks.index_of(std::move(piece.words)) : 0);
        }
        builder.end_row();
      }
    }
  }

  NeighborhoodParameters parameters_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(gna, tessera::GeneralizedNeighborhood);
