#include "eval/selection_quality.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "plan/geometry.h"
#include "plan/row_sweep.h"
#include "score/product.h"
#include "score/query_tiles.h"
#include "score/row_access.h"
#include "score/row_softmax.h"

namespace tessera::eval {

namespace {

constexpr std::int64_t kPanelKeys = 1024;
constexpr std::int64_t kRowsPerTokenOracle = 8;  // sorting a row costs more than computing it

/// Sums over the sampled rows (or blocks) of one or many (sequence, head, block).
struct Sums {
  std::vector<double> mass;  ///< per row
  double sink_free = 0;
  double value_weighted = 0;
  double oracle_tiles = 0;
  double random_tiles = 0;
  double oracle_tokens = 0;
  std::int64_t oracle_rows = 0;
  double touched_mass = 0;
  double best_touched = 0;  ///< mass of as many tiles as are touched, the best ones
  double tile_recall = 0;
  std::int64_t blocks = 0;

  void add(const Sums& other) {
    mass.insert(mass.end(), other.mass.begin(), other.mass.end());
    sink_free += other.sink_free;
    value_weighted += other.value_weighted;
    oracle_tiles += other.oracle_tiles;
    random_tiles += other.random_tiles;
    oracle_tokens += other.oracle_tokens;
    oracle_rows += other.oracle_rows;
    touched_mass += other.touched_mass;
    best_touched += other.best_touched;
    tile_recall += other.tile_recall;
    blocks += other.blocks;
  }
};

/// Blocks of query rows, spread evenly over those that see at least 4 tiles; over all where none does.
std::vector<std::int64_t> sampled_blocks(const score::QueryTiles& tiles, std::int64_t wanted) {
  std::vector<std::int64_t> blocks;
  for (const std::int64_t least : {std::int64_t{4}, std::int64_t{1}}) {
    for (std::int64_t t = 0; t < tiles.count(); ++t) {
      if (tiles.visible_tiles(t) >= least) blocks.push_back(t);
    }
    if (!blocks.empty()) break;
  }
  const auto size = static_cast<std::int64_t>(blocks.size());
  if (size <= wanted) return blocks;
  std::vector<std::int64_t> chosen;
  for (std::int64_t i = 1; i <= wanted; ++i) chosen.push_back(blocks[static_cast<std::size_t>(i * size / wanted - 1)]);
  return chosen;
}

/// Which keys the plan computes for given queries of one (sequence, head), by position.
class ComputedKeys {
 public:
  ComputedKeys(const Plan& plan, std::int64_t sequence, std::int64_t head)
      : plan_(plan), view_(plan, plan.block_of(sequence, head)) {
    if (view_.query_order.empty()) return;
    place_.assign(static_cast<std::size_t>(plan.problem.q_len_of(sequence)), -1);
    for (std::size_t i = 0; i < view_.query_order.size(); ++i) {
      place_[static_cast<std::size_t>(view_.query_order[i])] = static_cast<std::int32_t>(i);
    }
  }

  /// Sets kept[j] = 1 for the keys that the query computes; `kept` is all zero before.
  void mark(std::int64_t query, std::vector<std::uint8_t>& kept) {
    const std::int64_t place = place_.empty() ? query : place_[static_cast<std::size_t>(query)];
    if (place < 0) return;
    const std::int64_t tile = place / view_.tile_q;
    if (tile != tile_) load_row(plan_, view_, tile, 0, pieces_);
    tile_ = tile;
    for (const Piece& piece : pieces_) {
      words_.resize(static_cast<std::size_t>(mask_words_of(piece.end - piece.begin)));
      row_bits(plan_, view_, tile, place % view_.tile_q, piece, piece.begin, piece.end, words_);
      for (std::size_t w = 0; w < words_.size(); ++w) {
        for (std::uint64_t bits = words_[w]; bits != 0; bits &= bits - 1) {
          const std::int64_t key = piece.begin + static_cast<std::int64_t>(w) * 64 + std::countr_zero(bits);
          kept[static_cast<std::size_t>(view_.key_position(key))] = 1;
        }
      }
    }
  }

