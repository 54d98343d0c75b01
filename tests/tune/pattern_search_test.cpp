// The search for patterns of heads on heads whose pattern is known.
#include "tune/pattern_search.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <random>

#include "tessera/method.h"

namespace tessera::tune {
namespace {

using Kind = HeadPattern::Kind;
constexpr std::int64_t kTokens = 1000;
constexpr std::int64_t kDim = 64;

/// Four heads: first tokens, scattered hot columns, distances far back, and topics that come in blocks of 64.
struct Heads {
  std::vector<float> q, k, v;
  Problem problem;
  AttentionInputs inputs;

  Heads() {
    problem.q_heads = problem.kv_heads = 4;
    problem.q_len = problem.kv_len = kTokens;
    problem.head_dim = problem.value_dim = kDim;
    problem.scale = 1;
    problem.causal = true;
    const auto size = static_cast<std::size_t>(4 * kTokens * kDim);
    q.assign(size, 0);
    k.assign(size, 0);
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < size; ++i) v.push_back(normal(random));
    std::vector<bool> hot(kTokens);
    for (int i = 0; i < 150; ++i) hot[random() % kTokens] = true;
    for (std::int64_t token = 0; token < kTokens; ++token) {
      // Positions as angles: the product is largest for equal angles.
      for (std::int64_t f = 0; f < kDim / 2; ++f) {
        const double frequency = std::pow(200.0, -2 * static_cast<double>(f) / static_cast<double>(kDim));
        const auto set = [&](std::vector<float>& to, std::int64_t head, double position, double factor) {
          to[row(head, token) + 2 * f] += static_cast<float>(factor * std::cos(frequency * position));
          to[row(head, token) + 2 * f + 1] += static_cast<float>(factor * std::sin(frequency * position));
        };
        const auto position = static_cast<double>(token);
        if (f < 12) {
          // High frequencies: two sharp lines, of which means over blocks see nothing.
          set(k, 2, position, 1);
          for (const double distance : {200.0, 420.0}) set(q, 2, position - distance, 3);
        }
      }
      // The last rows, from which lines are guessed, look elsewhere.
      k[row(0, token) + (token < 150 ? 0 : 1)] = token < 150 ? 4.0F : 1.0F;
      q[row(0, token) + (token < kTokens - 64 ? 0 : 1)] = 2;
      q[row(1, token)] = 4;
      k[row(1, token)] = hot[token] ? 4.0F : 0.0F;
      const std::int64_t topic = std::array{0, 1, 2, 0, 3, 1, 4, 2, 3, 0, 1, 4, 2, 3, 0, 1}[token / 64];
      q[row(3, token) + topic] = 4;
      k[row(3, token) + topic] = 4;
    }
    inputs.q = view_of(q.data(), DType::f32, {1, 4, kTokens, kDim});
    inputs.k = view_of(k.data(), DType::f32, {1, 4, kTokens, kDim});
    inputs.v = view_of(v.data(), DType::f32, {1, 4, kTokens, kDim});
  }
  static std::int64_t row(std::int64_t head, std::int64_t token) { return (head * kTokens + token) * kDim; }
};

PatternSearch search_at_equal_cost(PatternForm form) {
  PatternSearch search;
  search.candidates = {{Kind::stream_llm, 150, 200},
                       {Kind::vertical_and_slash, 30, 150},
                       {Kind::vertical_and_slash, 300, 100},
                       {Kind::block_sparse, 0, 0}};
  search.form = form;
  search.first_row = 500;
  search.tolerance = 0.02;
  search.pairs = pairs_of_a_shape(kTokens, 150, 200);
  search.block_tiles = block_tiles_for(kTokens, search.pairs);
  return search;
}

TEST(PatternSearch, GivesEveryHeadItsPatternAtTheSameCost) {
  const Heads heads;
  for (const PatternForm form : {PatternForm::recall, PatternForm::output}) {
    const PatternSearch search = search_at_equal_cost(form);
    const auto choices = search_patterns(heads.problem, heads.inputs, search);
    ASSERT_EQ(choices.size(), 4U);
    EXPECT_EQ(choices[0].pattern.kind, Kind::block_sparse);
    EXPECT_EQ(choices[1].pattern.kind, Kind::vertical_and_slash);
    EXPECT_GT(choices[1].pattern.first, 100);  // the candidate with many columns
    EXPECT_EQ(choices[2].pattern.kind, Kind::vertical_and_slash);
    EXPECT_EQ(choices[2].pattern.first, 30);
    EXPECT_EQ(choices[3].pattern.kind, Kind::block_sparse);
    PatternSearch lines = search;
    lines.candidates.pop_back();
    EXPECT_EQ(search_patterns(heads.problem, heads.inputs, lines)[0].pattern, search.candidates[0]);
    for (std::size_t head = 0; head < 4; ++head) {
      EXPECT_NEAR(choices[head].pairs / search.pairs, 1, head % 3 == 0 ? 0.2 : 0.1) << "head " << head;
      EXPECT_GT(choices[head].score, form == PatternForm::recall ? 0.8 : 0.4) << "head " << head;
    }
  }
}

TEST(PatternSearch, WithoutEqualCostSizesStayAsTheyAre) {
  const Heads heads;
  PatternSearch search = search_at_equal_cost(PatternForm::recall);
  search.pairs = 0;
  search.candidates = {{Kind::stream_llm, 8, 40}, {Kind::vertical_and_slash, 31, 170}};
  for (const PatternChoice& choice : search_patterns(heads.problem, heads.inputs, search)) {
    EXPECT_TRUE(choice.pattern == search.candidates[0] || choice.pattern == search.candidates[1]);
  }
}

TEST(PatternSearch, RecallIsTheMassOfTheMaskAndOutputCountsElements) {
  const Heads heads;
  PatternSearch search = search_at_equal_cost(PatternForm::recall);
  search.candidates = {{Kind::stream_llm, 20, 30}};
  search.pairs = 0;
  const auto choices = search_patterns(heads.problem, heads.inputs, search);
  search.form = PatternForm::output;
  const auto by_output = search_patterns(heads.problem, heads.inputs, search);
  for (std::int64_t head = 0; head < 4; ++head) {
    double recall = 0;
    std::int64_t within = 0;
    for (std::int64_t i = 0; i < kTokens; ++i) {
      double kept = 0;
      double total = 0;
      std::vector<double> sparse(kDim);
      std::vector<double> dense(kDim);
      for (std::int64_t j = 0; j <= i; ++j) {
        double score = 0;
        for (std::int64_t d = 0; d < kDim; ++d) {
          score += static_cast<double>(heads.q[Heads::row(head, i) + d]) * heads.k[Heads::row(head, j) + d];
        }
        const double weight = std::exp(score - 30);
        const bool in = i - j < 30 || j < 20;
        total += weight;
        kept += in ? weight : 0;
        for (std::int64_t d = 0; d < kDim; ++d) {
          const double value = weight * heads.v[Heads::row(head, j) + d];
          dense[d] += value;
          sparse[d] += in ? value : 0;
        }
      }
      if (i >= search.first_row) recall += kept / total;
      for (std::int64_t d = 0; d < kDim; ++d) {
        within += std::abs(sparse[d] / kept - dense[d] / total) <= search.tolerance ? 1 : 0;
      }
    }
    const auto at = static_cast<std::size_t>(head);
    EXPECT_NEAR(choices[at].score, recall / static_cast<double>(kTokens - search.first_row), 1e-3);
    EXPECT_NEAR(by_output[at].score, static_cast<double>(within) / (kTokens * kDim), 0.01);
  }
}

TEST(PatternSearch, CostsOfAShapesAndBlocks) {
  const Heads heads;
  for (const auto& [n_init, n_local] : {std::pair{8, 200}, std::pair{0, 1}, std::pair{130, 64}, std::pair{2000, 10}}) {
    PatternSearch search;
    search.candidates = {{Kind::stream_llm, n_init, n_local}};
    search.first_row = 0;
    EXPECT_EQ(search_patterns(heads.problem, heads.inputs, search)[0].pairs,
              pairs_of_a_shape(kTokens, n_init, n_local));
  }
  EXPECT_EQ(block_tiles_for(kTokens, 1), 1);
  EXPECT_EQ(block_tiles_for(kTokens, 1e9), 16);
  EXPECT_EQ(block_tiles_for(64 * 16, 64.0 * 64 * (16 + 15 + 14)), 3);
}

TEST(PatternSearch, RefusesWhatItCannotJudge) {
  const Heads heads;
  PatternSearch search = search_at_equal_cost(PatternForm::recall);
  search.first_row = kTokens;
  EXPECT_THROW(search_patterns(heads.problem, heads.inputs, search), Error);
  search.first_row = 0;
  search.candidates.clear();
  EXPECT_THROW(search_patterns(heads.problem, heads.inputs, search), Error);
}

}  // namespace
}  // namespace tessera::tune
