// Words by how often they occur: nothing can be skipped. RULER (arXiv 2404.06654) section 3.3.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <set>

#include "eval/random.h"
#include "eval/tasks/families.h"
#include "eval/tasks/text_builder.h"
#include "eval/tasks/words.h"

namespace tessera::eval {

namespace {

/// Ten words many times, others a few times, as a numbered list.
TaskSample common_words(const TaskInfo& task, const SampleOptions& options) {
  constexpr std::int64_t common = 10;
  const bool is_short = options.length < 4096;
  const std::int64_t often = is_short ? 6 : 30;
  const std::int64_t seldom = is_short ? 1 : 3;
  return fill_length(task, options, 1, [&](std::int64_t units) {
    Random random(options.seed, {count_stream, 0});
    const std::vector<std::string> words = distinct_words(random, common + units);
    std::vector<std::int64_t> list;
    for (std::int64_t w = 0; w < common + units; ++w) list.insert(list.end(), w < common ? often : seldom, w);
    shuffle(list, random);
    constexpr std::string_view question = "What are the 10 most common words in the list?";
    TextBuilder text;
    if (options.question_first) text.add(fmt::format("{}\n\n", question));
    for (std::size_t i = 0; i < list.size(); ++i) {
      text.add(fmt::format("{}. ", i + 1));
      const std::string& word = words[static_cast<std::size_t>(list[i])];
      list[i] < common ? text.add_needle(word) : text.add(word);
      text.add(" ");
    }
    text.add(fmt::format("\n\n{} They are:", question));
    return std::move(text).finish({words.begin(), words.begin() + common});
  });
}

/// Coded words whose counts fall with the square of their rank (zeta distribution of exponent 2); the first is noise.
TaskSample frequent_words(const TaskInfo& task, const SampleOptions& options) {
  constexpr std::int64_t letters = 6;
  constexpr double zeta_of_two = std::numbers::pi * std::numbers::pi / 6;
  return fill_length(task, options, 40, [&](std::int64_t units) {
    Random random(options.seed, {count_stream, 1});
    const std::int64_t vocabulary = std::max<std::int64_t>(4, options.length / 50);
    std::set<std::string> seen;
    std::vector<std::string> words;
    while (static_cast<std::int64_t>(words.size()) < vocabulary) {
      std::string word = capitals(random, letters);
      for (char& c : word) c = static_cast<char>(c - 'A' + 'a');
      if (seen.insert(word).second) words.push_back(std::move(word));
    }
    std::vector<std::int64_t> list;
    for (std::int64_t rank = 1; rank <= vocabulary; ++rank) {
      const double share = 1 / (static_cast<double>(rank * rank) * zeta_of_two);
      list.insert(list.end(), static_cast<std::size_t>(std::floor(static_cast<double>(units) * share)), rank - 1);
    }
    shuffle(list, random);
    constexpr std::string_view question =
        "What are the three most frequently appearing words in the coded text? Dots are not words.";
    TextBuilder text;
    if (options.question_first) text.add(fmt::format("{}\n\n", question));
    for (const std::int64_t word : list) {
      if (word == 0) {
        text.add("...");
      } else if (word <= 3) {
        text.add_needle(words[static_cast<std::size_t>(word)]);
      } else {
        text.add(words[static_cast<std::size_t>(word)]);
      }
      text.add(" ");
    }
    text.add(fmt::format("\n\n{} They are:", question));
    return std::move(text).finish({words[1], words[2], words[3]});
  });
}

}  // namespace

TaskSample make_word_counts(const TaskInfo& task, const SampleOptions& options) {
  return task.name == "cwe" ? common_words(task, options) : frequent_words(task, options);
}

}  // namespace tessera::eval
