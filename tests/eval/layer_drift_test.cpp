// The choice of layers by how little they change the hidden state.
#include "eval/layer_drift.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "methods/layer_list.h"
#include "tessera/core.h"

namespace tessera::eval {
namespace {

TEST(LayerDrift, IsTheMeanRelativeChange) {
  const std::vector<float> in{3, 4, 0, 2};
  const std::vector<float> out{3, 4, 2, 2};
  EXPECT_DOUBLE_EQ(layer_drift(in, out, 2), 0.5 * (0 + 1));
  EXPECT_DOUBLE_EQ(layer_drift(in, in, 2), 0);
  const std::vector<float> zero{0, 0, 0, 0};
  EXPECT_DOUBLE_EQ(layer_drift(zero, zero, 2), 0);
  EXPECT_DOUBLE_EQ(layer_drift(zero, out, 2), 1);
  EXPECT_THROW(layer_drift(in, out, 3), Error);
  EXPECT_THROW(layer_drift({}, {}, 2), Error);
}

TEST(LayerDrift, StableLayersAreTheQuantile) {
  const std::vector<double> drift{0.9, 0.2, 0.5, 0.1, 0.2, 0.7};
  EXPECT_EQ(stable_layers(drift, 0.5), (std::vector<std::int64_t>{1, 3, 4}));
  EXPECT_EQ(stable_layers(drift, 0.3), (std::vector<std::int64_t>{1, 3, 4})) << "ties stay together";
  EXPECT_EQ(stable_layers(drift, 0), (std::vector<std::int64_t>{}));
  EXPECT_EQ(stable_layers(drift, 1).size(), 6U);
  EXPECT_THROW(stable_layers(drift, 1.1), Error);
  const std::vector<double> undefined{0.1, std::numeric_limits<double>::quiet_NaN()};
  EXPECT_THROW(stable_layers(undefined, 0.5), Error);
}

TEST(LayerDrift, TextIsWhatParametersRead) {
  const std::vector<std::int64_t> layers{14, 15, 20, 21, 22, 30};
  EXPECT_EQ(layer_list_text(layers), "14-15+20-22+30");
  EXPECT_EQ(read_layer_list("layers", layer_list_text(layers)), layers);
}

}  // namespace
}  // namespace tessera::eval
