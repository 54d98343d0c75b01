// A model whose layers attend by a recurrence: states carry over chunks and decoding, and there is no plan to count.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "io/json.h"
#include "model/random_model.h"
#include "tessera/model.h"

namespace tessera {
namespace {

TEST(Recurrence, ChunksAndDecodingEqualOnePrefill) {
  const testing::RandomModel random({});
  const testing::TemporaryFolder folder;
  random.write(folder);
  const Model model = Model::load(folder.path());
  const auto tokens = testing::random_tokens(150, 260, 9);
  const auto last_logits = [&](std::int64_t chunk, std::size_t prefilled) {
    SessionOptions options;
    options.prefill = make_method("lightning2:norm=head");
    options.chunk = chunk;
    bool planned = false;
    options.on_plan = [&](std::int64_t, const Plan&) { planned = true; };
    Session session(model, options);
    auto logits = session.prefill(std::span(tokens).first(prefilled));
    for (std::size_t i = prefilled; i < tokens.size(); ++i) logits = session.decode(tokens[i]);
    EXPECT_FALSE(planned);
    EXPECT_EQ(session.statistics().density(), 0);
    return std::vector<float>(logits.begin(), logits.end());
  };
  const std::vector<float> whole = last_logits(0, tokens.size());
  const std::vector<float> parts = last_logits(37, 147);
  ASSERT_EQ(parts.size(), whole.size());
  for (std::size_t i = 0; i < whole.size(); ++i) ASSERT_NEAR(parts[i], whole[i], 2e-4) << i;
  EXPECT_TRUE(std::any_of(whole.begin(), whole.end(), [](float x) { return x != 0 && std::isfinite(x); }));
}

}  // namespace
}  // namespace tessera
