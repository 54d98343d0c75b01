// NSA against its definition in float64: outputs, selection, and gradients by central differences of the definition.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "methods/masks.h"
#include "tessera/gradient.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;

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

std::vector<NsaSettings> all_settings() {
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

TEST(Nsa, OutputsAndSelectionByDefinition) {
  for (const NsaSettings& settings : all_settings()) {
    for (const auto& [q_len, kv_len] : {std::pair{20, 37}, std::pair{61, 61}, std::pair{1, 30}, std::pair{9, 9}}) {
      const NsaCase c(settings, q_len, kv_len);
      const auto expected_blocks = c.selection(c.numbers());
      const auto expected = c.outputs(c.numbers(), expected_blocks);
      std::vector<float> o(expected.size());
      Plan plan;
      make_method(settings.spec())
          ->attend(c.problem, c.inputs(), {mutable_view_of(o.data(), DType::f32, {1, 4, q_len, 5}), {}}, {}, &plan);
      validate(plan);
      const auto mask = dense_mask(plan);
      for (std::int64_t head = 0; head < 4; ++head) {
        for (std::int64_t n = 0; n < q_len; ++n) {
          for (std::int64_t j = 0; j < kv_len; ++j) {
            const bool wanted = j <= kv_len - q_len + n &&
                                expected_blocks[static_cast<std::size_t>(head / 2)][static_cast<std::size_t>(n)]
                                               [static_cast<std::size_t>(j / settings.block)];
            ASSERT_EQ(mask[static_cast<std::size_t>((head * q_len + n) * kv_len + j)] != 0, wanted)
                << settings.spec() << " head " << head << " query " << n << " key " << j;
          }
        }
      }
      for (std::size_t i = 0; i < o.size(); ++i) ASSERT_NEAR(o[i], expected[i], 1e-5) << settings.spec() << " " << i;
    }
  }
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
NsaGradients gradients_of(const NsaCase& c, const NsaSettings& settings, bool with_saved, int threads = 0,
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

TEST(Nsa, GradientsMatchCentralDifferencesOfTheDefinition) {
  unsigned seed = 0;
  for (const NsaSettings& settings : all_settings()) {
    const NsaCase c(settings, 20, 37, ++seed);
    NsaCase::Numbers x = c.numbers();
    const auto selected = c.selection(x);
    const NsaGradients again = gradients_of(c, settings, false);
    const NsaGradients gradients = gradients_of(c, settings, true);
    const auto loss = [&] {
      const auto o = c.outputs(x, selected);
      double sum = 0;
      for (std::size_t i = 0; i < o.size(); ++i) sum += o[i] * x.at("d_o")[i];
      return sum;
    };
    std::mt19937 random(seed);
    for (const auto& [name, actual] : gradients.values) {
      for (int sample = 0; sample < 12; ++sample) {
        const std::size_t i = random() % actual.size();
        constexpr double h = 1e-5;
        double& value = x.at(name)[i];
        const double kept = value;
        value = kept + h;
        const double above = loss();
        value = kept - h;
        const double below = loss();
        value = kept;
        const double expected = (above - below) / (2 * h);
        // Float sums of a few hundred terms of size 1 to 10.
        ASSERT_NEAR(actual[i], expected, 2e-5 * (1 + std::fabs(expected)))
            << settings.spec() << " " << name << " element " << i;
        ASSERT_NEAR(again.values.at(name)[i], expected, 2e-5 * (1 + std::fabs(expected)))
            << settings.spec() << " " << name << " element " << i;
      }
    }
  }
}

TEST(Nsa, GradientsDoNotDependOnThreadsOrOnTheGivenPlan) {
  const NsaSettings settings = all_settings()[3];
  const NsaCase c(settings, 70, 90);
  const auto one = gradients_of(c, settings, true, 1);
  const auto two = gradients_of(c, settings, true, 2);
  const Plan plan = make_method(settings.spec())->plan(c.problem, c.inputs(), {});
  const auto given = gradients_of(c, settings, true, 3, &plan);
  EXPECT_EQ(one.values, two.values);
  EXPECT_EQ(one.values, given.values);
}

NsaSettings only(std::size_t branch) {
  NsaSettings settings;
  for (std::size_t m = 0; m < 3; ++m) settings.bias[m] = m == branch ? 100 : -100;
  return settings;
}

/// Output of a method on an NsaCase without gate logits.
std::vector<float> output_of(const std::string& spec, const NsaCase& c) {
  std::vector<float> o(static_cast<std::size_t>(4 * c.problem.q_len * 5));
  AttentionInputs inputs = c.inputs();
  inputs.side.clear();
  make_method(spec)->attend(c.problem, inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, c.problem.q_len, 5}), {}},
                            {});
  return o;
}

