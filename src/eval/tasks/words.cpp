#include "eval/tasks/words.h"

#include <array>
#include <set>
#include <string_view>
#include <utility>

namespace tessera::eval {

namespace {

constexpr std::array<std::string_view, 20> kOnsets{"b", "d", "f", "g",  "k",  "l",  "m",  "n",  "p",  "r",
                                                   "s", "t", "v", "br", "dr", "gr", "pl", "st", "tr", "sh"};
constexpr std::array<std::string_view, 6> kVowels{"a", "e", "i", "o", "u", "ai"};
constexpr std::array<std::string_view, 5> kCodas{"", "n", "r", "l", "s"};

template <class List>
std::string_view pick(Random& random, const List& list) {
  return list[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(list.size())))];
}

}  // namespace

std::string pseudo_word(Random& random) {
  std::string word;
  const std::int64_t syllables = 2 + random.below(3);
  for (std::int64_t i = 0; i < syllables; ++i) {
    word += pick(random, kOnsets);
    word += pick(random, kVowels);
    if (i + 1 == syllables) word += pick(random, kCodas);
  }
  return word;
}

std::vector<std::string> distinct_words(Random& random, std::int64_t count) {
  std::vector<std::string> words;
  std::set<std::string> seen;
  while (static_cast<std::int64_t>(words.size()) < count) {
    std::string word = pseudo_word(random);
    if (seen.insert(word).second) words.push_back(std::move(word));
  }
  return words;
}

std::string number_of_seven_digits(Random& random) {
  return std::to_string(1'000'000 + random.below(9'000'000));
}

std::string identifier(Random& random) {
  constexpr std::string_view symbols = "abcdefghijklmnopqrstuvwxyz0123456789";
  std::string text;
  for (int group = 0; group < 4; ++group) {
    if (group > 0) text += '-';
    for (int i = 0; i < 8; ++i) text += symbols[static_cast<std::size_t>(random.below(36))];
  }
  return text;
}

std::string capitals(Random& random, std::int64_t count) {
  std::string text;
  for (std::int64_t i = 0; i < count; ++i) text += static_cast<char>('A' + random.below(26));
  return text;
}

std::string prose_sentence(Random& random, const std::vector<std::string>& vocabulary) {
  std::string sentence;
  const std::int64_t words = 6 + random.below(9);
  for (std::int64_t i = 0; i < words; ++i) {
    // Small numbers come up more often, as in prose.
    const double u = random.uniform();
    const auto index = static_cast<std::size_t>(u * u * static_cast<double>(vocabulary.size()));
    std::string word = vocabulary[index];
    if (i == 0) word[0] = static_cast<char>(word[0] - 'a' + 'A');
    if (i > 0) sentence += ' ';
    sentence += word;
  }
  return sentence + '.';
}

std::string noise_sentence(std::int64_t index) {
  static constexpr std::array<std::string_view, 5> sentences{
      "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."};
  return std::string(sentences[static_cast<std::size_t>(index) % sentences.size()]);
}

}  // namespace tessera::eval
