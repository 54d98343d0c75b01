// NSA by its definition in float64, with the inputs that it reads.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tessera/gradient.h"
#include "tessera/method.h"

namespace tessera::test {

struct NsaSettings {
  std::string compress = "mean";
  bool positions = false;
  bool own_compress = false;  ///< k_compress (before RoPE) and v_compress
  bool own_window = false;
  std::int64_t length = 8;
  std::int64_t stride = 4;
  std::int64_t block = 8;
  std::int64_t top_k = 3;
  std::int64_t init = 1;
  std::int64_t local = 1;
  std::int64_t window = 6;
  double bias[3] = {0.5, -0.25, 0};

  std::string spec() const {
    return fmt::format(
        "nsa:length={},stride={},compress={},block_size={},top_k={},init={},local={},window={},"
        "gate_bias_compressed={},gate_bias_selected={},gate_bias_window={},rope_theta=100",
        length, stride, compress, block, top_k, init, local, window, bias[0], bias[1], bias[2]);
  }
};

/// Tensors by name, [B, H, N, D] with B = 1, in float; the definition reads them as double.
class NsaCase {
 public:
  NsaCase(const NsaSettings& settings, std::int64_t q_len, std::int64_t kv_len, unsigned seed = 1)
      : settings_(settings), random_(seed) {
    problem.q_heads = 4;
    problem.kv_heads = 2;
    problem.q_len = q_len;
    problem.kv_len = kv_len;
    problem.head_dim = 6;
    problem.value_dim = 5;
    problem.causal = true;
    add("q", 4, q_len, 6);
    add("k", 2, kv_len, 6);
    add("v", 2, kv_len, 5);
    add("gate_logits", 4, q_len, 3);
    for (const auto& [of, dim] : {std::pair{std::string("k"), 6}, std::pair{std::string("v"), 5}}) {
      if (settings.own_compress) add(of + "_compress", 2, kv_len, dim);
      if (settings.own_window) add(of + "_window", 2, kv_len, dim);
      if (settings.positions) add("positions_" + of, 2, settings.length, dim);
      if (settings.compress == "pool") add("pool_" + of, 2, settings.length, 1);
      if (settings.compress == "linear") add("linear_" + of, 2, settings.length * dim, dim);
      if (settings.compress == "mlp") {
        add("hidden_" + of, 2, settings.length * dim, 9);
        add("output_" + of, 2, 9, dim);
      }
    }
    add("d_o", 4, q_len, 5);
  }

  struct Tensor {
    std::array<std::int64_t, 4> shape;
    std::vector<float> values;
    TensorView view() const { return view_of(values.data(), DType::f32, shape); }
  };
  using Numbers = std::map<std::string, std::vector<double>>;

  AttentionInputs inputs() const {
    AttentionInputs result;
    result.q = tensors.at("q").view();
    result.k = tensors.at("k").view();
    result.v = tensors.at("v").view();
    for (const auto& [name, tensor] : tensors) {
      if (is_side(name)) result.side.push_back({name, tensor.view()});
    }
    return result;
  }
  static bool is_side(const std::string& name) { return name != "q" && name != "k" && name != "v" && name != "d_o"; }

  Numbers numbers() const {
    Numbers result;
    for (const auto& [name, tensor] : tensors) result[name].assign(tensor.values.begin(), tensor.values.end());
    return result;
  }

