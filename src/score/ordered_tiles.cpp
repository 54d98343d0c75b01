#include "score/ordered_tiles.h"

#include <utility>

#include "score/row_access.h"
#include "score/token_order.h"

namespace tessera::score {

namespace {

/// Positions that each tile spans.
template <class Position>
std::vector<Interval> spans_of(std::int64_t count, std::int64_t tile, const Position& position) {
  std::vector<Interval> spans;
  for (std::int64_t first = 0; first < count; first += tile) {
    Interval span{position(first), position(first) + 1};
    for (std::int64_t i = first + 1; i < std::min(first + tile, count); ++i) {
      span = {std::min(span.begin, position(i)), std::max(span.end, position(i) + 1)};
    }
    spans.push_back(span);
  }
  return spans;
}

/// Tiles with a token outside the grid.
template <class Position>
std::vector<std::uint8_t> text_tiles(const Problem& problem, std::int64_t count, std::int64_t tile,
                                     const Position& position) {
  std::vector<std::uint8_t> text(static_cast<std::size_t>((count + tile - 1) / tile), 0);
  if (!problem.grid) return text;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t cell = position(i) - problem.grid->prefix;
    if (cell < 0 || cell >= problem.grid->cells()) text[i / tile] = 1;
  }
  return text;
}

/// load(first, count, out) for stretches of rows that follow each other in memory too.
template <class Load>
void load_in_order(std::span<const std::int32_t> order, std::int64_t dim, float* out, const Load& load) {
  for (std::size_t i = 0; i < order.size();) {
    std::size_t end = i + 1;
    while (end < order.size() && order[end] == order[end - 1] + 1) ++end;
    load(order[i], static_cast<std::int64_t>(end - i), out);
    out += static_cast<std::int64_t>(end - i) * dim;
    i = end;
  }
}

}  // namespace

OrderedTiles::OrderedTiles(const Problem& problem, std::int64_t sequence, std::vector<std::int32_t> tokens,
                           std::int64_t tile_q, std::int64_t tile_k)
    : sequence_(sequence),
      tile_q_(tile_q),
      tile_k_(tile_k),
      offset_(problem.q_offset_of(sequence)),
      causal_(problem.causal),
      query_order_(queries_in_order(problem, sequence, tokens)),
      key_order_(std::move(tokens)) {
  in_order_ = is_identity(key_order_);
  place_of_key_.resize(key_order_.size());
  for (std::size_t i = 0; i < key_order_.size(); ++i) place_of_key_[key_order_[i]] = static_cast<std::int32_t>(i);
  const auto query = [&](std::int64_t place) { return query_position(place); };
  const auto key = [&](std::int64_t place) { return key_position(place); };
  query_positions_ = spans_of(queries(), tile_q, query);
  key_positions_ = spans_of(keys(), tile_k, key);
  text_queries_ = text_tiles(problem, queries(), tile_q, query);
  text_keys_ = text_tiles(problem, keys(), tile_k, key);
}

void OrderedTiles::load_queries(const Problem& problem, const AttentionInputs& inputs, std::int64_t q_head,
                                std::int64_t first, std::int64_t count, float* out) const {
  load_in_order(std::span(query_order_).subspan(first, count), problem.head_dim, out,
                [&](std::int64_t row, std::int64_t rows, float* to) {
                  score::load_queries(problem, inputs, sequence_, q_head, row, rows, to);
                });
}

void OrderedTiles::load_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t kv_head,
                             std::int64_t first, std::int64_t count, float* out) const {
  load_in_order(std::span(key_order_).subspan(first, count), problem.head_dim, out,
                [&](std::int64_t row, std::int64_t rows, float* to) {
                  score::load_keys(problem, inputs, sequence_, kv_head, row, rows, to);
                });
}

void OrderedTiles::load_values(const Problem& problem, const AttentionInputs& inputs, std::int64_t kv_head,
                               std::int64_t first, std::int64_t count, float* out) const {
  load_in_order(std::span(key_order_).subspan(first, count), problem.value_dim, out,
                [&](std::int64_t row, std::int64_t rows, float* to) {
                  score::load_values(problem, inputs, sequence_, kv_head, row, rows, to);
                });
}

void OrderedTiles::set_orders(PlanBuilder& builder, std::int64_t block) const {
  if (!is_identity(query_order_)) builder.set_query_order(block, query_order_);
  if (!in_order_) builder.set_key_order(block, key_order_);
}

}  // namespace tessera::score
