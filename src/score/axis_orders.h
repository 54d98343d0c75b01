// How well each of the six axis orders of a grid gathers attention into few blocks (PAROAttention, arXiv:2506.16054).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "score/ordered_tiles.h"
#include "tessera/attention.h"

namespace tessera::score {

/// Axes from the outermost to the innermost (0 = frames, 1 = rows, 2 = columns).
inline constexpr std::array<std::array<int, 3>, 6> kAxisOrders{
    {{0, 1, 2}, {0, 2, 1}, {1, 2, 0}, {1, 0, 2}, {2, 1, 0}, {2, 0, 1}}};

/// The probabilities of one head in blocks under one order.
struct BlockMetrics {
  double sparse = 0;        ///< share of blocks with at least sigma of their entries below eps
  double incoherence = 0;   ///< mean over blocks of largest / mean entry
  std::vector<float> sums;  ///< [query blocks][key blocks]: sum of the probabilities
};

/// Metrics of a head under every order, or under one of them only, from its exact probabilities; `orders` holds the
/// sequence in each. Work is queries x keys, memory that of the sums.
std::array<BlockMetrics, 6> axis_order_metrics(const Problem& problem, const AttentionInputs& inputs,
                                               const std::array<OrderedTiles, 6>& orders, std::int64_t q_head,
                                               std::int64_t block, double eps, double sigma,
                                               std::optional<std::size_t> only = {});

/// The order with the least alpha * (1 - sparse) + (1 - alpha) * incoherence, each over its sum over the orders; the
/// first of equal ones.
std::size_t best_axis_order(const std::array<BlockMetrics, 6>& metrics, double alpha);

}  // namespace tessera::score
