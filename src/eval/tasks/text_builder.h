// Texts made of pieces, some of which are needles, and the search for how many pieces fill a length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "eval/tasks/task.h"

namespace tessera::eval {

/// Collects a prompt and remembers where its needles stand.
class TextBuilder {
 public:
  void add(std::string_view text) { sample_.prompt += text; }
  void add_needle(std::string_view text) {
    sample_.needles.emplace_back(sample_.prompt.size(), sample_.prompt.size() + text.size());
    sample_.prompt += text;
  }
  /// The sample with this gold; its depth is that of the first needle.
  TaskSample finish(std::vector<std::string> gold) &&;

 private:
  TaskSample sample_;
};

/// The sample of the most units that fits, found by bisection: build(units) grows with its units, from `least` on.
/// Throws Error, naming the task, when the least does not fit.
TaskSample fill_length(const TaskInfo& task, const SampleOptions& options, std::int64_t least,
                       const std::function<TaskSample(std::int64_t units)>& build);

/// Places of `count` needles among `units` pieces, ascending, different where there is room.
std::vector<std::int64_t> needle_places(std::int64_t units, std::int64_t count, class Random& random);

}  // namespace tessera::eval
