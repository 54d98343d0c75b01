// Attention problems with the side inputs of recurrent methods, and their recurrences written down token by token.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "score/attention_case.h"
#include "tessera/method.h"

namespace tessera::test {

inline std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

class LinearCase {
 public:
  explicit LinearCase(CaseShape shape, std::uint32_t seed = 3) : input(std::move(shape)), random_(seed) {}

  const Problem& problem() const { return input.problem; }

  /// Adds a side input; missing leading axes are 1.
  void add(const std::string& name, const std::vector<std::int64_t>& shape, const std::vector<float>& values) {
    std::array<std::int64_t, 4> full{1, 1, 1, 1};
    std::copy_backward(shape.begin(), shape.end(), full.end());
    ASSERT_EQ(static_cast<std::int64_t>(values.size()), full[0] * full[1] * full[2] * full[3]) << name;
    storage_.push_back(values);
    input.inputs.side.push_back({name, view_of(storage_.back().data(), DType::f32, full)});
  }
  std::vector<float> draw(std::int64_t count, float low, float high) {
    std::uniform_real_distribution<float> uniform(low, high);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& x : values) x = uniform(random_);
    return values;
  }
  std::int64_t tensor_batch() const { return problem().variable_length() ? 1 : problem().batch; }
  std::int64_t tokens() const { return problem().kv_len; }

  /// g [B, heads, N] or, with a width, [B, heads, N, width], and beta [B, heads, N].
  void add_gates(std::int64_t heads, std::int64_t width, float low, float high) {
    const std::int64_t rows = tensor_batch() * heads * tokens();
    g = draw(rows * std::max<std::int64_t>(width, 1), low, high);
    beta = draw(rows, 0, 1);
    if (width > 0) {
      add("g", {tensor_batch(), heads, tokens(), width}, g);
    } else {
      add("g", {tensor_batch(), heads, tokens()}, g);
    }
    add("beta", {tensor_batch(), heads, tokens()}, beta);
  }

  /// Numbers of the outputs [B, Hq, Nq, Dv].
  std::vector<float> attend(const Method& method, MethodState* state = nullptr,
                            KernelKind kernel = KernelKind::automatic, std::int64_t layer = 0, std::int64_t layers = 1,
                            int threads = 0) const {
    PlanContext context{.layer = layer, .layers = layers, .state = state, .run = {}};
    context.run.kernel = kernel;
    context.run.threads = threads;
    std::vector<float> o(
        static_cast<std::size_t>(tensor_batch() * problem().q_heads * problem().q_len * problem().value_dim));
    method.attend(problem(), input.inputs, {view_o(o), {}}, context);
    return o;
  }
  MutableTensorView view_o(std::vector<float>& o) const {
    return mutable_view_of(o.data(), DType::f32,
                           {tensor_batch(), problem().q_heads, problem().q_len, problem().value_dim});
  }

  float v(std::int64_t s, std::int64_t h, std::int64_t n, std::int64_t d) const {
    return load_as_float(input.inputs.v.row(problem().tensor_batch_of(s), h, problem().kv_begin_of(s) + n),
                         input.inputs.v.dtype, d);
  }
  /// Index of (sequence, head, token) among [B, heads, N].
  std::size_t at(std::int64_t s, std::int64_t heads, std::int64_t h, std::int64_t n) const {
    return static_cast<std::size_t>((problem().tensor_batch_of(s) * heads + h) * tokens() + problem().kv_begin_of(s) +
                                    n);
  }

  /// What a token does, by (sequence, query head, token): log decay of a channel, and beta (negative: no delta rule).
  struct Rule {
    std::function<double(std::int64_t, std::int64_t, std::int64_t, std::int64_t)> decay;
    std::function<double(std::int64_t, std::int64_t, std::int64_t)> beta;
    double scale = 1;
    bool normalise = false;
  };

  /// The recurrence in float64, from nothing but the numbers of this case. [B, Hq, Nq, Dv].
  std::vector<double> expected(const Rule& rule) const {
    const Problem& p = problem();
    std::vector<double> o(static_cast<std::size_t>(tensor_batch() * p.q_heads * p.q_len * p.value_dim));
    for (std::int64_t s = 0; s < p.batch; ++s) {
      for (std::int64_t h = 0; h < p.q_heads; ++h) {
        const std::int64_t kv = h / p.group();
        std::vector<double> state(static_cast<std::size_t>(p.head_dim * p.value_dim), 0.0);
        const std::int64_t before = p.kv_len_of(s) - p.q_len_of(s);
        for (std::int64_t t = 0; t < p.kv_len_of(s); ++t) {
          const std::vector<double> k =
              row([&](std::int64_t d) { return input.k(s, kv, t, d); }, p.head_dim, rule.normalise);
          for (std::int64_t d = 0; d < p.head_dim; ++d) {
            for (std::int64_t e = 0; e < p.value_dim; ++e)
              state[d * p.value_dim + e] *= std::exp(rule.decay(s, h, t, d));
          }
          const double strength = rule.beta(s, h, t);
          for (std::int64_t e = 0; e < p.value_dim; ++e) {
            double written = v(s, kv, t, e);
            for (std::int64_t d = 0; d < p.head_dim && strength >= 0; ++d) written -= k[d] * state[d * p.value_dim + e];
            for (std::int64_t d = 0; d < p.head_dim; ++d) {
              state[d * p.value_dim + e] += (strength >= 0 ? strength : 1.0) * k[d] * written;
            }
          }
          if (t < before) continue;
          const std::vector<double> q =
              row([&](std::int64_t d) { return input.q(s, h, t - before, d); }, p.head_dim, rule.normalise);
          for (std::int64_t e = 0; e < p.value_dim; ++e) {
            double sum = 0;
            for (std::int64_t d = 0; d < p.head_dim; ++d) sum += rule.scale * q[d] * state[d * p.value_dim + e];
            o[((p.tensor_batch_of(s) * p.q_heads + h) * p.q_len + p.q_begin_of(s) + t - before) * p.value_dim + e] =
                sum;
          }
        }
      }
    }
    return o;
  }

