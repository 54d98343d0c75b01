// Multi-query associative recall (zoology, arXiv 2312.04927): key-value pairs first, the keys asked again later.
#pragma once

#include <cstdint>
#include <vector>

namespace tessera::eval {

struct MqarOptions {
  std::int64_t length = 1024;
  std::int64_t pairs = 64;
  std::int64_t queries = 0;        ///< keys asked, at most pairs; 0 = pairs
  std::int64_t vocabulary = 8192;  ///< keys from its lower half, values from its upper half
  double gap_exponent = 0.01;      ///< a: chance of gap g (in slots of two after the context) ~ g^(a-1); 1: uniform
  bool filler_from_values = true;  ///< gaps hold value tokens only; false: any token
  std::int64_t key_tokens = 1;     ///< 2: compositional; a key is a pair (a, b) on a grid, neither half decides alone
  double reassigned = 0;           ///< forgetting: share of the keys given a second, last value in the context
  std::int64_t passes = 1;         ///< the context is repeated this often
  std::uint64_t seed = 0;
};

struct MqarTask {
  std::vector<std::int32_t> tokens;           ///< [length]
  std::vector<std::int64_t> query_positions;  ///< ascending: last token of an asked key
  std::vector<std::int32_t> answers;          ///< the value expected there
};

/// Sample k of a set uses seed + k. Throws Error when the pairs do not fit the length or the vocabulary.
MqarTask make_mqar(const MqarOptions& options);

/// Share of right answers.
double mqar_accuracy(const MqarTask& task, const std::vector<std::int32_t>& predictions);

}  // namespace tessera::eval
