// Recurrent problems with random tensors for tests.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tessera/recurrent.h"

namespace tessera::test {

enum class Decay : std::uint8_t { none, scalar, channel };

struct RecurrentShape {
  std::int64_t batch = 1;
  std::int64_t heads = 1;
  std::int64_t q_heads = 0;  ///< 0: heads
  std::int64_t k_heads = 0;
  std::int64_t v_heads = 0;
  std::int64_t head_dim = 16;
  std::int64_t value_dim = 16;
  std::int64_t tokens = 0;
  std::int64_t queries = -1;  ///< -1: tokens
  Decay decay = Decay::none;
  bool delta = false;
  bool normalise = false;    ///< keys then have other lengths than 1
  float decay_scale = 0.5F;  ///< log decays lie between 0 and minus this
  DType dtype = DType::f32;
  std::vector<std::int64_t> lengths = {};  ///< of a variable-length batch
  std::vector<std::int64_t> query_lengths = {};
};

/// A tensor that owns its numbers.
struct OwnTensor {
  std::vector<std::uint32_t> storage;
  MutableTensorView view;

  void allocate(std::array<std::int64_t, 4> shape, DType dtype) {
    storage.assign(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3] + 1), 0);
    view = mutable_view_of(storage.data(), dtype, shape);
  }
  float get(std::int64_t b, std::int64_t h, std::int64_t n, std::int64_t d) const {
    return load_as_float(view.row(b, h, n), view.dtype, d);
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t n, std::int64_t d, float x) const {
    store_from_float(view.row(b, h, n), view.dtype, d, x);
  }
  template <class Draw>
  void fill(Draw&& draw) {
    for (std::int64_t b = 0; b < view.shape[0]; ++b) {
      for (std::int64_t h = 0; h < view.shape[1]; ++h) {
        for (std::int64_t n = 0; n < view.shape[2]; ++n) {
          for (std::int64_t d = 0; d < view.shape[3]; ++d) set(b, h, n, d, draw());
        }
      }
    }
  }
  /// All numbers as floats.
  std::vector<float> numbers() const {
    std::vector<float> out;
    for (std::int64_t b = 0; b < view.shape[0]; ++b) {
      for (std::int64_t h = 0; h < view.shape[1]; ++h) {
        for (std::int64_t n = 0; n < view.shape[2]; ++n) {
          for (std::int64_t d = 0; d < view.shape[3]; ++d) out.push_back(get(b, h, n, d));
        }
      }
    }
    return out;
  }
};

struct RecurrentAnswer {
  OwnTensor o;
  std::vector<float> state;
};

class RecurrentCase {
 public:
  /// The copy looks at its own numbers wherever the other looks at its own.
  RecurrentCase(const RecurrentCase& other)
      : shape(other.shape),
        problem(other.problem),
        inputs(other.inputs),
        q(other.q),
        k(other.k),
        v(other.v),
        decay(other.decay),
        beta(other.beta),
        state(other.state),
        random_(other.random_) {
    adopt(q, other.q, inputs.q);
    adopt(k, other.k, inputs.k);
    adopt(v, other.v, inputs.v);
    adopt(decay, other.decay, inputs.decay);
    adopt(beta, other.beta, inputs.beta);
  }
  RecurrentCase& operator=(const RecurrentCase&) = delete;

