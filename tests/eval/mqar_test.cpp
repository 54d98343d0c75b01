#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "eval/mqar.h"
#include "tessera/core.h"

namespace tessera::eval {
namespace {

TEST(Mqar, AnswersFollowTheirKeysInTheContext) {
  const MqarTask task = make_mqar({.length = 512, .pairs = 64, .queries = 32, .seed = 3});
  ASSERT_EQ(task.tokens.size(), 512);
  ASSERT_EQ(task.query_positions.size(), 32);
  std::map<std::int32_t, std::int32_t> value_of;
  for (int pair = 0; pair < 64; ++pair) value_of[task.tokens[2 * pair]] = task.tokens[2 * pair + 1];
  EXPECT_EQ(value_of.size(), 64);
  EXPECT_TRUE(std::is_sorted(task.query_positions.begin(), task.query_positions.end()));
  std::set<std::int64_t> asked;
  for (std::size_t i = 0; i < 32; ++i) {
    const std::int64_t at = task.query_positions[i];
    EXPECT_GE(at, 128);
    EXPECT_EQ(value_of.at(task.tokens[at]), task.answers[i]);
    EXPECT_GE(task.answers[i], 4096);
    asked.insert(at);
  }
  // Every token after the context that is no query is filler from the value half.
  for (std::int64_t at = 128; at < 512; ++at) {
    EXPECT_EQ(task.tokens[at] < 4096, asked.count(at) == 1) << at;
  }
}

TEST(Mqar, SmallExponentAsksSoon) {
  const auto mean_position = [](double exponent) {
    double sum = 0;
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      const MqarTask task =
          make_mqar({.length = 1024, .pairs = 32, .queries = 8, .gap_exponent = exponent, .seed = seed});
      for (const std::int64_t at : task.query_positions) sum += static_cast<double>(at) / 160;
    }
    return sum;
  };
  EXPECT_LT(mean_position(0.01), 300);
  EXPECT_NEAR(mean_position(1), 64 + 480, 80);
}

TEST(Mqar, ForgettingExpectsTheLastValue) {
  const MqarTask task = make_mqar({.length = 512, .pairs = 32, .reassigned = 0.5, .seed = 1});
  std::map<std::int32_t, std::int32_t> last;
  for (int pair = 0; pair < 48; ++pair) last[task.tokens[2 * pair]] = task.tokens[2 * pair + 1];
  EXPECT_EQ(last.size(), 32);
  for (std::size_t i = 0; i < task.answers.size(); ++i) {
    EXPECT_EQ(last.at(task.tokens[task.query_positions[i]]), task.answers[i]);
  }
}

TEST(Mqar, CompositionalKeysShareTheirHalves) {
  const MqarTask task = make_mqar({.length = 512, .pairs = 30, .key_tokens = 2, .passes = 2, .seed = 1});
  std::map<std::pair<std::int32_t, std::int32_t>, std::int32_t> value_of;
  std::set<std::int32_t> first;
  for (int pair = 0; pair < 30; ++pair) {
    value_of[{task.tokens[3 * pair], task.tokens[3 * pair + 1]}] = task.tokens[3 * pair + 2];
    first.insert(task.tokens[3 * pair]);
    EXPECT_EQ(task.tokens[3 * pair], task.tokens[90 + 3 * pair]);
  }
  EXPECT_EQ(value_of.size(), 30);
  EXPECT_LE(first.size(), 6);
  for (std::size_t i = 0; i < task.answers.size(); ++i) {
    const std::int64_t at = task.query_positions[i];
    EXPECT_EQ((value_of.at({task.tokens[at - 1], task.tokens[at]})), task.answers[i]);
  }
}

TEST(Mqar, RefusesWhatDoesNotFit) {
  EXPECT_THROW(make_mqar({.length = 64, .pairs = 32}), Error);
  EXPECT_THROW(make_mqar({.length = 1024, .pairs = 8, .queries = 9}), Error);
  EXPECT_THROW(make_mqar({.length = 100000, .pairs = 4000}), Error);
  EXPECT_THROW(make_mqar({.length = 64, .pairs = 4, .reassigned = 2}), Error);
}

}  // namespace
}  // namespace tessera::eval
