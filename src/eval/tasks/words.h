// Words, numbers, names and sentences for generated texts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "eval/random.h"

namespace tessera::eval {

/// A pronounceable word of 2 to 4 syllables; about 40,000 of two and many more of three.
std::string pseudo_word(Random& random);
/// `count` different pseudo-words.
std::vector<std::string> distinct_words(Random& random, std::int64_t count);
/// Seven digits, the first not 0.
std::string number_of_seven_digits(Random& random);
/// Four groups of eight of [a-z0-9], joined by '-'.
std::string identifier(Random& random);
/// `count` capital letters.
std::string capitals(Random& random, std::int64_t count);
/// A sentence of 6 to 14 pseudo-words from a small vocabulary, so that it reads like prose of one author.
std::string prose_sentence(Random& random, const std::vector<std::string>& vocabulary);
/// One of the fixed sentences that tests of retrieval hide needles in.
std::string noise_sentence(std::int64_t index);

/// Random order (Fisher-Yates).
template <class Item>
void shuffle(std::vector<Item>& items, Random& random) {
  for (std::size_t i = items.size(); i > 1; --i) {
    std::swap(items[i - 1], items[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
  }
}

}  // namespace tessera::eval