  explicit RecurrentCase(RecurrentShape of, std::uint32_t seed = 1) : shape(std::move(of)), random_(seed) {
    problem.batch = shape.lengths.empty() ? shape.batch : static_cast<std::int64_t>(shape.lengths.size());
    problem.heads = shape.heads;
    problem.q_heads = shape.q_heads > 0 ? shape.q_heads : shape.heads;
    problem.k_heads = shape.k_heads > 0 ? shape.k_heads : shape.heads;
    problem.v_heads = shape.v_heads > 0 ? shape.v_heads : shape.heads;
    problem.head_dim = shape.head_dim;
    problem.value_dim = shape.value_dim;
    problem.kv_len = shape.tokens;
    problem.q_len = shape.queries >= 0 ? shape.queries : shape.tokens;
    if (!shape.lengths.empty()) {
      problem.cu_seqlens_k = offsets(shape.lengths);
      problem.cu_seqlens_q = offsets(shape.query_lengths.empty() ? shape.lengths : shape.query_lengths);
      problem.kv_len = problem.cu_seqlens_k.back();
      problem.q_len = problem.cu_seqlens_q.back();
    }
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;
    q.allocate({batch, problem.q_heads, problem.q_len, problem.head_dim}, shape.dtype);
    k.allocate({batch, problem.k_heads, problem.kv_len, problem.head_dim}, shape.dtype);
    v.allocate({batch, problem.v_heads, problem.kv_len, problem.value_dim}, shape.dtype);
    q.fill([&] { return normal(random_); });
    k.fill([&] { return normal(random_); });
    if (!shape.normalise) normalise_keys();
    problem.normalise = shape.normalise;
    v.fill([&] { return normal(random_); });
    inputs.q = q.view;
    inputs.k = k.view;
    inputs.v = v.view;
    if (shape.decay != Decay::none) {
      decay.allocate({batch, problem.heads, problem.kv_len, shape.decay == Decay::scalar ? 1 : problem.head_dim},
                     DType::f32);
      decay.fill([&] { return -shape.decay_scale * uniform(random_); });
      inputs.decay = decay.view;
    }
    if (shape.delta) {
      beta.allocate({batch, problem.heads, problem.kv_len, 1}, DType::f32);
      beta.fill([&] { return uniform(random_); });
      inputs.beta = beta.view;
    }
    state.resize(static_cast<std::size_t>(problem.state_size()));
    for (float& x : state) x = normal(random_);
  }

  RecurrentAnswer run(const RecurrentOptions& options) const {
    RecurrentAnswer answer;
    answer.o.allocate({q.view.shape[0], problem.heads, problem.q_len, problem.value_dim}, shape.dtype);
    answer.state = state;
    run_recurrent(problem, inputs, answer.state, answer.o.view, options);
    return answer;
  }

  /// Rows of length 1, as the delta rule wants them.
  void normalise_keys() {
    for (std::int64_t b = 0; b < k.view.shape[0]; ++b) {
      for (std::int64_t h = 0; h < k.view.shape[1]; ++h) {
        for (std::int64_t n = 0; n < k.view.shape[2]; ++n) {
          double squares = 1e-12;
          for (std::int64_t d = 0; d < k.view.shape[3]; ++d) squares += std::pow(k.get(b, h, n, d), 2);
          const auto factor = static_cast<float>(1 / std::sqrt(squares));
          for (std::int64_t d = 0; d < k.view.shape[3]; ++d) k.set(b, h, n, d, factor * k.get(b, h, n, d));
        }
      }
    }
  }

  RecurrentShape shape;
  RecurrentProblem problem;
  RecurrentInputs inputs;
  OwnTensor q, k, v, decay, beta;
  std::vector<float> state;

 private:
  static void adopt(OwnTensor& own, const OwnTensor& from, TensorView& view) {
    own.view.data = own.storage.data();
    if (view.data != nullptr && view.data == from.view.data) view.data = own.view.data;
  }
  static std::vector<std::int64_t> offsets(const std::vector<std::int64_t>& lengths) {
    std::vector<std::int64_t> out{0};
    for (const std::int64_t n : lengths) out.push_back(out.back() + n);
    return out;
  }
  std::mt19937 random_;
};

/// Largest difference over the root mean square of what is expected.
inline double deviation(const std::vector<float>& actual, const std::vector<float>& expected) {
  if (actual.size() != expected.size()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  double squares = 1e-30;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double difference = std::abs(static_cast<double>(actual[i]) - expected[i]);
    if (!(difference <= worst)) worst = difference;
    if (std::isnan(worst)) return std::numeric_limits<double>::infinity();
    squares += static_cast<double>(expected[i]) * expected[i];
  }
  return worst / std::sqrt(squares / static_cast<double>(std::max<std::size_t>(1, actual.size())));
}

inline void expect_same(const RecurrentAnswer& actual, const RecurrentAnswer& expected, double tolerance,
                        const std::string& what) {
  EXPECT_LE(deviation(actual.o.numbers(), expected.o.numbers()), tolerance) << what << ", outputs";
  EXPECT_LE(deviation(actual.state, expected.state), tolerance) << what << ", final state";
}

}  // namespace tessera::test
