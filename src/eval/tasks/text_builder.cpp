#include "eval/tasks/text_builder.h"

#include <algorithm>
#include <set>

#include "core/error.h"
#include "eval/random.h"

namespace tessera::eval {

TaskSample TextBuilder::finish(std::vector<std::string> gold) && {
  sample_.gold = std::move(gold);
  if (!sample_.needles.empty() && !sample_.prompt.empty()) {
    sample_.depth = static_cast<double>(sample_.needles.front().first) / static_cast<double>(sample_.prompt.size());
  }
  return std::move(sample_);
}

TaskSample fill_length(const TaskInfo& task, const SampleOptions& options, std::int64_t least,
                       const std::function<TaskSample(std::int64_t units)>& build) {
  const auto tokens = [&](const TaskSample& sample) {
    const std::int64_t prompt =
        options.count_tokens ? options.count_tokens(sample.prompt) : static_cast<std::int64_t>(sample.prompt.size());
    std::int64_t answer = task.answer_tokens;
    if (task.scoring == Scoring::teacher_forced) {
      answer = options.count_tokens ? options.count_tokens(sample.gold.front())
                                    : static_cast<std::int64_t>(sample.gold.front().size());
    }
    return prompt + answer;
  };
  TaskSample best = build(least);
  require(tokens(best) <= options.length, "task {}: {} tokens do not hold the question; expected {} or more", task.name,
          options.length, tokens(best));
  std::int64_t low = least;  // fits
  std::int64_t high = least + 1;
  for (;;) {  // double until it no longer fits
    TaskSample sample = build(high);
    if (tokens(sample) > options.length) break;
    best = std::move(sample);
    low = high;
    high = least + 2 * (high - least);
  }
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    TaskSample sample = build(middle);
    if (tokens(sample) > options.length) {
      high = middle;
    } else {
      best = std::move(sample);
      low = middle;
    }
  }
  return best;
}

std::vector<std::int64_t> needle_places(std::int64_t units, std::int64_t count, Random& random) {
  std::vector<std::int64_t> places;
  if (units < count) {
    for (std::int64_t i = 0; i < count; ++i) places.push_back(units > 0 ? random.below(units) : 0);
  } else {
    std::set<std::int64_t> chosen;
    while (static_cast<std::int64_t>(chosen.size()) < count) chosen.insert(random.below(units));
    places.assign(chosen.begin(), chosen.end());
  }
  std::sort(places.begin(), places.end());
  return places;
}

}  // namespace tessera::eval
