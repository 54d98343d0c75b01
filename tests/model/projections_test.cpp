// What an observer of the projections sees: every row of every layer once, whatever the chunks and the cache.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "io/json.h"
#include "model/random_model.h"
#include "tessera/model.h"

namespace tessera {
namespace {

/// [layer] -> q, k, v rows in the order of positions.
using Rows = std::map<std::int64_t, std::array<std::vector<float>, 3>>;

Rows projections(const Model& model, std::span<const std::int32_t> tokens, SessionOptions options) {
  Rows seen;
  options.on_projections = [&](const ProjectedRows& rows) {
    auto& layer = seen[rows.layer];
    EXPECT_EQ(std::ssize(layer[0]), rows.position * model.config().q_heads * model.config().head_dim);
    EXPECT_EQ(std::ssize(rows.q), rows.rows * model.config().q_heads * model.config().head_dim);
    EXPECT_EQ(std::ssize(rows.k), rows.rows * model.config().kv_heads * model.config().head_dim);
    EXPECT_EQ(rows.k.size(), rows.v.size());
    layer[0].insert(layer[0].end(), rows.q.begin(), rows.q.end());
    layer[1].insert(layer[1].end(), rows.k.begin(), rows.k.end());
    layer[2].insert(layer[2].end(), rows.v.begin(), rows.v.end());
  };
  Session session(model, std::move(options));
  session.prefill(tokens);
  session.decode(1);  // not of the prompt: not seen
  return seen;
}

TEST(Projections, AreThoseOfThePromptWhateverTheChunksAndTheCache) {
  const testing::RandomModel random({.max_positions = 4096});
  const testing::TemporaryFolder folder;
  random.write(folder);
  const Model model = Model::load(folder.path());
  const auto tokens = testing::random_tokens(1500, 260, 5);  // more than the rows that are projected together
  const Rows whole = projections(model, tokens, {.chunk = 0});
  ASSERT_EQ(whole.size(), 2U);
  EXPECT_EQ(whole.at(0)[0].size(), 1500U * 4 * 16);
  const std::shared_ptr<const Method> evicting = make_method("snapkv:capacity=100");
  const std::shared_ptr<const Method> streaming = make_method("duo:recent=9");
  for (const SessionOptions& options :
       {SessionOptions{.chunk = 401}, SessionOptions{.prefill = evicting}, SessionOptions{.prefill = streaming}}) {
    const Rows other = projections(model, tokens, options);
    for (const auto& [layer, tensors] : whole) {
      for (std::size_t t = 0; t < 3; ++t) {
        ASSERT_EQ(other.at(layer)[t].size(), tensors[t].size());
        for (std::size_t i = 0; i < tensors[t].size(); ++i) {
          ASSERT_NEAR(other.at(layer)[t][i], tensors[t][i], 1e-3) << "layer " << layer << ", tensor " << t;
        }
      }
    }
  }
  // Keys are rotated, values are not: equal tokens have equal values in the first layer, and other keys.
  const std::vector<std::int32_t> equal(8, 7);
  const Rows same = projections(model, equal, {});
  const std::size_t width = 2 * 16;
  for (std::size_t i = 0; i < width; ++i) {
    EXPECT_FLOAT_EQ(same.at(0)[2][i], same.at(0)[2][7 * width + i]);
  }
  EXPECT_GT(std::abs(same.at(0)[1][0] - same.at(0)[1][7 * width]), 1e-3);
}

}  // namespace
}  // namespace tessera
