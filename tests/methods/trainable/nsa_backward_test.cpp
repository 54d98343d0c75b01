// Gradients of NSA against central differences of its definition in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "methods/masks.h"
#include "methods/trainable/nsa_case.h"

namespace tessera {
namespace {

using test::all_settings;
using test::AttentionCase;
using test::gradients_of;
using test::NsaCase;
using test::NsaGradients;
using test::NsaSettings;

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

}  // namespace
}  // namespace tessera