void expect_near(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-5) << i;
}

TEST(Nsa, AllBlocksThroughTheSelectedGateAreDense) {
  NsaSettings settings = only(1);
  settings.top_k = 1000;
  const NsaCase c(settings, 50, 77);
  expect_near(output_of(settings.spec(), c), output_of("dense", c));
}

TEST(Nsa, TheWindowGateAloneIsSlidingWindow) {
  const NsaSettings settings = only(2);
  const NsaCase c(settings, 50, 77);
  expect_near(output_of(settings.spec(), c), output_of("window:left=5,right=0", c));
}

TEST(Nsa, FewerKeysThanABlockGiveNoCompressedOutput) {
  NsaSettings settings = only(0);
  const NsaCase c(settings, 7, 7);
  for (const float x : output_of(settings.spec(), c)) EXPECT_EQ(x, 0.0F);
  settings = NsaSettings{};
  const NsaCase gated(settings, 7, 7);
  for (const float x : output_of(settings.spec(), gated)) EXPECT_TRUE(std::isfinite(x));
  for (const auto& [name, values] : gradients_of(gated, settings, true).values) {
    for (const float x : values) ASSERT_TRUE(std::isfinite(x)) << name;
  }
}

TEST(Nsa, RowsBeforeTheFirstTokenHaveNoCompressedOutput) {
  const NsaSettings settings = only(0);
  const NsaCase c(settings, 40, 40);
  const auto o = output_of(settings.spec(), c);
  for (std::size_t head = 0; head < 4; ++head) {
    for (std::size_t n = 0; n < 40; ++n) {
      for (std::size_t d = 0; d < 5; ++d) EXPECT_EQ(o[(head * 40 + n) * 5 + d] == 0.0F, n < 7) << n;
    }
  }
}

TEST(Nsa, HeadsOfAGroupChooseTheSameBlocks) {
  const NsaSettings settings;
  const NsaCase c(settings, 60, 60);
  const Plan plan = make_method(settings.spec())->plan(c.problem, c.inputs(), {});
  EXPECT_EQ(plan.plan_heads, 2);
  const auto mask = dense_mask(plan);
  const auto head = [&](std::int64_t h) {
    return std::vector<std::uint8_t>(mask.begin() + h * 3600, mask.begin() + (h + 1) * 3600);
  };
  EXPECT_EQ(head(0), head(1));
  EXPECT_EQ(head(2), head(3));
  EXPECT_NE(head(0), head(2));
}