  /// Compressed keys or values of one kv head by definition: [tokens][dim].
  std::vector<std::vector<double>> compressed(const Numbers& x, const std::string& of, std::int64_t kv_head) const {
    const std::int64_t dim = of == "k" ? problem.head_dim : problem.value_dim;
    const std::int64_t l = settings_.length;
    const auto& rows = x.at(x.count(of + "_compress") != 0 ? of + "_compress" : of);
    const auto weight = [&](const std::string& name, std::int64_t i, std::int64_t j, std::int64_t rows_of_it,
                            std::int64_t columns) {
      return x.at(name)[static_cast<std::size_t>((kv_head * rows_of_it + i) * columns + j)];
    };
    std::vector<std::vector<double>> tokens;
    for (std::int64_t t = 0; t * settings_.stride + l <= problem.kv_len; ++t) {
      std::vector<double> flat;
      for (std::int64_t p = 0; p < l; ++p) {
        for (std::int64_t d = 0; d < dim; ++d) {
          const std::int64_t n = t * settings_.stride + p;
          double value = rows[static_cast<std::size_t>((kv_head * problem.kv_len + n) * dim + d)];
          if (settings_.positions) value += weight("positions_" + of, p, d, l, dim);
          flat.push_back(value);
        }
      }
      std::vector<double> token(static_cast<std::size_t>(dim), 0.0);
      std::vector<double> hidden(9, 0.0);
      if (settings_.compress == "mlp") {
        for (std::int64_t h = 0; h < 9; ++h) {
          for (std::int64_t i = 0; i < l * dim; ++i) {
            hidden[static_cast<std::size_t>(h)] +=
                flat[static_cast<std::size_t>(i)] * weight("hidden_" + of, i, h, l * dim, 9);
          }
          hidden[static_cast<std::size_t>(h)] = std::max(hidden[static_cast<std::size_t>(h)], 0.0);
        }
      }
      for (std::int64_t d = 0; d < dim; ++d) {
        double& to = token[static_cast<std::size_t>(d)];
        if (settings_.compress == "mlp") {
          for (std::int64_t h = 0; h < 9; ++h)
            to += hidden[static_cast<std::size_t>(h)] * weight("output_" + of, h, d, 9, dim);
        } else if (settings_.compress == "linear") {
          for (std::int64_t i = 0; i < l * dim; ++i) {
            to += flat[static_cast<std::size_t>(i)] * weight("linear_" + of, i, d, l * dim, dim);
          }
        } else {
          for (std::int64_t p = 0; p < l; ++p) {
            to += flat[static_cast<std::size_t>(p * dim + d)] *
                  (settings_.compress == "pool" ? weight("pool_" + of, p, 0, l, 1) : 1.0 / static_cast<double>(l));
          }
        }
      }
      if (of == "k" && settings_.own_compress) {  // rotate pairs (i, i + dim / 2) by position * 100^(-2 i / dim)
        for (std::int64_t i = 0; i < dim / 2; ++i) {
          const double angle = static_cast<double>(t * settings_.stride) *
                               std::pow(100.0, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
          double& a = token[static_cast<std::size_t>(i)];
          double& b = token[static_cast<std::size_t>(i + dim / 2)];
          const double turned = a * std::cos(angle) - b * std::sin(angle);
          b = a * std::sin(angle) + b * std::cos(angle);
          a = turned;
        }
      }
      tokens.push_back(token);
    }
    return tokens;
  }

  /// probabilities over `keys` (rows of one kv head) that `sees` allows; empty sum: all 0.
  template <class Key, class Sees>
  std::vector<double> softmax(const Numbers& x, std::int64_t head, std::int64_t n, std::int64_t count, const Key& key,
                              const Sees& sees) const {
    std::vector<double> p(static_cast<std::size_t>(count), 0.0);
    double sum = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      if (!sees(j)) continue;
      double score = 0;
      for (std::int64_t d = 0; d < problem.head_dim; ++d) {
        score += x.at("q")[static_cast<std::size_t>((head * problem.q_len + n) * problem.head_dim + d)] * key(j, d);
      }
      p[static_cast<std::size_t>(j)] = std::exp(score / std::sqrt(static_cast<double>(problem.head_dim)));
      sum += p[static_cast<std::size_t>(j)];
    }
    for (double& value : p) value = sum > 0 ? value / sum : 0;
    return p;
  }

