// Layers of linear attention written down token by token in float64, and their gradients by central differences.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tessera/method.h"

namespace tessera::test {

/// What a layer does, beside the tensors that it has.
struct LayerSettings {
  std::string spec;
  std::int64_t batch = 1;
  std::int64_t q_heads = 2;
  std::int64_t kv_heads = 1;
  std::int64_t side_heads = 2;  ///< of g, beta and the output gate: q_heads or kv_heads
  std::int64_t tokens = 40;
  std::int64_t queries = 40;
  std::int64_t head_dim = 6;
  std::int64_t value_dim = 5;
  std::vector<std::int64_t> q_lens = {};  ///< a variable-length batch
  std::vector<std::int64_t> kv_lens = {};
  std::string decay = "none";   ///< log, softplus, bounded: of g; lambda; slope: constant per head; none
  std::string beta = "absent";  ///< none, sigmoid, twice-sigmoid; absent: no delta rule
  bool channels = false;        ///< a decay per key channel
  bool normalise = false;
  bool silu = false;
  std::int64_t convolution = 0;  ///< width; 0: none
  std::string norm = "none";
  std::string curve = {};  ///< of the output gate; empty: none
  bool initial_state = false;
  double scale = 1;
};

class LayerGradient {
 public:
  using Numbers = std::map<std::string, std::vector<double>>;
  struct Tensor {
    std::array<std::int64_t, 4> shape;
    std::vector<float> values;
    TensorView view() const { return view_of(values.data(), DType::f32, shape); }
  };

  explicit LayerGradient(const LayerSettings& settings, unsigned seed = 1) : s(settings), random_(seed) {
    problem.batch = s.batch;
    problem.q_heads = s.q_heads;
    problem.kv_heads = s.kv_heads;
    problem.q_len = s.queries;
    problem.kv_len = s.tokens;
    if (!s.q_lens.empty()) {
      problem.batch = static_cast<std::int64_t>(s.q_lens.size());
      problem.cu_seqlens_q = problem.cu_seqlens_k = {0};
      for (const std::int64_t n : s.q_lens) problem.cu_seqlens_q.push_back(problem.cu_seqlens_q.back() + n);
      for (const std::int64_t n : s.kv_lens) problem.cu_seqlens_k.push_back(problem.cu_seqlens_k.back() + n);
      problem.q_len = problem.cu_seqlens_q.back();
      problem.kv_len = problem.cu_seqlens_k.back();
    }
    problem.head_dim = s.head_dim;
    problem.value_dim = s.value_dim;
    problem.causal = true;
    const std::int64_t b = problem.variable_length() ? 1 : problem.batch;
    const std::int64_t n = problem.kv_len;
    add("q", {b, s.q_heads, problem.q_len, s.head_dim}, -1, 1);
    add("k", {b, s.kv_heads, n, s.head_dim}, -1, 1);
    add("v", {b, s.kv_heads, n, s.value_dim}, -1, 1);
    add("d_o", {b, s.q_heads, problem.q_len, s.value_dim}, -1, 1);
    const std::int64_t width = s.channels ? s.head_dim : 1;
    if (s.decay == "log") add("g", {b, s.side_heads, n, width}, -1, -0.01F);
    if (s.decay == "softplus" || s.decay == "bounded") {
      add("g", {b, s.side_heads, n, width}, -2, 2);
      add("A_log", {1, 1, 1, s.q_heads}, -1, 0.5F);
      if (s.channels) {
        add("dt_bias", {1, 1, s.q_heads, width}, -1, 1);
      } else {
        add("dt_bias", {1, 1, 1, s.q_heads}, -1, 1);
      }
    }
    if (s.decay == "lambda") add("lambda", {1, 1, 1, s.q_heads}, 0.7F, 0.99F);
    if (s.beta == "none") add("beta", {1, b, s.side_heads, n}, 0.1F, 0.9F);
    if (s.beta != "none" && s.beta != "absent") add("beta", {b, s.side_heads, n, 1}, -2, 2);
    if (s.convolution > 0) {
      add("conv_q", {1, s.q_heads, s.convolution, s.head_dim}, -1, 1);
      add("conv_k", {1, s.kv_heads, s.convolution, s.head_dim}, -1, 1);
      add("conv_v", {1, s.kv_heads, s.convolution, s.value_dim}, -1, 1);
    }
    if (s.norm != "none") {
      add("norm_weight", {1, 1, 1, (s.norm == "full" ? s.q_heads : 1) * s.value_dim}, 0.5F, 1.5F);
    }
    if (!s.curve.empty()) add("output_gate", {b, s.side_heads, n, s.value_dim}, -2, 2);
    if (s.initial_state) add("initial_state", {problem.batch, s.q_heads, s.head_dim, s.value_dim}, -0.5F, 0.5F);
  }

