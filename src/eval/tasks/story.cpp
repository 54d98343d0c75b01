// Chapters of a merchant's story, and questions about them: what happened where (retrieval), what came before what
// (multihop), which chapters lack something (filter). After the story tasks of the Sparse Frontier (arXiv 2504.17768).
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <set>
#include <string_view>

#include "core/error.h"
#include "eval/random.h"
#include "eval/tasks/families.h"
#include "eval/tasks/text_builder.h"
#include "eval/tasks/words.h"

namespace tessera::eval {

namespace {

constexpr std::array<std::string_view, 18> kAdjectives{"old",    "carved", "heavy",  "small", "painted",  "bright",
                                                       "broken", "plain",  "tall",   "round", "polished", "dusty",
                                                       "rare",   "thin",   "folded", "dark",  "hollow",   "engraved"};
constexpr std::array<std::string_view, 15> kMaterials{"copper", "silver", "oak",   "glass", "leather",
                                                      "ivory",  "clay",   "iron",  "silk",  "marble",
                                                      "wool",   "brass",  "amber", "paper", "bronze"};
constexpr std::array<std::string_view, 21> kTypes{"box",  "lamp",   "bowl",    "ring",  "clock", "mask", "chair",
                                                  "bell", "mirror", "knife",   "flute", "map",   "cup",  "chest",
                                                  "key",  "statue", "lantern", "comb",  "plate", "harp", "compass"};
constexpr std::array<std::string_view, 20> kEvents{"a festival of lights",
                                                   "a long rain",
                                                   "a market day",
                                                   "a wedding",
                                                   "a quarrel of two guilds",
                                                   "a harvest",
                                                   "a horse race",
                                                   "the first snow",
                                                   "a fire",
                                                   "a funeral",
                                                   "an eclipse",
                                                   "a visit of singers",
                                                   "a chess tournament",
                                                   "a flood",
                                                   "an election",
                                                   "a theft",
                                                   "a fair of books",
                                                   "a storm from the sea",
                                                   "a drought",
                                                   "a day of silence"};
constexpr std::int64_t kLocations = 60;
constexpr std::int64_t kCharacters = 50;
constexpr std::int64_t kQuestions = 16;
constexpr std::int64_t kWithoutPurchase = 3;

template <class List>
std::string_view pick(Random& random, const List& list) {
  return list[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(list.size())))];
}

std::vector<std::string> names(std::int64_t count, std::int64_t stream) {
  Random random(0, {story_stream, stream});
  std::vector<std::string> words = distinct_words(random, count);
  for (std::string& word : words) word[0] = static_cast<char>(word[0] - 'a' + 'A');
  return words;
}

struct Chapter {
  std::string location;
  std::string character;
  std::string event;
  std::string item;               ///< bought in it
  std::string sold;               ///< an item of an earlier chapter; empty: none
  std::array<double, 3> taste{};  ///< which template of each paragraph
};

/// `count` chapters; pairs of location and character, and items, do not repeat.
std::vector<Chapter> chapters_of(Random& random, std::int64_t count) {
  static const std::vector<std::string> locations = names(kLocations, 1);
  static const std::vector<std::string> characters = names(kCharacters, 2);
  std::set<std::pair<std::string, std::string>> pairs;
  std::set<std::string> items;
  std::vector<Chapter> chapters;
  while (static_cast<std::int64_t>(chapters.size()) < count) {
    Chapter chapter;
    do {
      chapter.location = pick(random, locations);
      chapter.character = pick(random, characters);
    } while (!pairs.emplace(chapter.location, chapter.character).second);
    do {
      chapter.item = fmt::format("{} {} {}", pick(random, kAdjectives), pick(random, kMaterials), pick(random, kTypes));
    } while (!items.insert(chapter.item).second);
    chapter.event = pick(random, kEvents);
    if (!chapters.empty() && random.uniform() < 0.5) {
      chapter.sold = chapters[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(chapters.size())))].item;
    }
    for (double& taste : chapter.taste) taste = random.uniform();
    chapters.push_back(std::move(chapter));
  }
  return chapters;
}

struct Needed {
  bool place = false;     ///< the sentence that names location and character
  bool purchase = false;  ///< the sentence of the purchase
};

