#include "tune/prompts.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <set>

#include "core/error.h"
#include "eval/random.h"

namespace tessera::tune {

namespace {

using eval::Random;

constexpr std::array<std::string_view, 26> kSpelling{
    "alpha",  "bravo", "charlie", "delta",  "echo",     "foxtrot", "golf",   "hotel",  "india",
    "juliet", "kilo",  "lima",    "mike",   "november", "oscar",   "papa",   "quebec", "romeo",
    "sierra", "tango", "uniform", "victor", "whiskey",  "xray",    "yankee", "zulu"};
constexpr std::array<std::string_view, 10> kOrdinals{"first", "second",  "third",  "fourth", "fifth",
                                                     "sixth", "seventh", "eighth", "ninth",  "tenth"};
constexpr std::array<std::string_view, 64> kWords{
    "the",     "a",        "river", "house",  "old",    "near",    "walked", "morning",    "light",   "and",
    "with",    "people",   "found", "small",  "letter", "window",  "under",  "winter",     "road",    "carried",
    "before",  "garden",   "quiet", "stone",  "often",  "book",    "town",   "remembered", "after",   "voice",
    "water",   "long",     "field", "slowly", "market", "through", "paper",  "hand",       "evening", "bridge",
    "between", "children", "green", "opened", "was",    "had",     "never",  "station",    "music",   "their",
    "story",   "cold",     "over",  "answer", "table",  "seen",    "early",  "boat",       "kitchen", "north",
    "of",      "in",       "year",  "clock"};

// Streams of the random numbers, so that one choice does not shift the others.
constexpr std::int64_t kTextStream = 1;
constexpr std::int64_t kStartStream = 2;
constexpr std::int64_t kKeyStream = 3;
constexpr std::int64_t kDepthStream = 4;
constexpr std::int64_t kTokenStream = 5;

void append(std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& more) {
  tokens.insert(tokens.end(), more.begin(), more.end());
}

std::vector<std::int32_t> start_of(const Model& model) {
  if (model.config().bos_token) return {*model.config().bos_token};
  return {};
}

/// `count` tokens of a text from a place that the seed chooses, round its end.
std::vector<std::int32_t> hay(const Model& model, std::string_view text, std::int64_t count, std::uint64_t seed) {
  std::string generated;
  if (text.empty()) {
    generated = generated_text(6 * count, seed);  // longer than most; else it is read round its end
    text = generated;
  }
  const std::vector<std::int32_t> tokens = model.encode(text, false);
  require(!tokens.empty(), "the calibration text is empty");
  const std::int64_t spare = std::ssize(tokens) - count;
  std::int64_t place = spare <= 0 ? 0 : Random(seed, {kStartStream}).below(spare + 1);
  std::vector<std::int32_t> taken;
  for (std::int64_t i = 0; i < count; ++i) {
    taken.push_back(tokens[static_cast<std::size_t>(place)]);
    place = (place + 1) % std::ssize(tokens);
  }
  return taken;
}

struct Passkey {
  std::vector<std::int32_t> statement, question, answer;
};

Passkey make_passkey(const Model& model, const PasskeyOptions& options, std::int64_t index, std::uint64_t seed) {
  Random random(seed, {kKeyStream, index});
  std::string key;
  Passkey passkey;
  if (options.style == PasskeyStyle::digits) {
    for (int i = 0; i < 5; ++i) key += static_cast<char>('0' + random.below(10));
    passkey.statement =
        model.encode(fmt::format("\nThe pass key is PK#{}. Remember it. PK#{} is the pass key.\n", key, key), false);
    passkey.question = model.encode("\nWhat is the pass key? The pass key is PK#", false);
  } else {
    for (std::int64_t i = 0; i < options.words; ++i) {
      if (i > 0) key += ' ';
      key += kSpelling.at(static_cast<std::size_t>(random.below(kSpelling.size())));
    }
    const auto place = static_cast<std::size_t>(index);
    const std::string ordinal =
        place < kOrdinals.size() ? std::string(kOrdinals.at(place)) : fmt::format("{}th", index + 1);
    passkey.statement = model.encode(fmt::format("\nRemember the words of the {} passkey: {}.\n", ordinal, key), false);
    passkey.question = model.encode(fmt::format("\nWhat are the words of the {} passkey? They are: ", ordinal), false);
  }
  passkey.answer = model.encode(key + ".", false);
  return passkey;
}

}  // namespace

std::string generated_text(std::int64_t bytes, std::uint64_t seed) {
  Random random(seed, {kTextStream});
  std::string text;
  while (std::ssize(text) < bytes) {
    const std::int64_t words = 6 + random.below(10);
    for (std::int64_t i = 0; i < words; ++i) {
      std::string word(kWords.at(static_cast<std::size_t>(random.below(kWords.size()))));
      if (i == 0) word[0] = static_cast<char>(word[0] - 'a' + 'A');
      text += word;
      text += i + 1 < words ? ' ' : '.';
    }
    text += random.below(8) == 0 ? '\n' : ' ';
  }
  text.resize(static_cast<std::size_t>(bytes));
  return text;
}

Prompt passkey_prompt(const Model& model, std::string_view text, const PasskeyOptions& options, std::uint64_t seed,
                      bool answered) {
  require(options.passkeys >= 1 && options.words >= 1, "passkeys is {}, words {}; expected 1 or more", options.passkeys,
          options.words);
  require(options.depths >= options.passkeys, "depths is {}; expected at least one per passkey, {}", options.depths,
          options.passkeys);
  Prompt prompt{start_of(model), {}};
  std::vector<Passkey> passkeys;
  std::int64_t taken = std::ssize(prompt.tokens);
  for (std::int64_t i = 0; i < options.passkeys; ++i) {
    Passkey passkey = make_passkey(model, options, i, seed);
    const auto asked = std::ssize(passkey.question) + std::ssize(passkey.answer);
    const std::int64_t more = std::ssize(passkey.statement) + (answered || i == 0 ? asked : 0);
    if (i > 0 && taken + more > options.length * 3 / 4) break;
    taken += more;
    passkeys.push_back(std::move(passkey));
  }
  if (!answered) taken -= std::ssize(passkeys[0].answer);
  require(taken + 1 < options.length, "length is {}; a prompt with one passkey of {} words needs at least {} tokens",
          options.length, options.words, taken + 2);

  const std::vector<std::int32_t> straw = hay(model, text, options.length - taken, seed);
  Random random(seed, {kDepthStream});
  std::set<std::int64_t> chosen;
  std::vector<std::int64_t> order;
  while (std::ssize(order) < std::ssize(passkeys)) {
    const std::int64_t depth = random.below(options.depths);
    if (chosen.insert(depth).second) order.push_back(depth);
  }
  std::vector<std::size_t> by_depth(passkeys.size());
  std::iota(by_depth.begin(), by_depth.end(), 0);
  std::sort(by_depth.begin(), by_depth.end(), [&](std::size_t a, std::size_t b) { return order[a] < order[b]; });
  auto next = straw.begin();
  for (const std::size_t i : by_depth) {
    const double share =
        options.depths == 1 ? 0.5 : static_cast<double>(order[i]) / static_cast<double>(options.depths - 1);
    const double depth = options.least_depth + (options.most_depth - options.least_depth) * share;
    const auto place = straw.begin() + static_cast<std::ptrdiff_t>(depth * static_cast<double>(straw.size()));
    prompt.tokens.insert(prompt.tokens.end(), next, place);
    next = place;
    append(prompt.tokens, passkeys[i].statement);
  }
  prompt.tokens.insert(prompt.tokens.end(), next, straw.end());
  for (const Passkey& passkey : passkeys) {
    append(prompt.tokens, passkey.question);
    if (!answered) break;
    const std::int64_t first = std::ssize(prompt.tokens);
    append(prompt.tokens, passkey.answer);
    prompt.answers.emplace_back(first, std::ssize(prompt.tokens));
  }
  return prompt;
}

std::vector<std::int32_t> text_prompt(const Model& model, std::string_view text, std::int64_t length,
                                      std::uint64_t seed) {
  std::vector<std::int32_t> tokens = start_of(model);
  append(tokens, hay(model, text, length - std::ssize(tokens), seed));
  return tokens;
}

std::vector<std::vector<std::int32_t>> calibration_prompts(const Model& model, std::string_view text,
                                                           std::int64_t length, std::int64_t prompts,
                                                           std::uint64_t seed) {
  std::vector<std::vector<std::int32_t>> result;
  for (std::int64_t i = 0; i < prompts; ++i) {
    const std::uint64_t own = seed + static_cast<std::uint64_t>(i);
    if (text.empty()) {
      result.push_back(passkey_prompt(model, text, {.length = length, .words = 8}, own).tokens);
    } else {
      result.push_back(text_prompt(model, text, length, own));
    }
  }
  return result;
}

std::vector<std::int32_t> repeated_tokens(const Model& model, std::int64_t period, std::int64_t repeats,
                                          std::uint64_t seed) {
  std::vector<std::int32_t> ordinary;
  for (std::int64_t id = 0; id < model.config().vocab_size; ++id) {
    const auto token = static_cast<std::int32_t>(id);
    if (!model.decode({&token, 1}).empty()) ordinary.push_back(token);
  }
  require(!ordinary.empty(), "the vocabulary has no ordinary tokens");
  Random random(seed, {kTokenStream});
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < period; ++i) {
    tokens.push_back(ordinary[static_cast<std::size_t>(random.below(std::ssize(ordinary)))]);
  }
  const std::vector<std::int32_t> once = tokens;
  for (std::int64_t i = 1; i < repeats; ++i) append(tokens, once);
  return tokens;
}

}  // namespace tessera::tune