  AttentionInputs inputs() const {
    AttentionInputs inputs;
    for (const auto& [name, tensor] : tensors) {
      if (name == "q") {
        inputs.q = tensor.view();
      } else if (name == "k") {
        inputs.k = tensor.view();
      } else if (name == "v") {
        inputs.v = tensor.view();
      } else if (name != "d_o") {
        inputs.side.push_back({name, tensor.view()});
      }
    }
    return inputs;
  }

  Numbers numbers() const {
    Numbers numbers;
    for (const auto& [name, tensor] : tensors) numbers[name].assign(tensor.values.begin(), tensor.values.end());
    return numbers;
  }

  /// [B, Hq, Nq, Dv].
  std::vector<double> outputs(const Numbers& x) const {
    std::vector<double> o(tensors.at("d_o").values.size());
    for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
      for (std::int64_t h = 0; h < s.q_heads; ++h) recur(x, sequence, h, o);
      if (s.norm == "none" && s.curve.empty()) continue;
      for (std::int64_t n = 0; n < problem.q_len_of(sequence); ++n) finish(x, sequence, n, o);
    }
    return o;
  }

  std::map<std::string, std::vector<float>> gradients(KernelKind kernel, int threads = 0, std::int64_t layer = 0,
                                                      std::int64_t layers = 1) const {
    std::map<std::string, std::vector<float>> values;
    Gradients gradients;
    for (const auto& [name, tensor] : tensors) {
      if (name == "d_o") continue;
      auto& memory = values[name];
      memory.assign(tensor.values.size(), 99.0F);
      const MutableTensorView view = mutable_view_of(memory.data(), DType::f32, tensor.shape);
      if (name == "q") {
        gradients.d_q = view;
      } else if (name == "k") {
        gradients.d_k = view;
      } else if (name == "v") {
        gradients.d_v = view;
      } else {
        gradients.side.push_back({name, view});
      }
    }
    SavedForward saved;
    saved.d_o = tensors.at("d_o").view();
    saved.o = saved.d_o;  // only its shape matters: a recurrence is computed again
    PlanContext context{.layer = layer, .layers = layers, .state = nullptr, .run = {}};
    context.run.kernel = kernel;
    context.run.threads = threads;
    make_method(s.spec)->backward(problem, inputs(), saved, gradients, context);
    return values;
  }

  /// Compares the forward pass with the definition and every tensor's gradient with differences of the definition, the
  /// float64 form closely and the chunked one as float sums allow.
  void check() {
    SCOPED_TRACE(s.spec + " tokens " + std::to_string(problem.kv_len) + " heads " + std::to_string(s.q_heads));
    Numbers x = numbers();
    std::vector<float> o(tensors.at("d_o").values.size());
    const std::vector<double> defined = outputs(x);
    make_method(s.spec)->attend(problem, inputs(), {mutable_view_of(o.data(), DType::f32, tensors.at("d_o").shape), {}},
                                {});
    for (std::size_t i = 0; i < o.size(); ++i) ASSERT_NEAR(o[i], defined[i], 1e-4 * (1 + std::fabs(defined[i])));
    const auto loss = [&] {
      const auto out = outputs(x);
      double sum = 0;
      for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * x.at("d_o")[i];
      return sum;
    };
    const auto exact = gradients(KernelKind::reference);
    const auto chunked = gradients(KernelKind::automatic);
    for (const auto& [name, reference] : exact) {
      std::map<std::size_t, double> expected;
      double largest = 0;
      for (int sample = 0; sample < 14 && !reference.empty(); ++sample) {
        const std::size_t i = random_() % reference.size();
        constexpr double h = 1e-5;
        double& value = x.at(name)[i];
        const double kept = value;
        value = kept + h;
        const double above = loss();
        value = kept - h;
        const double below = loss();
        value = kept;
        expected[i] = (above - below) / (2 * h);
        largest = std::max(largest, std::fabs(expected[i]));
      }
      for (const auto& [i, wanted] : expected) {
        ASSERT_NEAR(reference[i], wanted, 2e-5 * (largest + 0.01)) << name << " element " << i << ", float64";
        ASSERT_NEAR(chunked.at(name)[i], wanted, 3e-4 * (largest + 0.01)) << name << " element " << i << ", chunked";
      }
      for (std::size_t i = 0; i < reference.size(); ++i) {
        ASSERT_NEAR(chunked.at(name)[i], reference[i], 3e-4 * (largest + 1 + std::fabs(reference[i])))
            << name << " element " << i;
      }
    }
  }