/// Two documents in one variable-length batch: outputs and gradients are those of separate runs.
TEST(Nsa, DocumentsDoNotSeeEachOther) {
  for (const std::size_t which : {std::size_t{0}, std::size_t{3}}) {
    const NsaSettings settings = all_settings()[which];
    const NsaCase a(settings, 20, 37, 1);
    NsaCase b(settings, 33, 50, 2);
    for (const auto& [name, tensor] : a.tensors) {  // one set of weights
      if (tensor.shape == b.tensors.at(name).shape) b.tensors.at(name).values = tensor.values;
    }
    NsaCase packed(settings, 53, 87, 3);
    packed.problem.batch = 2;
    packed.problem.cu_seqlens_q = {0, 20, 53};
    packed.problem.cu_seqlens_k = {0, 37, 87};
    for (auto& [name, tensor] : packed.tensors) {
      const auto& first = a.tensors.at(name);
      const auto& second = b.tensors.at(name);
      if (first.shape == second.shape) {
        tensor = first;
        continue;
      }
      tensor.values.clear();
      for (std::int64_t h = 0; h < tensor.shape[1]; ++h) {
        for (const auto* part : {&first, &second}) {
          const std::int64_t size = part->shape[2] * part->shape[3];
          tensor.values.insert(tensor.values.end(), part->values.begin() + h * size,
                               part->values.begin() + (h + 1) * size);
        }
      }
    }
    const auto attend = [&](const NsaCase& c) {
      std::vector<float> o(static_cast<std::size_t>(4 * c.problem.q_len * 5));
      make_method(settings.spec())
          ->attend(c.problem, c.inputs(), {mutable_view_of(o.data(), DType::f32, {1, 4, c.problem.q_len, 5}), {}}, {});
      return o;
    };
    const auto together = attend(packed);
    const auto gradients = gradients_of(packed, settings, true);
    const NsaCase* documents[] = {&a, &b};
    std::map<std::string, std::vector<float>> weight_sums;
    for (std::size_t i = 0; i < 2; ++i) {
      const auto alone = attend(*documents[i]);
      const auto own = gradients_of(*documents[i], settings, true);
      const auto compare = [&](const std::vector<float>& part, const std::vector<float>& whole, std::int64_t heads,
                               std::int64_t rows, std::int64_t all_rows, std::int64_t begin, std::int64_t dim) {
        for (std::int64_t h = 0; h < heads; ++h) {
          for (std::int64_t e = 0; e < rows * dim; ++e) {
            ASSERT_NEAR(part[static_cast<std::size_t>(h * rows * dim + e)],
                        whole[static_cast<std::size_t>((h * all_rows + begin) * dim + e)], 2e-5);
          }
        }
      };
      compare(alone, together, 4, i == 0 ? 20 : 33, 53, i == 0 ? 0 : 20, 5);
      for (const auto& [name, values] : own.values) {
        const auto& shape = documents[i]->tensors.at(name).shape;
        const auto& whole = packed.tensors.at(name).shape;
        if (shape == whole) {
          auto& sum = weight_sums[name];
          sum.resize(values.size());
          for (std::size_t e = 0; e < sum.size(); ++e) sum[e] += values[e];
          continue;
        }
        const std::int64_t begin = i == 0 ? 0 : (whole[2] == 53 ? 20 : 37);
        compare(values, gradients.values.at(name), shape[1], shape[2], whole[2], begin, shape[3]);
      }
    }
    for (const auto& [name, sum] : weight_sums) {
      for (std::size_t e = 0; e < sum.size(); ++e) ASSERT_NEAR(sum[e], gradients.values.at(name)[e], 1e-4) << name;
    }
  }
}

TEST(Nsa, DecodingGivesTheLastRowOfThePrefill) {
  const NsaSettings settings = all_settings()[2];
  const NsaCase c(settings, 61, 61);
  std::vector<float> o(4 * 61 * 5);
  const auto method = make_method(settings.spec());
  method->attend(c.problem, c.inputs(), {mutable_view_of(o.data(), DType::f32, {1, 4, 61, 5}), {}}, {});
  Problem step = c.problem;
  step.q_len = 1;
  AttentionInputs inputs = c.inputs();
  const auto last = [](TensorView view) {
    view.data = view.row(0, 0, 60);
    view.shape[2] = 1;
    return view;
  };
  inputs.q = last(inputs.q);
  for (SideTensor& side : inputs.side) {
    if (side.name == "gate_logits") side.view = last(side.view);
  }
  std::vector<float> one(4 * 5);
  method->attend(step, inputs, {mutable_view_of(one.data(), DType::f32, {1, 4, 1, 5}), {}}, {});
  for (std::size_t h = 0; h < 4; ++h) {
    for (std::size_t d = 0; d < 5; ++d) EXPECT_NEAR(one[h * 5 + d], o[(h * 61 + 60) * 5 + d], 1e-5);
  }
}

