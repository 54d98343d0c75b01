// Sequences without meaning, judged token by token while the right answer is fed: associative recall, copying, sorting.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "eval/random.h"
#include "eval/tasks/families.h"
#include "eval/tasks/text_builder.h"
#include "eval/tasks/words.h"

namespace tessera::eval {

namespace {

/// Keys with values, then every key again (at most 64): its value is what counts. Zoology (arXiv 2312.04927).
TaskSample recall(const TaskInfo& task, const SampleOptions& options) {
  constexpr std::int64_t most_asked = 64;
  return fill_length(task, options, 2, [&](std::int64_t units) {
    Random random(options.seed, {sequence_stream, 0});
    const std::vector<std::string> words = distinct_words(random, 2 * units);
    std::vector<std::int64_t> asked(static_cast<std::size_t>(units));
    for (std::int64_t i = 0; i < units; ++i) asked[static_cast<std::size_t>(i)] = i;
    shuffle(asked, random);
    asked.resize(static_cast<std::size_t>(std::min(units, most_asked)));
    TextBuilder text;
    for (std::int64_t i = 0; i < units; ++i) {
      const std::string pair =
          fmt::format("{} {}", words[static_cast<std::size_t>(i)], words[static_cast<std::size_t>(units + i)]);
      std::find(asked.begin(), asked.end(), i) != asked.end() ? text.add_needle(pair) : text.add(pair);
      text.add("; ");
    }
    text.add("\n");
    std::string gold;
    std::vector<std::pair<std::size_t, std::size_t>> labels;
    for (const std::int64_t i : asked) {
      gold += words[static_cast<std::size_t>(i)];
      const std::string& value = words[static_cast<std::size_t>(units + i)];
      labels.emplace_back(gold.size(), gold.size() + 1 + value.size());  // the space before it is part of its token
      gold += fmt::format(" {}; ", value);
    }
    TaskSample sample = std::move(text).finish({gold});
    sample.labels = std::move(labels);
    return sample;
  });
}

TaskSample copy(const TaskInfo& task, const SampleOptions& options) {
  return fill_length(task, options, 1, [&](std::int64_t units) {
    Random random(options.seed, {sequence_stream, 1});
    std::vector<std::string> words;
    for (std::int64_t i = 0; i < units; ++i) words.push_back(pseudo_word(random));
    const std::string sequence = fmt::format("{}", fmt::join(words, " "));
    TextBuilder text;
    if (options.question_first) text.add("Copy the text.\n\n");
    text.add("Text: ");
    text.add_needle(sequence);
    text.add("\nCopy:");
    return std::move(text).finish({" " + sequence});
  });
}

TaskSample sort(const TaskInfo& task, const SampleOptions& options) {
  return fill_length(task, options, 1, [&](std::int64_t units) {
    Random random(options.seed, {sequence_stream, 2});
    std::vector<std::string> items;
    for (std::int64_t i = 0; i < units; ++i) {
      items.push_back(fmt::format("{} {}", number_of_seven_digits(random), pseudo_word(random)));
    }
    TextBuilder text;
    if (options.question_first) text.add("Sort the items by their number.\n\n");
    text.add("Items: ");
    text.add_needle(fmt::format("{}", fmt::join(items, ", ")));
    text.add("\nSorted:");
    std::sort(items.begin(), items.end());
    return std::move(text).finish({fmt::format(" {}", fmt::join(items, ", "))});
  });
}

}  // namespace

TaskSample make_sequences(const TaskInfo& task, const SampleOptions& options) {
  if (task.name == "mqar") return recall(task, options);
  return task.name == "copy" ? copy(task, options) : sort(task, options);
}

}  // namespace tessera::eval