  LayerSettings s;
  Problem problem;
  std::map<std::string, Tensor> tensors;
  std::vector<double> slopes;  ///< log decay per head of decay=slope

 private:
  void add(const std::string& name, const std::array<std::int64_t, 4>& shape, float low, float high) {
    std::uniform_real_distribution<float> uniform(low, high);
    Tensor& tensor = tensors[name];
    tensor.shape = shape;
    tensor.values.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
    for (float& value : tensor.values) value = uniform(random_);
  }

  /// Number of a tensor [B, heads, tokens, dim], where query head h reads the head that it shares.
  double at(const Numbers& x, const std::string& name, std::int64_t heads, std::int64_t sequence, std::int64_t h,
            std::int64_t length, std::int64_t n, std::int64_t dim, std::int64_t d) const {
    const std::int64_t b = problem.tensor_batch_of(sequence);
    return x.at(name)[static_cast<std::size_t>(((b * heads + h * heads / s.q_heads) * length + n) * dim + d)];
  }

  /// Row t of q, k or v of a sequence as the recurrence reads it.
  std::vector<double> stream(const Numbers& x, const std::string& name, std::int64_t sequence, std::int64_t h,
                             std::int64_t t) const {
    const std::int64_t heads = name == "q" ? s.q_heads : s.kv_heads;
    const std::int64_t dim = name == "v" ? s.value_dim : s.head_dim;
    const std::int64_t length = name == "q" ? problem.q_len : problem.kv_len;
    const std::int64_t begin = name == "q" ? problem.q_begin_of(sequence) : problem.kv_begin_of(sequence);
    std::vector<double> row;
    for (std::int64_t d = 0; d < dim; ++d) {
      double value = 0;
      if (s.convolution > 0) {
        const std::int64_t own = h * heads / s.q_heads;
        for (std::int64_t m = 0; m < s.convolution; ++m) {
          const std::int64_t from = t - s.convolution + 1 + m;
          if (from < 0) continue;
          value += x.at("conv_" + name)[static_cast<std::size_t>((own * s.convolution + m) * dim + d)] *
                   at(x, name, heads, sequence, h, length, begin + from, dim, d);
        }
      } else {
        value = at(x, name, heads, sequence, h, length, begin + t, dim, d);
      }
      if (s.convolution > 0 || (s.silu && name != "v")) value /= 1 + std::exp(-value);
      row.push_back(value);
    }
    if (s.normalise && name != "v") {
      double squares = 1e-6;
      for (const double value : row) squares += value * value;
      for (double& value : row) value /= std::sqrt(squares);
    }
    return row;
  }

  double decay(const Numbers& x, std::int64_t sequence, std::int64_t h, std::int64_t t, std::int64_t d) const {
    if (s.decay == "none") return 1;
    if (s.decay == "slope") return std::exp(slopes[static_cast<std::size_t>(h)]);
    if (s.decay == "lambda") return x.at("lambda")[static_cast<std::size_t>(h)];
    const std::int64_t width = s.channels ? s.head_dim : 1;
    const std::int64_t c = s.channels ? d : 0;
    const double g = at(x, "g", s.side_heads, sequence, h, problem.kv_len, problem.kv_begin_of(sequence) + t, width, c);
    if (s.decay == "log") return std::exp(g);
    const double raw = g + x.at("dt_bias")[static_cast<std::size_t>(h * width + c)];
    const double rate = std::exp(x.at("A_log")[static_cast<std::size_t>(h)]);
    return std::exp(s.decay == "softplus" ? -rate * std::log(1 + std::exp(raw)) : -5 / (1 + std::exp(-rate * raw)));
  }

