// Evaluation of a model: feeding gold text, perplexity, and the statistics of results.
#include "eval/model_evaluation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "model/random_model.h"

namespace tessera::eval {
namespace {

TEST(Bootstrap, IntervalsHoldTheMeanAndShrink) {
  std::vector<double> few;
  std::vector<double> many;
  for (int i = 0; i < 400; ++i) {
    const double x = i % 4 == 0 ? 1 : 0;
    if (i < 16) few.push_back(x);
    many.push_back(x);
  }
  const Estimate a = bootstrap_mean(few);
  const Estimate b = bootstrap_mean(many);
  EXPECT_EQ(a.mean, 0.25);
  EXPECT_EQ(b.mean, 0.25);
  // The normal approximation: 1.96 * sqrt(p (1 - p) / n).
  EXPECT_NEAR(b.high - b.low, 2 * 1.96 * std::sqrt(0.25 * 0.75 / 400), 0.01);
  EXPECT_GT(a.high - a.low, 3 * (b.high - b.low));
  EXPECT_EQ(bootstrap_mean(few).low, a.low) << "the seed is fixed";
  const Estimate constant = bootstrap_mean(std::vector<double>(5, 0.5));
  EXPECT_EQ(constant.low, 0.5);
  EXPECT_EQ(constant.high, 0.5);
  const Estimate one = bootstrap_mean(std::vector<double>{1.0});
  EXPECT_EQ(one.low, 0) << "one sample says little";
  EXPECT_THROW(bootstrap_mean({}), Error);
}

EvaluationResult result(const std::string& method, std::int64_t sample, double score) {
  EvaluationResult result;
  result.point = {"passkey", 100, method, sample};
  result.score = score;
  result.density = method == "dense" ? 1 : 0.5;
  result.prefill_ms = static_cast<double>(sample);
  return result;
}

TEST(Evaluation, SummariesPairSamplesWithDense) {
  std::vector<EvaluationResult> results;
  for (std::int64_t sample = 0; sample < 4; ++sample) {
    results.push_back(result("dense", sample, 1));
    results.push_back(result("window", sample, sample < 2 ? 1 : 0));
  }
  const auto summaries = summarise(results);
  ASSERT_EQ(summaries.size(), 2U);
  EXPECT_EQ(summaries[0].method, "dense");
  EXPECT_EQ(summaries[0].difference->mean, 0);
  EXPECT_EQ(summaries[1].score.mean, 0.5);
  EXPECT_EQ(summaries[1].difference->mean, -0.5);
  EXPECT_LT(summaries[1].difference->low, -0.5);
  EXPECT_EQ(summaries[1].density, 0.5);
  EXPECT_EQ(summaries[1].prefill_ms, 1.5);
  EXPECT_EQ(summaries[1].samples, 4);
  results.erase(results.begin());  // without dense's first sample
  EXPECT_EQ(summarise(results)[0].difference->mean, -2.0 / 3);
}

TEST(Evaluation, PhasesChooseTheMethods) {
  EXPECT_EQ(phase_from_name("decode"), EvaluationPhase::decode);
  EXPECT_THROW(phase_from_name("prefil"), Error);
  const SessionOptions prefill = session_options_of("xattention", EvaluationPhase::prefill);
  EXPECT_EQ(prefill.prefill->info().name, "xattention");
  EXPECT_EQ(prefill.decode->info().name, "dense");
  EXPECT_EQ(session_options_of("quest", EvaluationPhase::decode).prefill->info().name, "dense");
  EXPECT_EQ(session_options_of("streaming", EvaluationPhase::both).decode->info().name, "streaming");
  EXPECT_THROW(session_options_of("xattention", EvaluationPhase::both), Error) << "prefill only";
  EXPECT_THROW(session_options_of("tidaldecode", EvaluationPhase::prefill), Error) << "decode only";
}

/// A random model of bytes, and what it computes in float64.
class RandomBytes : public ::testing::Test {
 protected:
  RandomBytes() : random_(tessera::testing::RandomModelShape{.vocab = 256}) {
    random_.write(folder_);
    model_.emplace(Model::load(folder_.path()));
    session_.emplace(*model_, SessionOptions{});
  }

