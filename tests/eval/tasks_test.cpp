// Generated tasks: lengths, needles, answers that the prompt really holds, and scores.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <regex>
#include <set>
#include <sstream>

#include "eval/tasks/task.h"
#include "tessera/core.h"

namespace tessera::eval {
namespace {

std::int64_t size_of_sample(const TaskInfo& task, const TaskSample& sample) {
  const bool forced = task.scoring == Scoring::teacher_forced;
  return static_cast<std::int64_t>(sample.prompt.size()) +
         (forced ? static_cast<std::int64_t>(sample.gold.front().size()) : task.answer_tokens);
}

std::string needle_text(const TaskSample& sample, std::size_t i) {
  const auto [first, end] = sample.needles[i];
  return sample.prompt.substr(first, end - first);
}

std::int64_t count(const std::string& text, const std::string& part) {
  std::int64_t found = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

TEST(Tasks, HaveTheirNames) {
  const std::vector<std::string> names{"passkey",
                                       "niah-single-1",
                                       "niah-single-2",
                                       "niah-single-3",
                                       "niah-multikey-1",
                                       "niah-multikey-2",
                                       "niah-multikey-3",
                                       "niah-multivalue",
                                       "niah-multiquery",
                                       "niah-strict",
                                       "vt",
                                       "cwe",
                                       "fwe",
                                       "mqar",
                                       "copy",
                                       "sort",
                                       "story-retrieval",
                                       "story-multihop",
                                       "story-filter"};
  std::vector<std::string> known;
  for (const TaskInfo& task : tasks()) known.push_back(task.name);
  EXPECT_EQ(known, names);
  try {
    find_task("niah-singel-1");
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("'niah-single-1'"), std::string::npos);
  }
}

class EveryTask : public testing::TestWithParam<TaskInfo> {};

TEST_P(EveryTask, FillsItsLengthAndRepeats) {
  const TaskInfo& task = GetParam();
  for (const std::int64_t length : {6000, 20000}) {
    for (const std::uint64_t seed : {1, 2, 39}) {
      const SampleOptions options{.length = length, .seed = seed};
      const TaskSample sample = make_sample(task, options);
      EXPECT_LE(size_of_sample(task, sample), length);
      // Half of a step of `sort` or `copy` is prompt, a chapter is 400 bytes.
      EXPECT_GE(size_of_sample(task, sample), length * 9 / 10) << length;
      EXPECT_EQ(sample.prompt, make_sample(task, options).prompt);
      EXPECT_EQ(sample.gold, make_sample(task, options).gold);
      EXPECT_NE(sample.gold, make_sample(task, {.length = length, .seed = seed + 100}).gold);
      EXPECT_FALSE(sample.gold.empty());
      EXPECT_FALSE(sample.needles.empty());
      for (const auto& [first, end] : sample.needles) {
        EXPECT_LT(first, end);
        EXPECT_LE(end, sample.prompt.size());
      }
      EXPECT_TRUE(sample.depth >= 0 && sample.depth < 1);
    }
  }
}

TEST_P(EveryTask, CountsTokensAsTold) {
  const TaskInfo& task = GetParam();
  const auto words = [](std::string_view text) { return static_cast<std::int64_t>(text.size() / 4); };
  const TaskSample sample = make_sample(task, {.length = 5000, .seed = 3, .count_tokens = words});
  EXPECT_LE(words(sample.prompt), 5000);
  EXPECT_GT(sample.prompt.size(), 8000U);
}

TEST_P(EveryTask, QuestionMayComeFirst) {
  const TaskInfo& task = GetParam();
  const TaskSample after = make_sample(task, {.length = 8000, .seed = 5});
  const TaskSample both = make_sample(task, {.length = 8000, .seed = 5, .question_first = true});
  if (task.name == "mqar") {
    EXPECT_EQ(after.prompt, both.prompt) << "has no question";
    return;
  }
  EXPECT_NE(after.prompt.substr(0, 20), both.prompt.substr(0, 20));
  // An answer that fits is the same wherever the question stands.
  if (task.scoring != Scoring::teacher_forced && task.name != "niah-strict" && !task.name.starts_with("story")) {
    EXPECT_EQ(after.gold, both.gold);
  }
}

TEST_P(EveryTask, RefusesALengthWithoutRoom) {
  const TaskInfo& task = GetParam();
  try {
    make_sample(task, {.length = 10, .seed = 1});
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("task " + task.name), std::string::npos) << error.what();
  }
  EXPECT_THROW(make_sample(task, {.length = 0}), Error);
}

TEST_P(EveryTask, TheGoldAnswerScoresOneAndAnotherLess) {
  const TaskInfo& task = GetParam();
  const TaskSample sample = make_sample(task, {.length = 8000, .seed = 7});
  if (task.scoring == Scoring::teacher_forced) {
    EXPECT_THROW(score_answer(task, sample, "x"), Error);
    return;
  }
  std::string answer;
  for (const std::string& gold : sample.gold) answer += gold + "\n";
  EXPECT_EQ(score_answer(task, sample, answer), 1);
  EXPECT_EQ(score_answer(task, sample, ""), 0);
  EXPECT_EQ(score_answer(task, sample, "I do not know."), 0);
  const TaskSample other = make_sample(task, {.length = 8000, .seed = 8});
  std::string wrong;
  for (const std::string& gold : other.gold) wrong += gold + "\n";
  EXPECT_LT(score_answer(task, sample, wrong), 0.5);
  if (sample.gold.size() > 1) {
    const double part = score_answer(task, sample, sample.gold[0] + "\n");
    EXPECT_TRUE(part > 0 && part < 1) << part;
  }
}

INSTANTIATE_TEST_SUITE_P(Tasks, EveryTask, testing::ValuesIn(tasks().begin(), tasks().end()), [](const auto& task) {
  std::string name = task.param.name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TaskSample sample_of(const std::string& task, std::int64_t length = 12000, std::uint64_t seed = 4) {
  return make_sample(find_task(task), {.length = length, .seed = seed});
}

TEST(Tasks, NeedlesHoldWhatIsAsked) {
  for (const std::string name : {"passkey", "niah-single-1", "niah-single-2", "niah-single-3", "niah-multikey-1",
                                 "niah-multikey-2", "niah-multikey-3", "niah-multivalue", "niah-multiquery"}) {
    const TaskSample sample = sample_of(name);
    std::string needles;
    for (std::size_t i = 0; i < sample.needles.size(); ++i) needles += needle_text(sample, i);
    for (const std::string& gold : sample.gold) EXPECT_EQ(count(needles, gold), name == "passkey" ? 2 : 1) << name;
    const std::size_t expected = name == "niah-multivalue" || name == "niah-multiquery" ? 4 : 1;
    EXPECT_EQ(sample.needles.size(), expected) << name;
    EXPECT_EQ(sample.gold.size(), expected) << name;
  }
  EXPECT_EQ(count(sample_of("niah-multikey-1").prompt, "One of the special magic numbers for"), 4);
  EXPECT_GT(count(sample_of("niah-multikey-2").prompt, "One of the special magic numbers for"), 100);
  EXPECT_EQ(sample_of("niah-single-3").gold[0].size(), 35U) << "four groups of eight";
}

TEST(Tasks, PasskeysReachEveryDepth) {
  std::set<int> tenths;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    tenths.insert(static_cast<int>(sample_of("passkey", 8000, seed).depth * 10));
  }
  EXPECT_EQ(tenths.size(), 10U);
}

TEST(Tasks, TracingIsOneChainInOrder) {
  const TaskSample sample = sample_of("vt");
  ASSERT_EQ(sample.needles.size(), 5U);
  std::smatch first;
  const std::string begin = needle_text(sample, 0);
  ASSERT_TRUE(std::regex_match(begin, first, std::regex("VAR ([A-Z]{5}) = (\\d{5})\\.")));
  EXPECT_EQ(first[1], sample.gold[0]);
  EXPECT_NE(sample.prompt.rfind(first[2].str()), sample.prompt.find(first[2].str())) << "the question names the value";
  for (std::size_t i = 1; i < 5; ++i) {
    EXPECT_EQ(needle_text(sample, i), "VAR " + sample.gold[i] + " = VAR " + sample.gold[i - 1] + ".");
  }
}

std::map<std::string, std::int64_t> word_counts(const std::string& text) {
  std::map<std::string, std::int64_t> counts;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) ++counts[word];
  return counts;
}

TEST(Tasks, CommonWordsAreTheMostFrequent) {
  const TaskSample sample = sample_of("cwe");
  const auto counts = word_counts(sample.prompt.substr(0, sample.prompt.find("\n\n")));
  for (const std::string& gold : sample.gold) EXPECT_EQ(counts.at(gold), 30);
  for (const auto& [word, times] : counts) {
    const bool common = std::find(sample.gold.begin(), sample.gold.end(), word) != sample.gold.end();
    EXPECT_TRUE(common || times <= 3) << word;
  }
}

TEST(Tasks, FrequentWordsFollowTheSquareOfTheirRank) {
  const TaskSample sample = sample_of("fwe", 20000);
  auto counts = word_counts(sample.prompt.substr(0, sample.prompt.find("\n\n")));
  const auto noise = static_cast<double>(counts.at("..."));
  for (std::size_t i = 0; i < 3; ++i) {
    const double rank = static_cast<double>(i) + 2;
    EXPECT_NEAR(static_cast<double>(counts.at(sample.gold[i])), noise / (rank * rank), 1.01);
  }
  const std::int64_t third = counts.at(sample.gold[2]);
  for (const std::string& gold : sample.gold) counts.erase(gold);
  counts.erase("...");
  for (const auto& [word, times] : counts) EXPECT_LT(times, third) << word;
}

TEST(Tasks, RecallLabelsTheValues) {
  const TaskSample sample = sample_of("mqar", 4000);
  EXPECT_EQ(sample.labels.size(), std::min<std::size_t>(64, sample.needles.size()));
  for (const auto& [first, end] : sample.labels) {
    const std::string value = sample.gold[0].substr(first, end - first);
    EXPECT_EQ(value[0], ' ');
    const std::size_t key_begin = sample.gold[0].rfind(' ', first - 1) + 1;
    const std::string pair = sample.gold[0].substr(key_begin, end - key_begin);
    EXPECT_EQ(count(sample.prompt, pair + ";"), 1) << pair;
  }
}

TEST(Tasks, SequencesAreCopiedAndSorted) {
  const TaskSample copied = sample_of("copy");
  EXPECT_EQ(" " + needle_text(copied, 0), copied.gold[0]);
  const TaskSample sorted = sample_of("sort");
  const auto items = [](const std::string& text) {
    std::vector<std::string> list;
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = std::min(text.find(", ", begin), text.size());
      list.push_back(text.substr(begin, end - begin));
      begin = end + 2;
    }
    return list;
  };
  auto expected = items(needle_text(sorted, 0));
  EXPECT_FALSE(std::is_sorted(expected.begin(), expected.end()));
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(items(sorted.gold[0].substr(1)), expected);
}