  AttentionCase input;
  std::vector<float> g;
  std::vector<float> beta;

 private:
  template <class Read>
  static std::vector<double> row(const Read& read, std::int64_t size, bool normalise) {
    std::vector<double> values;
    double squares = 1e-6;
    for (std::int64_t d = 0; d < size; ++d) {
      values.push_back(read(d));
      squares += values.back() * values.back();
    }
    for (double& x : values) x = normalise ? x / std::sqrt(squares) : x;
    return values;
  }

  std::deque<std::vector<float>> storage_;
  std::mt19937 random_;
};

template <class Actual, class Expected>
void expect_near(const Actual& actual, const Expected& expected, double tolerance, const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  double squares = 0;
  for (const auto x : expected) squares += static_cast<double>(x) * static_cast<double>(x);
  const double size = std::sqrt(squares / static_cast<double>(std::max<std::size_t>(1, expected.size()))) + 1e-9;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], tolerance * size) << what << ", element " << i;
  }
}

/// Shapes that a recurrence accepts: causal, a key for every query, queries on the last keys.
inline std::vector<CaseShape> recurrent_shapes() {
  return {{.name = "square", .q_len = 200, .kv_len = 200},
          {.name = "one_token", .q_len = 1, .kv_len = 1},
          {.name = "chunk_plus_one", .q_len = 65, .kv_len = 65},
          {.name = "last_queries", .q_len = 30, .kv_len = 150},
          {.name = "grouped_heads", .q_heads = 4, .kv_heads = 2, .q_len = 90, .kv_len = 90},
          {.name = "batch", .batch = 3, .q_len = 70, .kv_len = 100},
          {.name = "one_query_sees_all", .q_len = 1, .kv_len = 100, .causal = false},
          {.name = "variable_lengths", .q_lens = {130, 0, 1, 70}, .kv_lens = {130, 10, 40, 90}},
          {.name = "bf16", .q_len = 100, .kv_len = 100, .dtype = DType::bf16},
          {.name = "f16", .q_len = 100, .kv_len = 100, .dtype = DType::f16}};
}

/// A problem on the tokens [0, keys) of `whole`, of which the last `queries` ask. With `alone` the keys before them are
/// left out, as by a caller that keeps no cache.
struct Part {
  Problem problem;
  AttentionInputs inputs;
};
inline Part part_of(const LinearCase& whole, std::int64_t keys, std::int64_t queries, bool alone) {
  Part part{whole.problem(), whole.input.inputs};
  const std::int64_t first = alone ? keys - queries : 0;
  part.problem.kv_len = keys - first;
  part.problem.q_len = queries;
  const auto cut = [](TensorView& view, std::int64_t from, std::int64_t count, std::size_t axis) {
    view.data = static_cast<const std::byte*>(view.data) +
                from * view.strides.at(axis) * static_cast<std::int64_t>(size_of(view.dtype));
    view.shape.at(axis) = count;
  };
  cut(part.inputs.q, keys - queries, queries, 2);
  if (!part.inputs.pages.used()) {
    cut(part.inputs.k, first, part.problem.kv_len, 2);
    cut(part.inputs.v, first, part.problem.kv_len, 2);
  }
  for (SideTensor& side : part.inputs.side) {
    if (side.name == "beta" || (side.name == "g" && side.view.shape[3] == whole.tokens())) {
      cut(side.view, first, part.problem.kv_len, 3);
    } else if (side.name == "g" || side.name == "output_gate") {
      cut(side.view, first, part.problem.kv_len, 2);
    }
  }
  return part;
}

/// Prefill in chunks and then single tokens gives what one call gives, with a cache of keys and without, paged or not;
/// the states of layers do not mix.
inline void expect_chunks_and_decode_equal_one_shot(const Method& method, const LinearCase& whole) {
  const Problem& p = whole.problem();
  const std::vector<float> expected = whole.attend(method, nullptr, KernelKind::automatic, 1, 4);
  for (const bool alone : {false, true}) {
    if (alone && whole.input.inputs.pages.used()) continue;
    const std::unique_ptr<MethodState> state = method.new_state();
    ASSERT_NE(state, nullptr);
    std::vector<float> o(expected.size());
    std::int64_t done = 0;
    for (const std::int64_t count : {70, 1, 33, 1, 1, 40, 1}) {
      done += count;
      const Part part = part_of(whole, done, count, alone);
      MutableTensorView view = whole.view_o(o);
      view.data = view.row(0, 0, done - count);
      view.shape[2] = count;
      const PlanContext context{.layer = 1, .layers = 4, .state = state.get(), .run = {}};
      method.attend(part.problem, part.inputs, {view, {}}, context);
      // Another layer's call in between leaves this layer's state alone.
      std::vector<float> other(static_cast<std::size_t>(p.batch * p.q_heads * count * p.value_dim));
      const PlanContext next{.layer = 2, .layers = 4, .state = state.get(), .run = {}};
      method.attend(part.problem, part.inputs,
                    {mutable_view_of(other.data(), DType::f32, {p.batch, p.q_heads, count, p.value_dim}), {}}, next);
    }
    ASSERT_EQ(done, p.kv_len);
    expect_near(o, expected, 1e-4, alone ? "without a cache" : "with a cache");
  }
}

}  // namespace tessera::test
