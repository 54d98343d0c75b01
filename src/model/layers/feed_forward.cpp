#include "model/layers/feed_forward.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "core/parallel.h"
#include "model/layers/elementwise.h"

namespace tessera::model {

namespace {

void size_to(std::vector<float>& buffer, std::int64_t elements) {
  if (std::ssize(buffer) < elements) buffer.resize(static_cast<std::size_t>(elements));
}

}  // namespace

Routing route(std::span<const float> scores, const ExpertsConfig& config) {
  const std::int64_t rows = std::ssize(scores) / config.count;
  const auto entries = static_cast<std::size_t>(rows * config.chosen);
  std::vector<std::int32_t> chosen(entries);  // [rows][chosen]
  std::vector<float> weights(entries);
  std::vector<std::int32_t> order(static_cast<std::size_t>(config.count));
  Routing routing;
  routing.first.assign(static_cast<std::size_t>(config.count) + 1, 0);
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* own = scores.data() + row * config.count;
    std::iota(order.begin(), order.end(), 0);
    // NaN scores come last, so that the order stays one.
    std::partial_sort(order.begin(), order.begin() + config.chosen, order.end(), [&](std::int32_t a, std::int32_t b) {
      if (std::isnan(own[a]) || std::isnan(own[b]))
        return std::isnan(own[a]) == std::isnan(own[b]) ? a < b : std::isnan(own[b]);
      return own[a] != own[b] ? own[a] > own[b] : a < b;
    });
    const double largest = own[order[0]];
    double all = 0;
    for (std::int64_t e = 0; e < config.count; ++e) all += std::exp(static_cast<double>(own[e]) - largest);
    double of_chosen = 0;
    for (std::int64_t i = 0; i < config.chosen; ++i)
      of_chosen += std::exp(static_cast<double>(own[order[i]]) - largest);
    const double sum = config.normalise ? of_chosen : all;
    for (std::int64_t i = 0; i < config.chosen; ++i) {
      const auto at = static_cast<std::size_t>(row * config.chosen + i);
      chosen[at] = order[static_cast<std::size_t>(i)];
      weights[at] = static_cast<float>(std::exp(static_cast<double>(own[chosen[at]]) - largest) / sum);
      ++routing.first[static_cast<std::size_t>(chosen[at]) + 1];
    }
  }
  std::partial_sum(routing.first.begin(), routing.first.end(), routing.first.begin());
  routing.rows.resize(entries);
  routing.weights.resize(entries);
  std::vector<std::int64_t> next = routing.first;
  for (std::size_t i = 0; i < entries; ++i) {
    const auto place = static_cast<std::size_t>(next[static_cast<std::size_t>(chosen[i])]++);
    routing.rows[place] = static_cast<std::int32_t>(static_cast<std::int64_t>(i) / config.chosen);
    routing.weights[place] = weights[i];
  }
  return routing;
}

std::int64_t FeedForward::floats_per_row(const ModelConfig& config) {
  std::int64_t inner = config.intermediate_size;
  std::int64_t more = 0;
  if (config.experts.count > 0) {
    inner = std::max(inner, config.experts.intermediate_size);
    more = config.experts.count + 2 * config.hidden_size;
  }
  return 2 * inner + more;
}

void FeedForward::release() {
  for (std::vector<float>* buffer : {&gate_, &up_, &scores_, &gathered_, &result_}) std::vector<float>().swap(*buffer);
}

void FeedForward::run(const LayerWeights& layer, const float* x, std::int64_t rows, float* out,
                      const ProductOptions& products) {
  if (layer.router) {
    run_experts(layer, x, rows, out, products);
  } else {
    run_one(layer.mlp, x, rows, out, products);
  }
}

void FeedForward::run_one(const FeedForwardWeights& part, const float* x, std::int64_t rows, float* out,
                          const ProductOptions& products) {
  const std::int64_t inner = part.gate->outputs();
  size_to(gate_, rows * inner);
  size_to(up_, rows * inner);
  const std::array<MatrixProduct, 2> inputs{{{part.gate.get(), gate_.data()}, {part.up.get(), up_.data()}}};
  multiply_together(inputs, x, rows, products);
  add_bias(gate_.data(), rows, part.gate_bias, products.threads);
  add_bias(up_.data(), rows, part.up_bias, products.threads);
  gated_product(config_.activation, gate_.data(), up_.data(), rows, inner, products);
  part.down->multiply(gate_.data(), rows, out, products);
  add_bias(out, rows, part.down_bias, products.threads);
}

void FeedForward::run_experts(const LayerWeights& layer, const float* x, std::int64_t rows, float* out,
                              const ProductOptions& products) {
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t count = config_.experts.count;
  size_to(scores_, rows * count);
  // Which experts run must not hang on the rounding of activations.
  ProductOptions exact = products;
  exact.exact = true;
  layer.router->multiply(x, rows, scores_.data(), exact);
  const Routing routing = route(std::span(scores_).first(static_cast<std::size_t>(rows * count)), config_.experts);
  std::fill_n(out, rows * hidden, 0.0F);
  for (std::int64_t e = 0; e < count; ++e) {
    const std::int64_t first = routing.first[static_cast<std::size_t>(e)];
    const std::int64_t own = routing.first[static_cast<std::size_t>(e) + 1] - first;
    if (own == 0) continue;
    size_to(gathered_, own * hidden);
    size_to(result_, own * hidden);
    for (std::int64_t i = 0; i < own; ++i) {
      std::copy_n(x + routing.rows[static_cast<std::size_t>(first + i)] * hidden, hidden,
                  gathered_.data() + i * hidden);
    }
    run_one(layer.experts[static_cast<std::size_t>(e)], gathered_.data(), own, result_.data(), products);
    for (std::int64_t i = 0; i < own; ++i) {
      const auto entry = static_cast<std::size_t>(first + i);
      const float weight = routing.weights[entry];
      float* to = out + routing.rows[entry] * hidden;
      const float* from = result_.data() + i * hidden;
#pragma omp simd
      for (std::int64_t c = 0; c < hidden; ++c) to[c] += weight * from[c];
    }
  }
}

}  // namespace tessera::model