/// Chunk by chunk with a state, as a session runs it, gives the rows of the whole; keys that are compressed already are
/// not read again for it.
TEST(Nsa, StateKeepsCompressedTokens) {
  const NsaSettings settings = all_settings()[2];
  NsaCase c(settings, 61, 61);
  const auto method = make_method(settings.spec());
  std::vector<float> whole(4 * 61 * 5);
  method->attend(c.problem, c.inputs(), {mutable_view_of(whole.data(), DType::f32, {1, 4, 61, 5}), {}}, {});
  const auto state = method->new_state();
  PlanContext context;
  context.state = state.get();
  for (const auto& [begin, end] : {std::pair{0, 30}, std::pair{30, 31}, std::pair{31, 48}, std::pair{48, 61}}) {
    Problem part = c.problem;
    part.q_len = end - begin;
    part.kv_len = end;
    AttentionInputs inputs = c.inputs();
    const auto cut = [](TensorView& view, std::int64_t first, std::int64_t last) {
      view.data = view.row(0, 0, first);
      view.shape[2] = last - first;
    };
    cut(inputs.q, begin, end);
    cut(inputs.k, 0, end);
    cut(inputs.v, 0, end);
    for (SideTensor& side : inputs.side) {
      if (side.name == "gate_logits") cut(side.view, begin, end);
      if (side.name.ends_with("_compress")) cut(side.view, 0, end);
    }
    std::vector<float> o(static_cast<std::size_t>(4 * part.q_len * 5));
    method->attend(part, inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, part.q_len, 5}), {}}, context);
    for (std::int64_t h = 0; h < 4; ++h) {
      for (std::int64_t i = 0; i < part.q_len * 5; ++i) {
        ASSERT_NEAR(o[static_cast<std::size_t>(h * part.q_len * 5 + i)],
                    whole[static_cast<std::size_t>((h * 61 + begin) * 5 + i)], 1e-5);
      }
    }
    // Spoil what the finished tokens were made of; the next one starts at the stride after them.
    const std::int64_t tokens = end < 8 ? 0 : (end - 8) / 4 + 1;
    for (const auto& [name, dim] : {std::pair{"k_compress", 6}, std::pair{"v_compress", 5}}) {
      auto& values = c.tensors.at(name).values;
      for (std::int64_t h = 0; h < 2; ++h) {
        std::fill_n(values.begin() + h * 61 * dim, tokens * 4 * dim, std::nanf(""));
      }
    }
  }
}

/// A pass that failed leaves compressed tokens of keys that never came: the next pass makes them anew.
TEST(Nsa, StateForgetsAPassThatFailed) {
  const NsaSettings settings = all_settings()[2];
  const NsaCase c(settings, 61, 61);
  NsaCase failed(settings, 61, 61, 7);
  const auto method = make_method(settings.spec());
  const auto state = method->new_state();
  PlanContext context;
  context.state = state.get();
  const auto attend_rows = [&](const NsaCase& from, std::int64_t begin, std::int64_t end) {
    Problem part = from.problem;
    part.q_len = end - begin;
    part.kv_len = end;
    AttentionInputs inputs = from.inputs();
    const auto cut = [](TensorView& view, std::int64_t first, std::int64_t last) {
      view.data = view.row(0, 0, first);
      view.shape[2] = last - first;
    };
    cut(inputs.q, begin, end);
    cut(inputs.k, 0, end);
    cut(inputs.v, 0, end);
    for (SideTensor& side : inputs.side) {
      if (side.name == "gate_logits") cut(side.view, begin, end);
      if (side.name.ends_with("_compress")) cut(side.view, 0, end);
    }
    std::vector<float> o(static_cast<std::size_t>(4 * part.q_len * 5));
    method->attend(part, inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, part.q_len, 5}), {}}, context);
    return o;
  };
  attend_rows(c, 0, 21);
  attend_rows(failed, 21, 61);
  const auto repeated = attend_rows(c, 21, 61);
  std::vector<float> whole(4 * 61 * 5);
  method->attend(c.problem, c.inputs(), {mutable_view_of(whole.data(), DType::f32, {1, 4, 61, 5}), {}}, {});
  for (std::int64_t h = 0; h < 4; ++h) {
    for (std::int64_t i = 0; i < 40 * 5; ++i) {
      ASSERT_NEAR(repeated[static_cast<std::size_t>(h * 40 * 5 + i)],
                  whole[static_cast<std::size_t>((h * 61 + 21) * 5 + i)], 1e-5);
    }
  }
}