 private:
  const Plan& plan_;
  BlockView view_;
  std::vector<std::int32_t> place_;  ///< of each query; empty: the query itself
  std::int64_t tile_ = -1;
  std::vector<Piece> pieces_;
  std::vector<std::uint64_t> words_;
};

/// Norm of each value of a kv head.
std::vector<float> value_norms(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                               std::int64_t kv_head) {
  const std::int64_t keys = problem.kv_len_of(sequence);
  const std::int64_t dim = problem.value_dim;
  std::vector<float> norms(static_cast<std::size_t>(keys));
  std::vector<float> rows(static_cast<std::size_t>(kPanelKeys * dim));
  for (std::int64_t first = 0; first < keys; first += kPanelKeys) {
    const std::int64_t count = std::min(kPanelKeys, keys - first);
    score::load_values(problem, inputs, sequence, kv_head, first, count, rows.data());
    for (std::int64_t j = 0; j < count; ++j) {
      double sum = 0;
      for (std::int64_t d = 0; d < dim; ++d) {
        const double x = rows[static_cast<std::size_t>(j * dim + d)];
        sum += x * x;
      }
      norms[static_cast<std::size_t>(first + j)] = static_cast<float>(std::sqrt(sum));
    }
  }
  return norms;
}

/// Dense probabilities of the rows of one query block: [rows][keys].
std::vector<float> probabilities_of(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                                    std::int64_t head, const score::QueryTiles& tiles, std::int64_t block) {
  const std::int64_t rows = tiles.rows(block);
  const std::int64_t dim = problem.head_dim;
  std::vector<float> queries(static_cast<std::size_t>(rows * dim));
  score::load_queries(problem, inputs, sequence, head, block * tiles.tile_q, rows, queries.data());
  std::vector<float> p(static_cast<std::size_t>(rows * tiles.keys), -std::numeric_limits<float>::infinity());
  std::vector<float> buffer;
  for (std::int64_t first = 0; first < tiles.visible_keys(block); first += kPanelKeys) {
    const std::int64_t count = std::min(kPanelKeys, tiles.keys - first);
    const float* keys = score::key_rows(problem, inputs, sequence, head / problem.group(), first, count, count, buffer);
    score::multiply_transposed(queries.data(), rows, dim, keys, count, dim, dim, problem.softmax_scale(),
                               p.data() + first, tiles.keys);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::span<float> row(p.data() + r * tiles.keys, static_cast<std::size_t>(tiles.keys));
    const std::int64_t visible = tiles.keys_visible_from(tiles.first_position(block) + r);
    std::fill(row.begin() + visible, row.end(), -std::numeric_limits<float>::infinity());
    score::softmax_row(row);
  }
  return p;
}

/// Mass of the `count` largest of the values.
double mass_of_best(std::vector<float> values, std::int64_t count) {
  const auto end = values.begin() + std::min<std::int64_t>(count, static_cast<std::int64_t>(values.size()));
  std::nth_element(values.begin(), end, values.end(), std::greater<>());
  return std::accumulate(values.begin(), end, 0.0);
}

/// Compares the tiles that the plan touches with those of the largest mass, and its pairs with `affordable` whole
/// tiles.
void judge_tiles(const std::vector<double>& mass, const std::vector<std::uint8_t>& touched, std::int64_t affordable,
                 double rows, Sums& sums) {
  const auto visible = static_cast<std::int64_t>(mass.size());
  const std::int64_t count = std::count(touched.begin(), touched.end(), std::uint8_t{1});
  affordable = std::min(affordable, visible);
  std::vector<std::int64_t> best(mass.size());
  std::iota(best.begin(), best.end(), 0);
  std::stable_sort(best.begin(), best.end(), [&](auto a, auto b) { return mass[a] > mass[b]; });
  std::int64_t common = 0;
  double best_mass = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    common += touched[static_cast<std::size_t>(best[i])];
    best_mass += mass[static_cast<std::size_t>(best[i])];
  }
  for (std::size_t t = 0; t < mass.size(); ++t) sums.touched_mass += touched[t] != 0 ? mass[t] : 0;
  sums.best_touched += best_mass;
  for (std::int64_t i = 0; i < affordable; ++i) sums.oracle_tiles += mass[static_cast<std::size_t>(best[i])];
  sums.tile_recall += count > 0 ? static_cast<double>(common) / static_cast<double>(count) : 1;
  ++sums.blocks;
  const double ends = mass.front() + (visible > 1 ? mass.back() : 0);
  const std::int64_t others = visible - 2;
  const double share =
      others > 0 ? std::clamp(static_cast<double>(affordable - 2) / static_cast<double>(others), 0.0, 1.0) : 1.0;
  sums.random_tiles += affordable == 0 ? 0 : ends + share * (rows - ends);
}

/// One query block of one head.
Sums judge_block(const Problem& problem, const AttentionInputs& inputs, ComputedKeys& computed, std::int64_t sequence,
                 std::int64_t head, const score::QueryTiles& tiles, std::int64_t block, const std::vector<float>& norms,
                 const QualityOptions& options) {
  const std::vector<float> p = probabilities_of(problem, inputs, sequence, head, tiles, block);
  std::vector<double> tile_mass(static_cast<std::size_t>(tiles.visible_tiles(block)), 0.0);
  std::vector<std::uint8_t> touched(tile_mass.size(), 0);
  std::vector<std::uint8_t> kept;
  Sums sums;
  double rows_with_keys = 0;
  std::int64_t pairs = 0;
  for (std::int64_t r = 0; r < tiles.rows(block); ++r) {
    const std::int64_t visible = tiles.keys_visible_from(tiles.first_position(block) + r);
    if (visible == 0) continue;
    ++rows_with_keys;
    const float* row = p.data() + r * tiles.keys;
    kept.assign(static_cast<std::size_t>(tiles.keys), 0);
    computed.mark(block * tiles.tile_q + r, kept);
    double mass = 0;
    double sink_mass = 0;
    double sink_total = 0;
    double weighted = 0;
    double weight = 0;
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < visible; ++j) {
      const bool keeps = kept[static_cast<std::size_t>(j)] != 0;
      const double x = row[j];
      const double y = x * norms[static_cast<std::size_t>(j)];
      const auto tile = static_cast<std::size_t>(j / options.tile);
      tile_mass[tile] += x;
      weight += y;
      if (j < options.sink_tokens) sink_total += x;
      if (!keeps) continue;
      ++count;
      touched[tile] = 1;
      mass += x;
      weighted += y;
      if (j < options.sink_tokens) sink_mass += x;
    }
    pairs += count;
    sums.mass.push_back(mass);
    sums.sink_free += sink_total < 1 ? std::min(1.0, (mass - sink_mass) / (1 - sink_total)) : 1;
    sums.value_weighted += weight > 0 ? weighted / weight : 1;
    if (r % kRowsPerTokenOracle == 0) {
      sums.oracle_tokens += mass_of_best({row, row + visible}, count);
      ++sums.oracle_rows;
    }
  }
  // A diagonal tile is half a tile of pairs, but takes a whole one.
  const std::int64_t affordable = ceil_div(pairs, tiles.rows(block) * options.tile);
  if (rows_with_keys > 0) judge_tiles(tile_mass, touched, affordable, rows_with_keys, sums);
  return sums;
}

}  // namespace

