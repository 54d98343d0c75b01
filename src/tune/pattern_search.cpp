#include "tune/pattern_search.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/error.h"
#include "tessera/method.h"

namespace tessera::tune {

namespace {

constexpr std::int64_t kTile = 64;       // of the method
constexpr double kCostSlack = 0.02;      // costs this near count as equal
constexpr std::int64_t kMostSteps = 16;  // of the search for a size

/// Output and LSE of all heads.
struct Answer {
  std::vector<float> o;
  std::vector<float> lse;
  explicit Answer(const Problem& problem)
      : o(static_cast<std::size_t>(problem.q_heads * problem.q_len * problem.value_dim)),
        lse(static_cast<std::size_t>(problem.q_heads * problem.q_len)) {}
  AttentionOutputs outputs(const Problem& problem) {
    return {mutable_view_of(o.data(), DType::f32, {1, problem.q_heads, problem.q_len, problem.value_dim}), lse};
  }
};

/// The method with a pattern of its own for every query head of one layer.
std::unique_ptr<const Method> method_of(const std::vector<HeadPattern>& heads, const PatternSearch& search) {
  Json layer = Json::object();
  for (const HeadPattern& pattern : heads) layer[std::to_string(layer.size())] = head_pattern_json(pattern, 0);
  const Json parameters{{"config", Json::array({layer})}, {"k", search.block_tiles}, {"last_q", search.last_q}};
  return find_method("minference").make(parameters.dump());
}

std::vector<double> pairs_of(const Plan& plan) {
  std::vector<double> pairs;
  for (std::int64_t block = 0; block < plan.plan_heads; ++block) {
    double sum = 0;
    const std::int64_t queries = plan.queries_of(block);
    for (std::int64_t row = plan.row_begin[block]; row < plan.row_begin[block + 1]; ++row) {
      const std::int64_t rows = std::min(plan.tile_q, queries - (row - plan.row_begin[block]) * plan.tile_q);
      for (const PlanEntry& entry : plan.row(row)) {
        sum += static_cast<double>(rows * plan.keys_of(entry, block).count);
      }
    }
    pairs.push_back(sum);
  }
  return pairs;
}

/// The size that is changed to bring a candidate to a cost.
std::int64_t& size_of(HeadPattern& pattern) {
  const bool columns = pattern.kind == HeadPattern::Kind::vertical_and_slash && pattern.first > pattern.second;
  return columns ? pattern.first : pattern.second;
}

/// The candidate in every head, its larger size set so that each head computes `search.pairs` entries. What a size
/// costs depends on the head, because lines that lie close share keys.
std::vector<HeadPattern> at_equal_cost(const HeadPattern& candidate, const Problem& problem,
                                       const AttentionInputs& inputs, const PatternSearch& search,
                                       const PlanContext& context) {
  std::vector<HeadPattern> heads(static_cast<std::size_t>(problem.q_heads), candidate);
  if (search.pairs <= 0 || candidate.kind == HeadPattern::Kind::block_sparse) return heads;
  std::vector<std::int64_t> low(heads.size(), 0);
  std::vector<std::int64_t> high(heads.size(), problem.kv_len);
  std::vector<bool> settled(heads.size());
  for (std::int64_t step = 0; step < kMostSteps; ++step) {
    const std::vector<double> pairs = pairs_of(method_of(heads, search)->plan(problem, inputs, context));
    for (std::size_t head = 0; head < heads.size(); ++head) {
      if (settled[head]) continue;
      std::int64_t& size = size_of(heads[head]);
      if (std::abs(pairs[head] - search.pairs) <= kCostSlack * search.pairs) {
        settled[head] = true;
        continue;
      }
      (pairs[head] > search.pairs ? high : low)[head] = std::min(size, problem.kv_len);
      if (high[head] - low[head] <= 1) {
        settled[head] = true;
        size = std::max<std::int64_t>(low[head], 1);
        continue;
      }
      size = (low[head] + high[head]) / 2;
    }
    if (std::find(settled.begin(), settled.end(), false) == settled.end()) break;
  }
  return heads;
}

double recall_of(const Answer& sparse, const Answer& dense, const Problem& problem, std::int64_t head,
                 std::int64_t first_row) {
  double mass = 0;
  for (std::int64_t row = head * problem.q_len + first_row; row < (head + 1) * problem.q_len; ++row) {
    mass += std::exp(static_cast<double>(sparse.lse[row]) - static_cast<double>(dense.lse[row]));
  }
  // Both LSE are rounded: a pattern that keeps everything has mass 1.
  return std::min(1.0, mass / static_cast<double>(problem.q_len - first_row));
}

double share_within(const Answer& sparse, const Answer& dense, const Problem& problem, std::int64_t head,
                    double tolerance) {
  const std::int64_t elements = problem.q_len * problem.value_dim;
  std::int64_t within = 0;
  for (std::int64_t i = head * elements; i < (head + 1) * elements; ++i) {
    within += std::abs(sparse.o[i] - dense.o[i]) <= tolerance ? 1 : 0;
  }
  return static_cast<double>(within) / static_cast<double>(elements);
}

}  // namespace

std::vector<PatternChoice> search_patterns(const Problem& problem, const AttentionInputs& inputs,
                                           const PatternSearch& search, const RunOptions& run_options) {
  require(problem.causal && problem.batch == 1 && !problem.variable_length() && problem.q_len == problem.kv_len,
          "the search for patterns needs one causal sequence; got batch {}, {} queries, {} keys", problem.batch,
          problem.q_len, problem.kv_len);
  require(!search.candidates.empty(), "candidates is empty; expected one or more patterns");
  require(search.first_row >= 0 && search.first_row < problem.q_len,
          "first_row is {}; expected 0 to {}, the last of the prompt", search.first_row, problem.q_len - 1);
  const PlanContext context{.layer = 0, .layers = 1, .state = nullptr, .run = run_options};
  Answer dense(problem);
  run(dense_plan(problem), inputs, dense.outputs(problem), run_options);
  std::vector<PatternChoice> best(static_cast<std::size_t>(problem.q_heads), PatternChoice{{}, -1, 0});
  Answer sparse(problem);
  for (const HeadPattern& candidate : search.candidates) {
    const std::vector<HeadPattern> heads = at_equal_cost(candidate, problem, inputs, search, context);
    const Plan plan = method_of(heads, search)->plan(problem, inputs, context);
    run(plan, inputs, sparse.outputs(problem), run_options);
    const std::vector<double> pairs = pairs_of(plan);
    for (std::size_t head = 0; head < best.size(); ++head) {
      const auto index = static_cast<std::int64_t>(head);
      const double score = search.form == PatternForm::recall
                               ? recall_of(sparse, dense, problem, index, search.first_row)
                               : share_within(sparse, dense, problem, index, search.tolerance);
      if (score > best[head].score) best[head] = {heads[head], score, pairs[head]};
    }
  }
  return best;
}

double pairs_of_a_shape(std::int64_t tokens, std::int64_t n_init, std::int64_t n_local) {
  // As score::AShape writes it: runs of whole query tiles, cut by a band.
  double pairs = 0;
  for (std::int64_t first = 0; first < tokens; first += kTile) {
    const std::int64_t end = std::min(first + kTile, tokens);
    const std::int64_t window = std::max<std::int64_t>(0, first - n_local + 1);
    const std::int64_t keys = std::min(n_init, window) + end - window;
    pairs += static_cast<double>((end - first) * keys);
  }
  return pairs;
}

std::int64_t block_tiles_for(std::int64_t tokens, double pairs) {
  const std::int64_t tiles = (tokens + kTile - 1) / kTile;
  double sum = 0;
  for (std::int64_t k = 1; k <= tiles; ++k) {
    // The k-th tile is there for the query tiles from k - 1 on.
    const double more = static_cast<double>((tiles - k + 1) * kTile * kTile);
    if (sum + more / 2 > pairs && k > 1) return k - 1;
    sum += more;
  }
  return tiles;
}

}  // namespace tessera::tune
