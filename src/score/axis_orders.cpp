#include "score/axis_orders.h"

#include <algorithm>
#include <cmath>

#include "score/product.h"

namespace tessera::score {

namespace {

/// Running counts of the blocks of one order.
struct Counts {
  explicit Counts(std::size_t blocks) : small(blocks), largest(blocks), sums(blocks) {}
  std::vector<std::int64_t> small;
  std::vector<float> largest;
  std::vector<double> sums;
};

std::vector<std::int32_t> places_of(const std::vector<std::int32_t>& order) {
  std::vector<std::int32_t> places(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) places[order[i]] = static_cast<std::int32_t>(i);
  return places;
}

}  // namespace

std::array<BlockMetrics, 6> axis_order_metrics(const Problem& problem, const AttentionInputs& inputs,
                                               const std::array<OrderedTiles, 6>& orders, std::int64_t q_head,
                                               std::int64_t block, double eps, double sigma,
                                               std::optional<std::size_t> only) {
  const OrderedTiles& raster = orders[0];
  const std::int64_t keys = raster.keys();
  const std::int64_t queries = raster.queries();
  const std::int64_t dim = problem.head_dim;
  const std::int64_t rows = raster.query_tiles();
  const std::int64_t columns = raster.key_tiles();
  std::array<BlockMetrics, 6> metrics;
  if (keys == 0 || queries == 0) return metrics;

  std::vector<Counts> counts(orders.size(), Counts(static_cast<std::size_t>(rows * columns)));
  std::array<std::vector<std::int32_t>, 6> query_places;
  std::array<std::vector<std::int32_t>, 6> key_places;
  for (std::size_t o = 0; o < orders.size(); ++o) {
    query_places[o] = places_of(orders[o].query_order());
    key_places[o] = places_of(orders[o].key_order());
  }
  std::vector<float> key_rows(static_cast<std::size_t>(keys * dim));
  raster.load_keys(problem, inputs, q_head / problem.group(), 0, keys, key_rows.data());
  std::vector<float> query_rows(static_cast<std::size_t>(block * dim));
  std::vector<float> scores(static_cast<std::size_t>(block * keys));
  for (std::int64_t tile = 0; tile < rows; ++tile) {
    const std::int64_t count = raster.rows(tile);
    raster.load_queries(problem, inputs, q_head, tile * block, count, query_rows.data());
    multiply_transposed(query_rows.data(), count, dim, key_rows.data(), keys, dim, dim, problem.softmax_scale(),
                        scores.data(), keys);
    for (std::int64_t r = 0; r < count; ++r) {
      float* p = scores.data() + r * keys;
      const float most = *std::max_element(p, p + keys);
      double total = 0;
      for (std::int64_t j = 0; j < keys; ++j) total += p[j] = std::exp(p[j] - most);
      const auto share = static_cast<float>(1 / total);
      const std::int32_t query = raster.query_order()[tile * block + r];
      for (std::size_t o = only.value_or(0); o < (only ? *only + 1 : orders.size()); ++o) {
        const std::int64_t first = query_places[o][query] / block * columns;
        Counts& of_order = counts[o];
        for (std::int64_t j = 0; j < keys; ++j) {
          const float probability = p[j] * share;
          const std::int64_t at = first + key_places[o][raster.key_order()[j]] / block;
          of_order.small[at] += static_cast<double>(probability) < eps ? 1 : 0;
          of_order.largest[at] = std::max(of_order.largest[at], probability);
          of_order.sums[at] += probability;
        }
      }
    }
  }
  for (std::size_t o = only.value_or(0); o < (only ? *only + 1 : orders.size()); ++o) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        const auto at = static_cast<std::size_t>(i * columns + j);
        const auto entries = static_cast<double>(raster.rows(i) * raster.columns(j));
        if (static_cast<double>(counts[o].small[at]) >= sigma * entries) metrics[o].sparse += 1;
        if (counts[o].sums[at] > 0) metrics[o].incoherence += counts[o].largest[at] * entries / counts[o].sums[at];
      }
    }
    metrics[o].sparse /= static_cast<double>(rows * columns);
    metrics[o].incoherence /= static_cast<double>(rows * columns);
    metrics[o].sums.assign(counts[o].sums.begin(), counts[o].sums.end());
  }
  return metrics;
}

std::size_t best_axis_order(const std::array<BlockMetrics, 6>& metrics, double alpha) {
  double dense = 0;
  double incoherence = 0;
  for (const BlockMetrics& order : metrics) {
    dense += 1 - order.sparse;
    incoherence += order.incoherence;
  }
  std::size_t best = 0;
  double least = 0;
  for (std::size_t o = 0; o < metrics.size(); ++o) {
    const double score = alpha * (dense > 0 ? (1 - metrics[o].sparse) / dense : 0) +
                         (1 - alpha) * (incoherence > 0 ? metrics[o].incoherence / incoherence : 0);
    if (o == 0 || score < least) {
      least = score;
      best = o;
    }
  }
  return best;
}

}  // namespace tessera::score
