// Variable tracking: names that hold a value through a chain of assignments, among sentences that say nothing. RULER
// (arXiv 2404.06654): one chain of four hops, its order kept.
#include <fmt/format.h>

#include <set>

#include "eval/random.h"
#include "eval/tasks/families.h"
#include "eval/tasks/text_builder.h"
#include "eval/tasks/words.h"

namespace tessera::eval {

TaskSample make_tracing(const TaskInfo& task, const SampleOptions& options) {
  constexpr std::int64_t hops = 4;
  constexpr std::int64_t letters = 5;
  return fill_length(task, options, hops + 1, [&](std::int64_t units) {
    Random random(options.seed, {tracing_stream});
    const std::string value = std::to_string(10'000 + random.below(90'000));
    std::set<std::string> names;
    std::vector<std::string> chain;
    while (static_cast<std::int64_t>(chain.size()) <= hops) {
      std::string name = capitals(random, letters);
      if (names.insert(name).second) chain.push_back(std::move(name));
    }
    const std::vector<std::int64_t> places = needle_places(units, hops + 1, random);
    const std::string question = fmt::format("Find all variables that are assigned the value {} in the text.", value);
    TextBuilder text;
    if (options.question_first) text.add(question + "\n\n");
    std::size_t next = 0;
    for (std::int64_t i = 0; i < units; ++i) {
      for (; next < places.size() && places[next] == i; ++next) {
        text.add_needle(next == 0 ? fmt::format("VAR {} = {}.", chain[0], value)
                                  : fmt::format("VAR {} = VAR {}.", chain[next], chain[next - 1]));
        text.add(" ");
      }
      text.add(noise_sentence(i) + " ");
    }
    text.add(fmt::format("\n\n{} They are:", question));
    return std::move(text).finish(chain);
  });
}

}  // namespace tessera::eval
