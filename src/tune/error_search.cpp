#include "tune/error_search.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "tessera/method.h"

namespace tessera::tune {

namespace {

TensorView head_of(const std::vector<float>& tensor, std::int64_t head, std::int64_t tokens, std::int64_t dim) {
  return view_of(tensor.data() + head * tokens * dim, DType::f32, {1, 1, tokens, dim});
}

}  // namespace

HeadTrial::HeadTrial(const LayerTensors& tensors, std::int64_t q_head, const RunOptions& options)
    : problem_(tensors.problem), options_(options) {
  const std::int64_t kv_head = q_head / tensors.problem.group();
  problem_.q_heads = problem_.kv_heads = 1;
  inputs_.q = head_of(tensors.q, q_head, problem_.q_len, problem_.head_dim);
  inputs_.k = head_of(tensors.k, kv_head, problem_.kv_len, problem_.head_dim);
  inputs_.v = head_of(tensors.v, kv_head, problem_.kv_len, problem_.value_dim);
  dense_.resize(static_cast<std::size_t>(problem_.q_len * problem_.value_dim));
  tessera::run(dense_plan(problem_), inputs_,
               {mutable_view_of(dense_.data(), DType::f32, {1, 1, problem_.q_len, problem_.value_dim}), {}}, options_);
}

HeadOutcome HeadTrial::run(std::string_view method, const Json& parameters) const {
  std::vector<float> o(dense_.size());
  PlanContext context;
  context.run = options_;
  Plan plan;
  const RunReport report =
      find_method(method)
          .make(parameters.dump())
          ->attend(problem_, inputs_,
                   {mutable_view_of(o.data(), DType::f32, {1, 1, problem_.q_len, problem_.value_dim}), {}}, context,
                   &plan);
  HeadOutcome outcome;
  double whole = 0;
  for (std::size_t i = 0; i < o.size(); ++i) {
    outcome.l1 += std::fabs(static_cast<double>(o[i]) - static_cast<double>(dense_[i]));
    whole += std::fabs(static_cast<double>(dense_[i]));
  }
  outcome.rel_l1 = whole > 0 ? outcome.l1 / whole : 0;
  const auto computed = static_cast<double>(statistics(plan).planned_pairs - report.skipped_pairs);
  outcome.sparsity = 1 - computed / static_cast<double>(problem_.allowed_pairs());
  return outcome;
}

double least_accepted(double low, double high, double start, double tolerance,
                      const std::function<bool(double)>& accept) {
  double middle = std::clamp(start, low, high);
  while (high - low > tolerance) {
    (accept(middle) ? high : low) = middle;
    middle = (low + high) / 2;
  }
  return high;
}

double halve_until(double start, double least, const std::function<bool(double)>& accept) {
  for (double value = start; value >= least; value /= 2) {
    if (accept(value)) return value;
  }
  return 0;
}

SpargePoint merge_points(std::span<const SpargePoint> points, double width, double least_sparsity) {
  struct Bin {
    double sparsity = 0;
    SpargePoint most{-1, 0, 0, 0};
  };
  std::map<std::int64_t, Bin> bins;
  double sum = 0;
  for (const SpargePoint& point : points) {
    Bin& bin = bins[static_cast<std::int64_t>(std::floor((point.theta + 1) / width))];
    bin.sparsity += point.sparsity;
    bin.most.theta = std::max(bin.most.theta, point.theta);
    bin.most.cdf = std::max(bin.most.cdf, point.cdf);
    bin.most.lambda = std::max(bin.most.lambda, point.lambda);
    sum += point.sparsity;
  }
  SpargePoint dense;
  if (points.empty()) return dense;
  const double mean = sum / static_cast<double>(points.size());
  dense.sparsity = mean;
  if (mean <= least_sparsity) return dense;
  const auto best = std::max_element(
      bins.begin(), bins.end(), [](const auto& a, const auto& b) { return a.second.sparsity < b.second.sparsity; });
  SpargePoint chosen = best->second.most;
  chosen.sparsity = mean;
  return chosen;
}

}  // namespace tessera::tune