  static std::vector<std::int32_t> tokens_of(const std::string& text) {
    std::vector<std::int32_t> tokens;
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  }
  static double bits(const std::vector<double>& logits, char c) {
    double sum = 0;
    for (const double x : logits) sum += std::exp(x);
    return std::log2(sum) - logits[static_cast<unsigned char>(c)] / std::log(2.0);
  }

  tessera::testing::TemporaryFolder folder_;
  tessera::testing::RandomModel random_;
  std::optional<Model> model_;
  std::optional<Session> session_;
};

TEST_F(RandomBytes, GoldTextIsFedAndJudgedByItsLabels) {
  const std::string prompt = "some text before";
  const std::string gold = "answer text";
  const auto logits = random_.forward(tokens_of(prompt + gold));
  for (const auto& [first, end] : {std::pair<std::size_t, std::size_t>{0, 11}, {3, 7}}) {
    double right = 0;
    double sum = 0;
    for (std::size_t i = first; i < end; ++i) {
      const auto& row = logits[prompt.size() + i - 1];
      right += std::max_element(row.begin(), row.end()) - row.begin() == gold[i] ? 1 : 0;
      sum += bits(row, gold[i]);
    }
    TaskSample sample{.prompt = prompt, .gold = {gold}};
    if (end - first < gold.size()) sample.labels = {{first, end}};
    const EvaluationResult result = ask(*session_, find_task("copy"), sample);
    EXPECT_DOUBLE_EQ(result.score, right / static_cast<double>(end - first));
    EXPECT_NEAR(*result.gold_bits, sum / static_cast<double>(end - first), 1e-4);
    EXPECT_EQ(result.prompt_tokens, 16);
    EXPECT_EQ(result.density, 1);
  }
}

TEST_F(RandomBytes, WhatTheModelSaysItselfIsRight) {
  // Greedy decoding gives the text; fed as gold it is predicted everywhere, and found as an answer.
  std::string text = "begin";
  for (int i = 0; i < 8; ++i) {
    const auto row = random_.forward(tokens_of(text)).back();
    const auto next = std::max_element(row.begin(), row.end()) - row.begin();
    text += static_cast<char>(next);
  }
  const std::string said = text.substr(5);
  EXPECT_EQ(ask(*session_, find_task("sort"), {.prompt = "begin", .gold = {said}}).score, 1);
  const EvaluationResult answer = ask(*session_, find_task("passkey"), {.prompt = "begin", .gold = {said}});
  EXPECT_EQ(answer.answer.substr(0, 8), said);
  EXPECT_EQ(answer.score, 1);
  EXPECT_FALSE(answer.gold_bits);
}

TEST_F(RandomBytes, PerplexityIsTheCodeLengthOfAStretch) {
  const std::string text = "the quick brown fox jumps over the lazy dog";
  for (const std::int64_t sample : {0, 1}) {
    const std::string part = text.substr(static_cast<std::size_t>(sample * 20), 20);
    const auto logits = random_.forward(tokens_of(part));
    double sum = 0;
    for (std::size_t i = 1; i < part.size(); ++i) sum += bits(logits[i - 1], part[i]);
    EXPECT_NEAR(measure_perplexity(*session_, text, 20, 0, sample).score, sum / 19, 1e-4);
    double last = 0;
    for (std::size_t i = 15; i < part.size(); ++i) last += bits(logits[i - 1], part[i]);
    EXPECT_NEAR(measure_perplexity(*session_, text, 20, 5, sample).score, last / 5, 1e-4) << "decoded one by one";
    EXPECT_EQ(session_->statistics().prefill_tokens, 15);
  }
  EXPECT_THROW(measure_perplexity(*session_, text, 20, 0, 2), Error) << "the text ends";
  EXPECT_THROW(measure_perplexity(*session_, text, 20, 20, 0), Error) << "no prompt is left";
  EXPECT_EQ(decoded_tokens(EvaluationPhase::prefill, 4096), 0);
  EXPECT_EQ(decoded_tokens(EvaluationPhase::both, 4096), 256);
  EXPECT_EQ(decoded_tokens(EvaluationPhase::decode, 20), 5);
}

}  // namespace
}  // namespace tessera::eval
