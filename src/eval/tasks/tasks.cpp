// The list of tasks, and how answers are scored.
#include <algorithm>
#include <array>
#include <cctype>
#include <set>
#include <string>

#include "core/error.h"
#include "eval/tasks/families.h"
#include "eval/tasks/task.h"

namespace tessera::eval {

namespace {

using Make = TaskSample (*)(const TaskInfo&, const SampleOptions&);

struct Row {
  TaskInfo info;
  Make make;
};

const std::vector<Row>& rows() {
  using enum Scoring;
  static const std::vector<Row> table{
      {{"passkey", "a number in repeated sentences", contained, 16}, make_needles},
      {{"niah-single-1", "one needle in repeated sentences", contained, 128}, make_needles},
      {{"niah-single-2", "one needle in prose", contained, 128}, make_needles},
      {{"niah-single-3", "one needle in prose, an identifier as its value", contained, 128}, make_needles},
      {{"niah-multikey-1", "one of four needles in prose", contained, 128}, make_needles},
      {{"niah-multikey-2", "one needle among nothing but needles", contained, 128}, make_needles},
      {{"niah-multikey-3", "the same with identifiers", contained, 128}, make_needles},
      {{"niah-multivalue", "four values of one key", contained, 128}, make_needles},
      {{"niah-multiquery", "four keys at once", contained, 128}, make_needles},
      {{"niah-strict", "four keys among nothing but needles; place, key and value must be right", exact, 400},
       make_needles},
      {{"vt", "names that a value is passed along", contained, 30 * 4}, make_tracing},
      {{"cwe", "the ten most common words of a list", contained, 120}, make_word_counts},
      {{"fwe", "the three most frequent words of a coded text", contained, 50}, make_word_counts},
      {{"mqar", "values of keys given before", teacher_forced, 0}, make_sequences},
      {{"copy", "a sequence again", teacher_forced, 0}, make_sequences},
      {{"sort", "items in the order of their numbers", teacher_forced, 0}, make_sequences},
      {{"story-retrieval", "sixteen facts of single chapters", exact, 512}, make_story},
      {{"story-multihop", "what was bought just before something else", contained, 32}, make_story},
      {{"story-filter", "chapters in which nothing was bought", overlap, 32}, make_story},
  };
  return table;
}

std::string lower(std::string_view text) {
  std::string result;
  for (const char c : text) result += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return result;
}

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-';
}

std::vector<std::string> words_of(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  for (const char c : lower(text) + " ") {
    if (is_word(c)) {
      word += c;
    } else if (!word.empty()) {
      words.push_back(std::move(word));
      word.clear();
    }
  }
  return words;
}

/// A line without case, punctuation, and articles.
std::string plain(std::string_view line) {
  std::string text;
  for (const std::string& word : words_of(line)) {
    if (word == "a" || word == "an" || word == "the") continue;
    if (!text.empty()) text += ' ';
    text += word;
  }
  return text;
}

double share_contained(const TaskSample& sample, std::string_view answer) {
  const std::string text = lower(answer);
  double found = 0;
  for (const std::string& gold : sample.gold) found += text.find(lower(gold)) != std::string::npos ? 1 : 0;
  return found / static_cast<double>(sample.gold.size());
}

double share_of_lines(const TaskSample& sample, std::string_view answer) {
  std::vector<std::string> lines;
  for (std::size_t begin = 0; begin <= answer.size();) {
    const std::size_t end = std::min(answer.find('\n', begin), answer.size());
    std::string line = plain(answer.substr(begin, end - begin));
    if (!line.empty()) lines.push_back(std::move(line));
    begin = end + 1;
  }
  double right = 0;
  for (std::size_t i = 0; i < sample.gold.size() && i < lines.size(); ++i) {
    right += lines[i] == plain(sample.gold[i]) ? 1 : 0;
  }
  return right / static_cast<double>(sample.gold.size());
}

double overlap_of_words(const TaskSample& sample, std::string_view answer) {
  const std::vector<std::string> words = words_of(answer);
  const std::set<std::string> said(words.begin(), words.end());
  std::set<std::string> all = said;
  double common = 0;
  for (const std::string& gold : sample.gold) {
    const std::string word = lower(gold);
    common += said.contains(word) ? 1 : 0;
    all.insert(word);
  }
  return common / static_cast<double>(all.size());
}

}  // namespace

std::span<const TaskInfo> tasks() {
  static const std::vector<TaskInfo> infos = [] {
    std::vector<TaskInfo> list;
    for (const Row& row : rows()) list.push_back(row.info);
    return list;
  }();
  return infos;
}

const TaskInfo& find_task(std::string_view name) {
  std::vector<std::string> names;
  for (const TaskInfo& task : tasks()) {
    if (task.name == name) return task;
    names.push_back(task.name);
  }
  fail("unknown task '{}'; did you mean '{}'?", name, nearest_name(name, names));
}

TaskSample make_sample(const TaskInfo& task, const SampleOptions& options) {
  require(options.length > 0 && options.length <= std::int64_t{1} << 24, "task {}: length {}; expected 1 to 2^24",
          task.name, options.length);
  const auto found =
      std::find_if(rows().begin(), rows().end(), [&](const Row& row) { return row.info.name == task.name; });
  require(found != rows().end(), "unknown task '{}'", task.name);
  return found->make(task, options);
}

double score_answer(const TaskInfo& task, const TaskSample& sample, std::string_view answer) {
  switch (task.scoring) {
    case Scoring::contained:
      return share_contained(sample, answer);
    case Scoring::exact:
      return share_of_lines(sample, answer);
    case Scoring::overlap:
      return overlap_of_words(sample, answer);
    case Scoring::teacher_forced:
      break;
  }
  fail("task {}: judged while the answer is fed; there is none to score", task.name);
}

}  // namespace tessera::eval