class NsaShapes : public testing::TestWithParam<CaseShape> {};

TEST_P(NsaShapes, PlansHold) {
  const AttentionCase input(GetParam());
  test::expect_plans_hold(*make_method("nsa:length=8,stride=4,block_size=16,top_k=3,window=20"), input);
  test::expect_full_budget_is_dense(*make_method("nsa:length=8,stride=4,block_size=16,top_k=1000"), input);
}

TEST_P(NsaShapes, RunsOnEveryKindOfInput) {
  const AttentionCase input(GetParam());
  const Problem& problem = input.problem;
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  const std::array<std::int64_t, 4> shape{batch, problem.q_heads, problem.q_len, problem.value_dim};
  std::vector<float> o(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]), 99.0F);
  std::vector<float> lse(static_cast<std::size_t>(shape[0] * shape[1] * shape[2]), 99.0F);
  make_method("nsa:length=8,stride=4,block_size=16,top_k=3,window=20")
      ->attend(problem, input.inputs, {mutable_view_of(o.data(), DType::f32, shape), lse}, {});
  for (const float x : o) ASSERT_LT(std::fabs(x), 20.0F);
  for (const float x : lse) ASSERT_NE(x, 99.0F);
}

INSTANTIATE_TEST_SUITE_P(Shapes, NsaShapes, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(Nsa, GradientsFromASavedOutputOfSixteenBits) {
  const AttentionCase input(
      {.name = "bf16", .q_heads = 4, .kv_heads = 2, .q_len = 80, .kv_len = 80, .dtype = DType::bf16});
  const auto method = make_method("nsa:length=8,stride=4,block_size=16,top_k=3,window=20");
  const std::array<std::int64_t, 4> shape{1, 4, 80, 8};
  std::vector<float> d_o(4 * 80 * 8);
  for (std::size_t i = 0; i < d_o.size(); ++i) d_o[i] = std::sin(static_cast<float>(i) * 0.7F);
  const auto gradient = [&](DType dtype, bool with_saved) {
    std::vector<std::byte> o(d_o.size() * size_of(dtype));
    std::vector<float> lse(4 * 80);
    std::vector<float> d_k(2 * 80 * 16);
    method->attend(input.problem, input.inputs, {mutable_view_of(o.data(), dtype, shape), lse}, {});
    SavedForward saved;
    saved.d_o = view_of(d_o.data(), DType::f32, shape);
    if (with_saved) {
      saved.o = view_of(o.data(), dtype, shape);
      saved.lse = lse;
    }
    Gradients gradients;
    gradients.d_k = mutable_view_of(d_k.data(), DType::f32, {1, 2, 80, 16});
    method->backward(input.problem, input.inputs, saved, gradients, {});
    return d_k;
  };
  const auto exact = gradient(DType::f32, false);
  const auto error = [&](const std::vector<float>& other) {
    double difference = 0;
    double size = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) {
      difference += std::pow(static_cast<double>(exact[i]) - other[i], 2);
      size += std::pow(static_cast<double>(exact[i]), 2);
    }
    return std::sqrt(difference / size);
  };
  EXPECT_LT(error(gradient(DType::f32, true)), 1e-5);
  EXPECT_LT(error(gradient(DType::bf16, true)), 5e-3);
}

TEST(Nsa, RefusesASavedForwardThatDoesNotFit) {
  const NsaSettings settings;
  const NsaCase c(settings, 20, 37);
  NsaGradients gradients(c);
  const std::vector<float> lse(static_cast<std::size_t>(c.problem.q_heads * c.problem.q_len));
  SavedForward saved;
  saved.d_o = c.tensors.at("d_o").view();
  const auto refuses = [&] {
    EXPECT_THROW(make_method(settings.spec())->backward(c.problem, c.inputs(), saved, gradients.views, {}), Error);
  };
  saved.lse = lse;  // an LSE without an output
  refuses();
  saved.o = saved.d_o;
  saved.lse = std::span(lse).first(lse.size() - 1);
  refuses();
}