  void recur(const Numbers& x, std::int64_t sequence, std::int64_t h, std::vector<double>& o) const {
    const std::int64_t dim = s.head_dim;
    const std::int64_t width = s.value_dim;
    std::vector<double> state(static_cast<std::size_t>(dim * width), 0.0);
    if (s.initial_state) {
      const auto first = x.at("initial_state").begin() + (sequence * s.q_heads + h) * dim * width;
      std::copy_n(first, dim * width, state.begin());
    }
    const std::int64_t before = problem.kv_len_of(sequence) - problem.q_len_of(sequence);
    for (std::int64_t t = 0; t < problem.kv_len_of(sequence); ++t) {
      const auto k = stream(x, "k", sequence, h, t);
      const auto v = stream(x, "v", sequence, h, t);
      for (std::int64_t d = 0; d < dim; ++d) {
        for (std::int64_t e = 0; e < width; ++e) state[d * width + e] *= decay(x, sequence, h, t, d);
      }
      double strength = 1;
      if (s.beta != "absent") {
        strength = at(x, "beta", s.side_heads, sequence, h, problem.kv_len, problem.kv_begin_of(sequence) + t, 1, 0);
        if (s.beta != "none") strength = (s.beta == "sigmoid" ? 1 : 2) / (1 + std::exp(-strength));
      }
      for (std::int64_t e = 0; e < width; ++e) {
        double written = v[e];
        for (std::int64_t d = 0; d < dim && s.beta != "absent"; ++d) written -= k[d] * state[d * width + e];
        for (std::int64_t d = 0; d < dim; ++d) state[d * width + e] += strength * k[d] * written;
      }
      if (t < before) continue;
      const auto q = stream(x, "q", sequence, h, t - before);
      for (std::int64_t e = 0; e < width; ++e) {
        double sum = 0;
        for (std::int64_t d = 0; d < dim; ++d) sum += s.scale * q[d] * state[d * width + e];
        o[place(sequence, h, t - before) + e] = sum;
      }
    }
  }

  std::size_t place(std::int64_t sequence, std::int64_t h, std::int64_t n) const {
    return static_cast<std::size_t>(
        ((problem.tensor_batch_of(sequence) * s.q_heads + h) * problem.q_len + problem.q_begin_of(sequence) + n) *
        s.value_dim);
  }

  void finish(const Numbers& x, std::int64_t sequence, std::int64_t n, std::vector<double>& o) const {
    const auto norm_factor = [&](std::int64_t first, std::int64_t last) {
      double squares = 0;
      for (std::int64_t h = first; h < last; ++h) {
        for (std::int64_t e = 0; e < s.value_dim; ++e) squares += std::pow(o[place(sequence, h, n) + e], 2);
      }
      return 1 / std::sqrt(squares / static_cast<double>((last - first) * s.value_dim) + 1e-5);
    };
    const double full = s.norm == "full" ? norm_factor(0, s.q_heads) : 1;
    const std::int64_t token =
        problem.kv_begin_of(sequence) + problem.kv_len_of(sequence) - problem.q_len_of(sequence) + n;
    for (std::int64_t h = 0; h < s.q_heads; ++h) {
      const double factor = s.norm == "head" ? norm_factor(h, h + 1) : full;
      for (std::int64_t e = 0; e < s.value_dim; ++e) {
        double& value = o[place(sequence, h, n) + e];
        value *= factor;
        if (s.norm != "none") {
          value *= x.at("norm_weight")[static_cast<std::size_t>(s.norm == "full" ? h * s.value_dim + e : e)];
        }
        if (s.curve.empty()) continue;
        const double gate = at(x, "output_gate", s.side_heads, sequence, h, problem.kv_len, token, s.value_dim, e);
        value *= (s.curve == "silu" ? gate : 1) / (1 + std::exp(-gate));
      }
    }
  }

  std::mt19937 random_;
};

}  // namespace tessera::test