void add_chapter(TextBuilder& text, const Chapter& chapter, std::size_t number, bool with_purchase, Needed needed) {
  const auto add = [&](bool needle, const std::string& sentence) {
    needle ? text.add_needle(sentence) : text.add(sentence);
    text.add(" ");
  };
  text.add(fmt::format("Chapter {}\n\n", number));
  add(needed.place,
      chapter.taste[0] < 0.5
          ? fmt::format("The merchant came to {} on foot, and there met {}.", chapter.location, chapter.character)
          : fmt::format("The road led to {}, where the merchant met {}.", chapter.location, chapter.character));
  text.add(fmt::format("It was the time of {}, and every inn was full.\n\n", chapter.event));
  text.add(
      fmt::format("\"You have come far,\" said {}. \"Far enough,\" said the merchant. \"Then sit down and look at what "
                  "I have,\" said {}.\n\n",
                  chapter.character, chapter.character));
  if (with_purchase) {
    add(needed.purchase, chapter.taste[1] < 0.5
                             ? fmt::format("After some talk the merchant bought the {}.", chapter.item)
                             : fmt::format("They agreed on a price, and the merchant bought the {}.", chapter.item));
  }
  if (!chapter.sold.empty()) text.add(fmt::format("To pay for the room the merchant sold the {}. ", chapter.sold));
  text.add(chapter.taste[2] < 0.5 ? "In the morning they said farewell at the gate.\n\n"
                                  : "They parted as friends, and the road went on.\n\n");
}

TaskSample retrieval(const TaskInfo& task, const SampleOptions& options) {
  return fill_length(task, options, 2, [&](std::int64_t units) {
    Random random(options.seed, {story_stream, 10});
    const std::vector<Chapter> chapters = chapters_of(random, units);
    Random asking(options.seed, {story_stream, 11});
    std::vector<Needed> needed(chapters.size());
    std::vector<std::string> questions;
    std::vector<std::string> gold;
    for (std::int64_t i = 1; i <= kQuestions; ++i) {
      const auto chapter = static_cast<std::size_t>(asking.below(units));
      const std::int64_t kind = asking.below(3);
      (kind == 2 ? needed[chapter].purchase : needed[chapter].place) = true;
      const std::array<std::string, 3> answers{chapters[chapter].location, chapters[chapter].character,
                                               chapters[chapter].item};
      constexpr std::array<std::string_view, 3> asked{"where was the merchant", "whom did the merchant meet",
                                                      "what did the merchant buy"};
      questions.push_back(fmt::format("{}. In chapter {}, {}?", i, chapter + 1, asked[static_cast<std::size_t>(kind)]));
      gold.push_back(fmt::format("{}. {}", i, answers[static_cast<std::size_t>(kind)]));
    }
    const std::string question =
        fmt::format("Answer each question with a name only, one numbered line each:\n{}\n", fmt::join(questions, "\n"));
    TextBuilder text;
    if (options.question_first) text.add(question + "\n");
    for (std::size_t c = 0; c < chapters.size(); ++c) add_chapter(text, chapters[c], c + 1, true, needed[c]);
    text.add(question + "\nAnswers:\n");
    return std::move(text).finish(std::move(gold));
  });
}

TaskSample multihop(const TaskInfo& task, const SampleOptions& options) {
  return fill_length(task, options, 2, [&](std::int64_t units) {
    Random random(options.seed, {story_stream, 20});
    const std::vector<Chapter> chapters = chapters_of(random, units);
    Random asking(options.seed, {story_stream, 21});
    const auto asked = static_cast<std::size_t>(1 + asking.below(units - 1));
    const std::string question = fmt::format(
        "Which item did the merchant buy just before the {}? Answer with the item only.", chapters[asked].item);
    TextBuilder text;
    if (options.question_first) text.add(question + "\n\n");
    for (std::size_t c = 0; c < chapters.size(); ++c) {
      add_chapter(text, chapters[c], c + 1, true, {.purchase = c == asked || c + 1 == asked});
    }
    text.add(fmt::format("{}\nThe", question));
    return std::move(text).finish({chapters[asked - 1].item});
  });
}

TaskSample filter(const TaskInfo& task, const SampleOptions& options) {
  return fill_length(task, options, kWithoutPurchase + 1, [&](std::int64_t units) {
    Random random(options.seed, {story_stream, 30});
    const std::vector<Chapter> chapters = chapters_of(random, units);
    Random asking(options.seed, {story_stream, 31});
    const std::vector<std::int64_t> without = needle_places(units, kWithoutPurchase, asking);
    std::vector<std::string> gold;
    gold.reserve(without.size());
    for (const std::int64_t c : without) gold.push_back(std::to_string(c + 1));
    const std::string question =
        fmt::format("In {} chapters the merchant bought nothing. Give their numbers.", kWithoutPurchase);
    TextBuilder text;
    if (options.question_first) text.add(question + "\n\n");
    for (std::size_t c = 0; c < chapters.size(); ++c) {
      const bool none = std::find(without.begin(), without.end(), static_cast<std::int64_t>(c)) != without.end();
      add_chapter(text, chapters[c], c + 1, !none, {.place = none});
    }
    text.add(fmt::format("{} They are:", question));
    return std::move(text).finish(std::move(gold));
  });
}

}  // namespace

TaskSample make_story(const TaskInfo& task, const SampleOptions& options) {
  if (task.name == "story-retrieval") return retrieval(task, options);
  return task.name == "story-multihop" ? multihop(task, options) : filter(task, options);
}

}  // namespace tessera::eval