double SelectionQuality::chance_corrected() const {
  const double room = oracle_tile_mass - random_mass;
  return room > 1e-6 ? (mass - random_mass) / room : 1;
}

SelectionQuality judge_selection(const Plan& plan, const AttentionInputs& inputs, const QualityOptions& options) {
  const Problem& problem = plan.problem;
  check_inputs(problem, inputs);
  require(!inputs.modifiers.changes_scores(), "judging a selection: modifiers change the scores; expected none");
  std::vector<std::vector<float>> norms(static_cast<std::size_t>(problem.batch * problem.kv_heads));
  parallel_for(static_cast<std::int64_t>(norms.size()), options.threads, [&](std::int64_t i, int) {
    norms[static_cast<std::size_t>(i)] = value_norms(problem, inputs, i / problem.kv_heads, i % problem.kv_heads);
  });
  struct Place {
    std::int64_t sequence;
    std::int64_t head;
    std::int64_t block;
  };
  std::vector<Place> places;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const score::QueryTiles tiles(problem, s, options.tile, options.tile);
    for (const std::int64_t block : sampled_blocks(tiles, options.query_blocks)) {
      for (std::int64_t h = 0; h < problem.q_heads; ++h) places.push_back({s, h, block});
    }
  }
  std::vector<Sums> parts(places.size());
  parallel_for(static_cast<std::int64_t>(places.size()), options.threads, [&](std::int64_t i, int) {
    const auto [sequence, head, block] = places[static_cast<std::size_t>(i)];
    const score::QueryTiles tiles(problem, sequence, options.tile, options.tile);
    ComputedKeys computed(plan, sequence, head);
    parts[static_cast<std::size_t>(i)] =
        judge_block(problem, inputs, computed, sequence, head, tiles, block,
                    norms[static_cast<std::size_t>(sequence * problem.kv_heads + head / problem.group())], options);
  });
  Sums sums;
  for (const Sums& part : parts) sums.add(part);

  SelectionQuality quality;
  if (sums.mass.empty()) return quality;
  const auto rows = static_cast<double>(sums.mass.size());
  quality.mass = std::accumulate(sums.mass.begin(), sums.mass.end(), 0.0) / rows;
  const auto p5 = sums.mass.begin() + static_cast<std::ptrdiff_t>(sums.mass.size() / 20);
  std::nth_element(sums.mass.begin(), p5, sums.mass.end());
  quality.mass_p5 = *p5;
  quality.sink_free_mass = sums.sink_free / rows;
  quality.value_weighted_mass = sums.value_weighted / rows;
  quality.tile_recall = sums.tile_recall / static_cast<double>(sums.blocks);
  quality.mass_efficiency = sums.best_touched > 0 ? sums.touched_mass / sums.best_touched : 1;
  quality.oracle_tile_mass = sums.oracle_tiles / rows;
  quality.oracle_token_mass = sums.oracle_tokens / static_cast<double>(sums.oracle_rows);
  quality.random_mass = sums.random_tiles / rows;
  return quality;
}

}  // namespace tessera::eval