  std::vector<double> compressed_probabilities(const Numbers& x, std::int64_t head, std::int64_t n,
                                               const std::vector<std::vector<double>>& keys) const {
    const std::int64_t position = problem.kv_len - problem.q_len + n;
    return softmax(
        x, head, n, static_cast<std::int64_t>(keys.size()),
        [&](std::int64_t t, std::int64_t d) { return keys[static_cast<std::size_t>(t)][static_cast<std::size_t>(d)]; },
        [&](std::int64_t t) { return position >= t * settings_.stride + settings_.length - 1; });
  }

  /// Blocks by definition: selected[kv_head][query][block].
  std::vector<std::vector<std::vector<bool>>> selection(const Numbers& x) const {
    const std::int64_t blocks = (problem.kv_len + settings_.block - 1) / settings_.block;
    const std::int64_t r = settings_.block / settings_.stride;
    const std::int64_t e = settings_.length / settings_.stride;
    std::vector<std::vector<std::vector<bool>>> result(2);
    for (std::int64_t h = 0; h < 2; ++h) {
      const auto keys = compressed(x, "k", h);
      for (std::int64_t n = 0; n < problem.q_len; ++n) {
        const std::int64_t own = (problem.kv_len - problem.q_len + n) / settings_.block;
        std::vector<double> importance(static_cast<std::size_t>(blocks), 0.0);
        for (std::int64_t g = 0; g < 2; ++g) {
          const auto p = compressed_probabilities(x, h * 2 + g, n, keys);
          for (std::int64_t j = 0; j < blocks; ++j) {
            for (std::int64_t m = 0; m < r; ++m) {
              for (std::int64_t i = 0; i < e; ++i) {
                const std::int64_t t = r * j + m + i - (e - 1);
                if (t < 0 || t >= static_cast<std::int64_t>(p.size())) continue;
                importance[static_cast<std::size_t>(j)] += p[static_cast<std::size_t>(t)];
              }
            }
          }
        }
        for (std::int64_t j = 0; j < blocks; ++j) {
          if (j < settings_.init || (j <= own && own < j + settings_.local))
            importance[static_cast<std::size_t>(j)] = 1e9;
        }
        std::vector<std::int64_t> order;
        for (std::int64_t j = 0; j < blocks; ++j) order.push_back(j);
        std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
          return importance[static_cast<std::size_t>(a)] > importance[static_cast<std::size_t>(b)];
        });
        std::vector<bool> chosen(static_cast<std::size_t>(blocks), false);
        for (std::int64_t i = 0; i < std::min(settings_.top_k, blocks); ++i) {
          if (order[static_cast<std::size_t>(i)] <= own)
            chosen[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] = true;
        }
        result[static_cast<std::size_t>(h)].push_back(chosen);
      }
    }
    return result;
  }

  /// Outputs [Hq][Nq][Dv] by definition for a given selection.
  std::vector<double> outputs(const Numbers& x, const std::vector<std::vector<std::vector<bool>>>& selected) const {
    std::vector<double> out;
    const std::int64_t nk = problem.kv_len;
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const std::int64_t h = head / 2;
      const auto keys = compressed(x, "k", h);
      const auto values = compressed(x, "v", h);
      for (std::int64_t n = 0; n < problem.q_len; ++n) {
        const std::int64_t position = nk - problem.q_len + n;
        const auto raw = [&](const std::string& suffix, std::int64_t dim) {
          const auto& rows = x.at(x.count(suffix) != 0 ? suffix : suffix.substr(0, 1));
          return [&rows, h, nk, dim](std::int64_t j, std::int64_t d) {
            return rows[static_cast<std::size_t>((h * nk + j) * dim + d)];
          };
        };
        const auto pc = compressed_probabilities(x, head, n, keys);
        const auto ps = softmax(x, head, n, nk, raw("k", 6), [&](std::int64_t j) {
          return j <= position && selected[static_cast<std::size_t>(h)][static_cast<std::size_t>(n)]
                                          [static_cast<std::size_t>(j / settings_.block)];
        });
        const auto pw = softmax(x, head, n, nk, raw("k_window", 6),
                                [&](std::int64_t j) { return j <= position && j > position - settings_.window; });
        const auto gate = [&](std::int64_t m) {
          const double z =
              settings_.bias[m] + x.at("gate_logits")[static_cast<std::size_t>((head * problem.q_len + n) * 3 + m)];
          return 1 / (1 + std::exp(-z));
        };
        for (std::int64_t d = 0; d < problem.value_dim; ++d) {
          double sum = 0;
          for (std::size_t t = 0; t < pc.size(); ++t) sum += gate(0) * pc[t] * values[t][static_cast<std::size_t>(d)];
          for (std::int64_t j = 0; j < nk; ++j) {
            sum += gate(1) * ps[static_cast<std::size_t>(j)] * raw("v", 5)(j, d);
            sum += gate(2) * pw[static_cast<std::size_t>(j)] * raw("v_window", 5)(j, d);
          }
          out.push_back(sum);
        }
      }
    }
    return out;
  }

  Problem problem;
  std::map<std::string, Tensor> tensors;

 private:
  void add(const std::string& name, std::int64_t heads, std::int64_t rows, std::int64_t columns) {
    Tensor tensor{{1, heads, rows, columns}, {}};
    // Matrices over whole blocks would make large tokens out of standard normals.
    const bool matrix = name.starts_with("linear") || name.starts_with("hidden") || name.starts_with("pool");
    std::normal_distribution<float> normal(0.0F, matrix ? 1.0F / static_cast<float>(settings_.length) : 1.0F);
    for (std::int64_t i = 0; i < heads * rows * columns; ++i) tensor.values.push_back(normal(random_));
    tensors[name] = std::move(tensor);
  }

  NsaSettings settings_;
  std::mt19937 random_;
};

