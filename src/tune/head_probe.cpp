#include "tune/head_probe.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/parallel.h"
#include "score/product.h"
#include "score/row_access.h"

namespace tessera::tune {

namespace {

constexpr std::int64_t kRows = 64;  ///< queries of one matrix product

/// Mass on `keys` of a row of exponentials, as a share of its sum.
struct Sums {
  double echo = 0;
  double induction = 0;
};

}  // namespace

RepeatScores score_repeats(const Problem& problem, const AttentionInputs& inputs, std::int64_t first,
                           std::int64_t period, std::int64_t repeats, int threads) {
  check_inputs(problem, inputs);
  require(repeats >= 2 && period >= 1 && first >= 0, "repeats is {}, period {}; expected 2 and 1 or more", repeats,
          period);
  require(problem.causal && problem.batch == 1 && !problem.variable_length() && problem.q_len == problem.kv_len &&
              problem.q_offset_of(0) == 0 && problem.q_len == first + period * repeats,
          "the probe needs one causal sequence of {} tokens; got {} queries and {} keys", first + period * repeats,
          problem.q_len, problem.kv_len);
  require(inputs.modifiers.sink_logits.empty() || std::ssize(inputs.modifiers.sink_logits) == problem.q_heads,
          "sink_logits has {} entries; expected one per query head", inputs.modifiers.sink_logits.size());
  const std::int64_t tokens = problem.q_len;
  const std::int64_t dim = problem.head_dim;
  const std::int64_t probed = first + period;  // the first query that has an earlier occurrence
  const std::int64_t bands = (tokens - probed + kRows - 1) / kRows;
  std::vector<Sums> sums(static_cast<std::size_t>(problem.q_heads * bands));
  struct Scratch {
    std::vector<float> queries, keys, scores;
  };
  std::vector<Scratch> scratch(static_cast<std::size_t>(thread_count(threads)));
  parallel_for(problem.q_heads * bands, threads, [&](std::int64_t item, int thread) {
    const std::int64_t head = item / bands;
    const std::int64_t begin = probed + item % bands * kRows;
    const std::int64_t rows = std::min(kRows, tokens - begin);
    const std::int64_t keys = begin + rows;
    Scratch& own = scratch[static_cast<std::size_t>(thread)];
    own.queries.resize(static_cast<std::size_t>(kRows * dim));
    own.scores.resize(static_cast<std::size_t>(kRows * tokens));
    score::load_queries(problem, inputs, 0, head, begin, rows, own.queries.data());
    const float* key_rows = score::key_rows(problem, inputs, 0, head / problem.group(), 0, keys, keys, own.keys);
    score::multiply_transposed(own.queries.data(), rows, dim, key_rows, keys, dim, dim, problem.softmax_scale(),
                               own.scores.data(), keys);
    const bool has_sink = !inputs.modifiers.sink_logits.empty();
    const float sink = has_sink ? inputs.modifiers.sink_logits[static_cast<std::size_t>(head)] : 0;
    Sums& sum = sums[static_cast<std::size_t>(item)];
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t position = begin + row;
      const float* scores = own.scores.data() + row * keys;
      const float most = *std::max_element(scores, scores + position + 1);
      const auto weight = [&](float score) { return std::exp(static_cast<double>(score) - static_cast<double>(most)); };
      double total = has_sink ? weight(sink) : 0;
      for (std::int64_t key = 0; key <= position; ++key) total += weight(scores[key]);
      for (std::int64_t key = position - period; key >= first; key -= period) {
        sum.echo += weight(scores[key]) / total;
        sum.induction += weight(scores[key + 1]) / total;
      }
    }
  });
  RepeatScores scores{std::vector<double>(static_cast<std::size_t>(problem.q_heads)),
                      std::vector<double>(static_cast<std::size_t>(problem.q_heads))};
  for (std::size_t item = 0; item < sums.size(); ++item) {
    const std::size_t head = item / static_cast<std::size_t>(bands);
    scores.echo[head] += sums[item].echo / static_cast<double>(tokens - probed);
    scores.induction[head] += sums[item].induction / static_cast<double>(tokens - probed);
  }
  return scores;
}

std::vector<std::vector<bool>> retrieval_heads(const std::vector<RepeatScores>& layers, std::int64_t kv_heads,
                                               double induction_share, double echo_share) {
  require(!layers.empty() && kv_heads >= 1 && std::ssize(layers[0].echo) % kv_heads == 0,
          "{} layers, {} kv heads; expected a divisor of the query heads", layers.size(), kv_heads);
  const std::size_t heads = layers[0].echo.size();
  const std::size_t group = heads / static_cast<std::size_t>(kv_heads);
  std::vector<std::vector<bool>> retrieval(layers.size(), std::vector<bool>(static_cast<std::size_t>(kv_heads)));
  const auto take = [&](double share, std::size_t least, std::vector<double> RepeatScores::*score) {
    std::vector<std::size_t> order(layers.size() * heads);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return (layers[a / heads].*score)[a % heads] > (layers[b / heads].*score)[b % heads];
    });
    const auto wanted = static_cast<std::size_t>(std::llround(share * static_cast<double>(order.size())));
    order.resize(std::clamp(wanted, share > 0 ? least : 0, order.size()));
    for (const std::size_t i : order) retrieval[i / heads][i % heads / group] = true;
  };
  take(induction_share, 1, &RepeatScores::induction);
  take(echo_share, 0, &RepeatScores::echo);
  return retrieval;
}

}  // namespace tessera::tune
