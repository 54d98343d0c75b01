#include "eval/mqar.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "core/error.h"
#include "eval/random.h"

namespace tessera::eval {
namespace {

constexpr std::int64_t kVocabularyLimit = std::int64_t{1} << 24;

/// `count` different numbers of [0, range), in random order.
std::vector<std::int64_t> choose_distinct(std::int64_t range, std::int64_t count, Random& random) {
  std::vector<std::int64_t> all(range);
  std::iota(all.begin(), all.end(), 0);
  for (std::int64_t i = 0; i < count; ++i) std::swap(all[i], all[i + random.below(range - i)]);
  all.resize(count);
  return all;
}

/// `count` different slots drawn one after another with chance ~ (slot + 1)^(a - 1): the largest of log(u) / weight are
/// such a draw (Efraimidis and Spirakis).
std::vector<std::int64_t> choose_slots(std::int64_t slots, std::int64_t count, double exponent, Random& random) {
  std::vector<std::pair<double, std::int64_t>> keys(slots);
  for (std::int64_t s = 0; s < slots; ++s) {
    const double weight = std::pow(static_cast<double>(s + 1), exponent - 1);
    keys[s] = {std::log(1 - random.uniform()) / weight, s};
  }
  std::partial_sort(keys.begin(), keys.begin() + count, keys.end(), std::greater<>());
  std::vector<std::int64_t> chosen;
  for (std::int64_t i = 0; i < count; ++i) chosen.push_back(keys[i].second);
  return chosen;
}

void check(const MqarOptions& options, std::int64_t asked) {
  require(options.key_tokens == 1 || options.key_tokens == 2, "key_tokens is {}; expected 1 or 2", options.key_tokens);
  require(options.pairs > 0 && options.passes > 0, "pairs is {} and passes {}; expected positive numbers",
          options.pairs, options.passes);
  require(asked > 0 && asked <= options.pairs, "queries is {}; expected 1 to pairs {}", asked, options.pairs);
  require(options.vocabulary >= 4 && options.vocabulary <= kVocabularyLimit, "vocabulary is {}; expected 4 to {}",
          options.vocabulary, kVocabularyLimit);
  const std::int64_t half = options.vocabulary / 2;
  require(2 * options.pairs <= half, "pairs is {}; expected at most a quarter of the vocabulary {}", options.pairs,
          options.vocabulary);
  require(options.reassigned >= 0 && options.reassigned <= 1, "reassigned is {}; expected 0 to 1", options.reassigned);
}

}  // namespace

MqarTask make_mqar(const MqarOptions& options) {
  const std::int64_t asked = options.queries == 0 ? options.pairs : options.queries;
  check(options, asked);
  Random random(options.seed, {0});
  const std::int64_t half = options.vocabulary / 2;
  const std::int64_t pairs = options.pairs;

  // Keys: distinct tokens, or distinct cells of a grid so that each half of a key occurs with several values.
  std::vector<std::vector<std::int32_t>> keys;
  if (options.key_tokens == 1) {
    for (const std::int64_t key : choose_distinct(half, pairs, random))
      keys.push_back({static_cast<std::int32_t>(key)});
  } else {
    const auto side = static_cast<std::int64_t>(std::ceil(std::sqrt(static_cast<double>(pairs))));
    const std::vector<std::int64_t> axis = choose_distinct(half, 2 * side, random);
    for (const std::int64_t cell : choose_distinct(side * side, pairs, random)) {
      keys.push_back(
          {static_cast<std::int32_t>(axis[cell / side]), static_cast<std::int32_t>(axis[side + cell % side])});
    }
  }
  std::vector<std::int32_t> values;
  for (const std::int64_t value : choose_distinct(half, 2 * pairs, random)) {
    values.push_back(static_cast<std::int32_t>(half + value));
  }

  std::vector<std::int32_t> context;
  const auto write_pair = [&](std::int64_t pair) {
    context.insert(context.end(), keys[pair].begin(), keys[pair].end());
    context.push_back(values[pair]);
  };
  const auto second = static_cast<std::int64_t>(options.reassigned * static_cast<double>(pairs));
  for (std::int64_t pair = 0; pair < pairs; ++pair) write_pair(pair);
  for (const std::int64_t pair : choose_distinct(pairs, second, random)) {
    values[pair] = values[pairs + pair];
    write_pair(pair);
  }
  const std::size_t once = context.size();
  for (std::int64_t pass = 1; pass < options.passes; ++pass) {
    context.insert(context.end(), context.begin(), context.begin() + static_cast<std::ptrdiff_t>(once));
  }

  const std::int64_t slot_size = options.key_tokens + 1;
  const std::int64_t slots = (options.length - std::ssize(context)) / slot_size;
  require(std::ssize(context) < options.length && slots >= asked,
          "length is {}; expected at least {} for {} pairs and {} queries", options.length,
          std::ssize(context) + asked * slot_size, pairs, asked);

  MqarTask task;
  task.tokens = context;
  while (std::ssize(task.tokens) < options.length) {
    const std::int64_t filler =
        options.filler_from_values ? half + random.below(options.vocabulary - half) : random.below(options.vocabulary);
    task.tokens.push_back(static_cast<std::int32_t>(filler));
  }
  const std::vector<std::int64_t> asked_pairs = choose_distinct(pairs, asked, random);
  const std::vector<std::int64_t> asked_slots = choose_slots(slots, asked, options.gap_exponent, random);
  std::vector<std::pair<std::int64_t, std::int64_t>> order;  // slot, pair
  for (std::int64_t i = 0; i < asked; ++i) order.emplace_back(asked_slots[i], asked_pairs[i]);
  std::sort(order.begin(), order.end());
  for (const auto& [slot, pair] : order) {
    const std::int64_t begin = std::ssize(context) + slot * slot_size;
    std::copy(keys[pair].begin(), keys[pair].end(), task.tokens.begin() + begin);
    task.query_positions.push_back(begin + options.key_tokens - 1);
    task.answers.push_back(values[pair]);
  }
  return task;
}

double mqar_accuracy(const MqarTask& task, const std::vector<std::int32_t>& predictions) {
  require(predictions.size() == task.answers.size(), "{} predictions for {} queries", predictions.size(),
          task.answers.size());
  std::int64_t right = 0;
  for (std::size_t i = 0; i < predictions.size(); ++i) right += predictions[i] == task.answers[i] ? 1 : 0;
  return static_cast<double>(right) / static_cast<double>(predictions.size());
}

}  // namespace tessera::eval