TEST(Nsa, SixteenBitGradientsAreNearTheFloatOnes) {
  const AttentionCase input(
      {.name = "bf16", .q_heads = 4, .kv_heads = 2, .q_len = 80, .kv_len = 80, .dtype = DType::bf16});
  const auto method = make_method("nsa:length=8,stride=4,block_size=16,top_k=100,window=20");
  std::vector<float> d_o(4 * 80 * 8, 0.5F);
  std::vector<std::uint16_t> half(d_o.size(), float_to_bf16(0.5F));
  const auto gradient = [&](const TensorView& view) {
    std::vector<float> d_k(2 * 80 * 16);
    Gradients gradients;
    gradients.d_k = mutable_view_of(d_k.data(), DType::f32, {1, 2, 80, 16});
    SavedForward saved;
    saved.o = saved.d_o = view;
    method->backward(input.problem, input.inputs, saved, gradients, {});
    return d_k;
  };
  const auto a = gradient(view_of(d_o.data(), DType::f32, {1, 4, 80, 8}));
  const auto b = gradient(view_of(half.data(), DType::bf16, {1, 4, 80, 8}));
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    size += a[i] * a[i];
  }
  EXPECT_GT(size, 0);
  EXPECT_LT(std::sqrt(error / size), 2e-2);
}

TEST(Nsa, RefusesWhatDoesNotFit) {
  const NsaSettings settings;
  const NsaCase c(settings, 20, 37);
  const auto refuses = [&](const std::string& spec, const AttentionInputs& inputs) {
    EXPECT_THROW(make_method(spec)->plan(c.problem, inputs, {}), Error) << spec;
  };
  EXPECT_NO_THROW(make_method(settings.spec())->plan(c.problem, c.inputs(), {}));
  refuses("nsa:length=10,stride=4", c.inputs());
  refuses("nsa:block_size=10,stride=4,length=8", c.inputs());
  refuses("nsa:compress=pool", c.inputs());
  refuses("nsa:compress=linear", c.inputs());
  refuses("nsa:compress=mlp", c.inputs());
  AttentionInputs inputs = c.inputs();
  inputs.side[0].view.shape[3] = 2;  // gate_logits
  refuses(settings.spec(), inputs);
  inputs = c.inputs();
  inputs.side.push_back({"k_window", inputs.k});
  refuses(settings.spec(), inputs);
  inputs = c.inputs();
  inputs.modifiers.softcap = 3;
  refuses(settings.spec(), inputs);

  NsaGradients gradients(c);
  SavedForward saved;
  saved.o = saved.d_o = c.tensors.at("d_o").view();
  const auto method = make_method(settings.spec());
  const std::vector<float> d_lse(80, 1.0F);
  saved.d_lse = d_lse;
  EXPECT_THROW(method->backward(c.problem, c.inputs(), saved, gradients.views, {}), Error);
  saved.d_lse = {};
  gradients.views.side.push_back({"pool_k", gradients.views.d_k});
  EXPECT_THROW(method->backward(c.problem, c.inputs(), saved, gradients.views, {}), Error);
  EXPECT_THROW(make_method("oracle-topk")->backward(c.problem, c.inputs(), saved, {}, {}), Error);
}

TEST(Nsa, DeclaresEverySideInputThatItReads) {
  const MethodInfo& info = find_method("nsa").info;
  std::set<std::string> declared;
  for (const SideInputInfo& side : info.side) {
    EXPECT_FALSE(side.required) << side.name;
    EXPECT_TRUE(declared.insert(side.name).second) << side.name;
  }
  std::set<std::string> read;
  for (const NsaSettings& settings : all_settings()) {
    for (const SideTensor& side : NsaCase(settings, 20, 37).inputs().side) read.insert(side.name);
  }
  for (const std::string& name : read) EXPECT_TRUE(declared.contains(name)) << name;
  EXPECT_TRUE(read.contains("gate_logits"));
  const auto& gates = *std::find_if(info.side.begin(), info.side.end(),
                                    [](const SideInputInfo& side) { return side.name == "gate_logits"; });
  EXPECT_EQ(shape_text(gates), "[B, Hq, Nq, w]");
}

}  // namespace
}  // namespace tessera
