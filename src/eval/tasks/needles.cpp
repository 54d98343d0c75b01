// A few sentences to be found in a long text. RULER (arXiv 2404.06654) section 3.1; the strict form follows the Sparse
// Frontier (2504.17768): everything is a needle, and place, key and value must all be right.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "eval/random.h"
#include "eval/tasks/families.h"
#include "eval/tasks/text_builder.h"
#include "eval/tasks/words.h"

namespace tessera::eval {

namespace {

enum class Hay : std::uint8_t { noise, prose, needles };

struct Recipe {
  Hay hay = Hay::prose;
  std::int64_t keys = 1;    ///< needles planted with different keys
  std::int64_t values = 1;  ///< of each key
  std::int64_t asked = 1;   ///< keys
  bool identifier_keys = false;
  bool identifier_values = false;
};

Recipe recipe_of(const std::string& name) {
  if (name == "niah-single-1") return {.hay = Hay::noise};
  if (name == "niah-single-3") return {.identifier_values = true};
  if (name == "niah-multikey-1") return {.keys = 4};
  if (name == "niah-multikey-2") return {.hay = Hay::needles};
  if (name == "niah-multikey-3") return {.hay = Hay::needles, .identifier_keys = true, .identifier_values = true};
  if (name == "niah-multivalue") return {.values = 4};
  if (name == "niah-multiquery") return {.keys = 4, .asked = 4};
  return {};  // niah-single-2
}

struct Needle {
  std::string key;
  std::string value;
  bool asked = false;
};

std::string sentence_of(const Needle& needle, std::string_view type) {
  return fmt::format("One of the special magic {}s for {} is: {}.", type, needle.key, needle.value);
}

TaskSample make_passkey(const TaskInfo& task, const SampleOptions& options) {
  return fill_length(task, options, 1, [&](std::int64_t units) {
    Random random(options.seed, {needle_stream, 0});
    const std::string key = std::to_string(10'000 + random.below(90'000));
    // 40 depths from the begin to the end, so that samples cover them evenly.
    const std::int64_t place = static_cast<std::int64_t>(options.seed % 40) * units / 39;
    constexpr std::string_view question = "What is the pass key?";
    TextBuilder text;
    if (options.question_first) text.add(fmt::format("{} It is hidden in the text below.\n\n", question));
    for (std::int64_t i = 0; i <= units; ++i) {
      if (i == std::min(place, units)) {
        text.add_needle(fmt::format("The pass key is {0}. Remember it. {0} is the pass key.", key));
        text.add(" ");
      }
      if (i < units) text.add(noise_sentence(i) + " ");
    }
    text.add(fmt::format("\n\n{} The pass key is", question));
    return std::move(text).finish({key});
  });
}

TaskSample make_strict(const TaskInfo& task, const SampleOptions& options) {
  constexpr std::int64_t questions = 4;
  return fill_length(task, options, questions, [&](std::int64_t units) {
    Random random(options.seed, {needle_stream, 1});
    std::vector<Needle> needles;
    for (std::int64_t i = 0; i < units; ++i) needles.push_back({identifier(random), identifier(random)});
    std::vector<std::int64_t> asked = needle_places(units, questions, random);
    for (const std::int64_t i : asked) needles[static_cast<std::size_t>(i)].asked = true;
    shuffle(asked, random);
    std::vector<std::string> keys;
    std::vector<std::string> gold;
    for (std::size_t i = 0; i < asked.size(); ++i) {
      const Needle& needle = needles[static_cast<std::size_t>(asked[i])];
      keys.push_back(fmt::format("{}. {}", i + 1, needle.key));
      gold.push_back(fmt::format("{}. {}: {}", i + 1, needle.key, needle.value));
    }
    const std::string question =
        fmt::format("For each of these keys give its value, one per line, as number, key, colon, value:\n{}\n",
                    fmt::join(keys, "\n"));
    TextBuilder text;
    if (options.question_first) text.add(question + "\n");
    for (const Needle& needle : needles) {
      const std::string line = fmt::format("The value of {} is {}.\n", needle.key, needle.value);
      needle.asked ? text.add_needle(line) : text.add(line);
    }
    text.add("\n" + question + "\nAnswer:\n");
    return std::move(text).finish(std::move(gold));
  });
}

/// The needles that matter, those asked for first.
std::vector<Needle> planted(const Recipe& recipe, Random& random) {
  std::vector<Needle> needles;
  const std::vector<std::string> words = distinct_words(random, recipe.keys);
  for (std::int64_t k = 0; k < recipe.keys; ++k) {
    const std::string key = recipe.identifier_keys ? identifier(random) : words[static_cast<std::size_t>(k)];
    for (std::int64_t v = 0; v < recipe.values; ++v) {
      const std::string value = recipe.identifier_values ? identifier(random) : number_of_seven_digits(random);
      needles.push_back({key, value, k < recipe.asked});
    }
  }
  return needles;
}

TaskSample make_niah(const TaskInfo& task, const SampleOptions& options) {
  const Recipe recipe = recipe_of(task.name);
  const std::string_view type = recipe.identifier_values ? "uuid" : "number";
  return fill_length(task, options, 1, [&](std::int64_t units) {
    Random random(options.seed, {needle_stream, 2});
    std::vector<Needle> needles = planted(recipe, random);
    std::vector<std::string> gold;
    std::vector<std::string> asked;
    for (const Needle& needle : needles) {
      if (!needle.asked) continue;
      gold.push_back(needle.value);
      if (asked.empty() || asked.back() != needle.key) asked.push_back(needle.key);
    }
    shuffle(needles, random);
    const std::vector<std::int64_t> places =
        needle_places(units + 1, static_cast<std::int64_t>(needles.size()), random);
    Random hay(options.seed, {needle_stream, 3});
    const std::vector<std::string> vocabulary = distinct_words(hay, 400);
    const bool many = gold.size() > 1;
    const std::string question = fmt::format("What {} the special magic {}{} for {} in the text?",
                                             many ? "are all" : "is", type, many ? "s" : "", fmt::join(asked, ", "));
    TextBuilder text;
    if (options.question_first) text.add(question + "\n\n");
    std::size_t next = 0;
    for (std::int64_t i = 0; i <= units; ++i) {
      for (; next < places.size() && places[next] == i; ++next) {
        const std::string sentence = sentence_of(needles[next], type);
        needles[next].asked ? text.add_needle(sentence) : text.add(sentence);
        text.add(recipe.hay == Hay::needles ? "\n" : " ");
      }
      if (i == units) break;
      switch (recipe.hay) {
        case Hay::noise:
          text.add(noise_sentence(i) + " ");
          break;
        case Hay::prose:
          text.add(prose_sentence(hay, vocabulary) + " ");
          break;
        case Hay::needles: {
          const std::string key = recipe.identifier_keys ? identifier(hay) : pseudo_word(hay) + pseudo_word(hay);
          const std::string value = recipe.identifier_values ? identifier(hay) : number_of_seven_digits(hay);
          text.add(sentence_of({key, value}, type) + "\n");
          break;
        }
      }
    }
    text.add(fmt::format("\n\n{} The special magic {}{} for {} {}:", question, type, many ? "s" : "",
                         fmt::join(asked, ", "), many ? "are" : "is"));
    return std::move(text).finish(std::move(gold));
  });
}

}  // namespace

TaskSample make_needles(const TaskInfo& task, const SampleOptions& options) {
  if (task.name == "passkey") return make_passkey(task, options);
  if (task.name == "niah-strict") return make_strict(task, options);
  return make_niah(task, options);
}

}  // namespace tessera::eval