TEST(Tasks, StoriesHoldTheirAnswers) {
  const TaskSample retrieval = sample_of("story-retrieval");
  EXPECT_EQ(retrieval.gold.size(), 16U);
  std::string needles;
  for (std::size_t i = 0; i < retrieval.needles.size(); ++i) needles += needle_text(retrieval, i);
  for (const std::string& gold : retrieval.gold) {
    EXPECT_GE(count(needles, gold.substr(gold.find(". ") + 2)), 1) << gold;
  }
  const TaskSample multihop = sample_of("story-multihop");
  ASSERT_EQ(multihop.needles.size(), 2U);
  EXPECT_EQ(count(needle_text(multihop, 0), multihop.gold[0]), 1) << "bought in the chapter before";
  const TaskSample filter = sample_of("story-filter");
  ASSERT_EQ(filter.gold.size(), 3U);
  std::vector<std::string> without;
  for (std::size_t at = filter.prompt.find("Chapter "); at != std::string::npos;) {
    const std::size_t next = filter.prompt.find("Chapter ", at + 1);
    const std::string chapter = filter.prompt.substr(at, next - at);
    if (chapter.find(" bought the ") == std::string::npos) without.push_back(chapter.substr(8, chapter.find('\n') - 8));
    at = next;
  }
  EXPECT_EQ(without, filter.gold);
}

TEST(Tasks, ScoresForgiveFormOnly) {
  const TaskInfo strict = find_task("niah-strict");
  const TaskSample sample{.prompt = "", .gold = {"1. The Red Lamp", "2. ab-12: cd-34"}};
  EXPECT_EQ(score_answer(strict, sample, "1) a red lamp\n\n2. AB-12 : cd-34\n"), 1);
  EXPECT_EQ(score_answer(strict, sample, "2. ab-12: cd-34\n1. the red lamp"), 0) << "order counts";
  EXPECT_EQ(score_answer(strict, sample, "1. red lamp\n2. ab-12: cd-35"), 0.5);
  const TaskInfo filter = find_task("story-filter");
  const TaskSample ids{.prompt = "", .gold = {"3", "7", "9"}};
  EXPECT_EQ(score_answer(filter, ids, "3, 7, 9"), 1);
  EXPECT_EQ(score_answer(filter, ids, "3, 7, 8"), 0.5) << "two of four";
  const TaskInfo contained = find_task("vt");
  EXPECT_EQ(score_answer(contained, {.prompt = "", .gold = {"ABCDE", "FGHIJ"}}, "abcde and so on"), 0.5);
}

}  // namespace
}  // namespace tessera::eval