inline std::vector<NsaSettings> all_settings() {
  std::vector<NsaSettings> settings(6);
  settings[1].compress = "pool";
  settings[1].positions = true;
  settings[2].compress = "linear";
  settings[2].own_compress = true;
  settings[3].compress = "mlp";
  settings[3].positions = settings[3].own_compress = settings[3].own_window = true;
  settings[4].length = settings[4].stride = settings[4].block = 8;  // the mean-pool variant
  settings[4].own_window = true;
  settings[5].length = 12;  // tokens longer than blocks
  settings[5].stride = 2;
  settings[5].block = 4;
  settings[5].local = 2;
  settings[5].top_k = 4;
  return settings;
}

/// All gradients by name.
struct NsaGradients {
  std::map<std::string, std::vector<float>> values;
  Gradients views;

  explicit NsaGradients(const NsaCase& c) {
    for (const auto& [name, tensor] : c.tensors) {
      if (name == "d_o") continue;
      auto& memory = values[name];
      memory.assign(tensor.values.size(), 99.0F);
      const auto view = mutable_view_of(memory.data(), DType::f32, tensor.shape);
      if (name == "q") {
        views.d_q = view;
      } else if (name == "k") {
        views.d_k = view;
      } else if (name == "v") {
        views.d_v = view;
      } else {
        views.side.push_back({name, view});
      }
    }
  }
};

/// With the forward pass's output and LSE, or without: then every branch is run again.
inline NsaGradients gradients_of(const NsaCase& c, const NsaSettings& settings, bool with_saved, int threads = 0,
                                 const Plan* plan = nullptr) {
  NsaGradients gradients(c);
  const auto method = make_method(settings.spec());
  PlanContext context;
  context.run.threads = threads;
  const NsaCase::Tensor& d_o = c.tensors.at("d_o");
  NsaCase::Tensor o{d_o.shape, std::vector<float>(d_o.values.size())};
  std::vector<float> lse(static_cast<std::size_t>(c.problem.q_heads * c.problem.q_len));
  SavedForward saved;
  saved.d_o = d_o.view();
  if (with_saved) {
    method->attend(c.problem, c.inputs(), {mutable_view_of(o.values.data(), DType::f32, o.shape), lse}, context);
    saved.o = o.view();
    saved.lse = lse;
  }
  method->backward(c.problem, c.inputs(), saved, gradients.views, context, plan);
  return gradients;
}

}  // namespace tessera::test
