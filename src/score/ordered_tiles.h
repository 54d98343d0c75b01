// Query tiles and key blocks of a sequence whose tokens are taken in another order: where their tokens lie, what is
// text, and their rows as float.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "score/neighborhood.h"
#include "tessera/attention.h"

namespace tessera::score {

class OrderedTiles {
 public:
  /// `tokens` lists the keys of the sequence in the order wanted; queries follow it too.
  OrderedTiles(const Problem& problem, std::int64_t sequence, std::vector<std::int32_t> tokens, std::int64_t tile_q,
               std::int64_t tile_k);

  std::int64_t sequence() const { return sequence_; }
  std::int64_t queries() const { return static_cast<std::int64_t>(query_order_.size()); }
  std::int64_t keys() const { return static_cast<std::int64_t>(key_order_.size()); }
  std::int64_t query_tiles() const { return static_cast<std::int64_t>(query_positions_.size()); }
  std::int64_t key_tiles() const { return static_cast<std::int64_t>(key_positions_.size()); }
  std::int64_t rows(std::int64_t tile) const { return std::min(tile_q_, queries() - tile * tile_q_); }
  std::int64_t columns(std::int64_t tile) const { return std::min(tile_k_, keys() - tile * tile_k_); }

  /// Query rows and keys by place; never empty vectors for a sequence with tokens.
  const std::vector<std::int32_t>& query_order() const { return query_order_; }
  const std::vector<std::int32_t>& key_order() const { return key_order_; }
  std::int64_t query_position(std::int64_t place) const { return offset_ + query_order_[place]; }
  std::int64_t key_position(std::int64_t place) const { return key_order_[place]; }
  /// Key tile that holds the key at this position; positions outside are moved to the nearest key.
  std::int64_t key_tile_of(std::int64_t position) const {
    return place_of_key_[std::clamp<std::int64_t>(position, 0, keys() - 1)] / tile_k_;
  }

  /// Whether the causal mask (if the problem has one) lets some row of the query tile see some key of the key tile, or
  /// every row every key.
  bool sees_some(std::int64_t query_tile, std::int64_t key_tile) const {
    return !causal_ || key_positions_[key_tile].begin <= query_positions_[query_tile].end - 1;
  }
  bool sees_all(std::int64_t query_tile, std::int64_t key_tile) const {
    return !causal_ || key_positions_[key_tile].end - 1 <= query_positions_[query_tile].begin;
  }
  /// First and last position of the rows of a query tile, as [first, last + 1).
  Interval query_positions(std::int64_t tile) const { return query_positions_[tile]; }
  bool text_queries(std::int64_t tile) const { return text_queries_[tile] != 0; }  ///< a row of it is text
  bool text_keys(std::int64_t tile) const { return text_keys_[tile] != 0; }

  /// Rows at places [first, first + count) of the order, as float.
  void load_queries(const Problem& problem, const AttentionInputs& inputs, std::int64_t q_head, std::int64_t first,
                    std::int64_t count, float* out) const;
  void load_keys(const Problem& problem, const AttentionInputs& inputs, std::int64_t kv_head, std::int64_t first,
                 std::int64_t count, float* out) const;
  void load_values(const Problem& problem, const AttentionInputs& inputs, std::int64_t kv_head, std::int64_t first,
                   std::int64_t count, float* out) const;

  /// Sets the orders of a block of a plan, where they change anything.
  void set_orders(PlanBuilder& builder, std::int64_t block) const;

 private:
  std::int64_t sequence_;
  std::int64_t tile_q_;
  std::int64_t tile_k_;
  std::int64_t offset_;
  bool causal_;
  bool in_order_;
  std::vector<std::int32_t> query_order_;
  std::vector<std::int32_t> key_order_;
  std::vector<std::int32_t> place_of_key_;
  std::vector<Interval> query_positions_;
  std::vector<Interval> key_positions_;
  std::vector<std::uint8_t> text_queries_;
  std::vector<std::uint8_t> text_keys_;
};

}  // namespace tessera::score
