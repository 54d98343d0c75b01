// Per-head patterns of MInference: the configuration files of its offline search.
#pragma once

#include <cstdint>
#include <map>
#include <string_view>
#include <vector>

#include "io/json.h"
#include "methods/parameters.h"

namespace tessera {

/// Pattern of one (layer, query head) and its two sizes.
struct HeadPattern {
  enum class Kind : std::uint8_t {
    vertical_and_slash,  ///< first = columns v, second = offsets sl
    stream_llm,          ///< A-shape: first = n_init, second = n_local
    block_sparse         ///< sizes unused: the block count is the method's own
  };
  Kind kind = Kind::vertical_and_slash;
  std::int64_t first = 0;
  std::int64_t second = 0;
  friend bool operator==(const HeadPattern&, const HeadPattern&) = default;
};

/// [layer] -> query head -> pattern.
using HeadPatterns = std::vector<std::map<std::int64_t, HeadPattern>>;

/// Reads a document in the format of MInference: an array with one object per layer,
/// {"0": ["vertical_and_slash", 1000, 6096, 0.93], ...}: pattern, two sizes, and the score the search gave it (not
/// used). "stream_llm" may also be written "a_shape". Throws Error naming layer and head of anything else.
HeadPatterns read_head_patterns(const Configuration& configuration);
/// One entry of such a document; `where` begins the messages.
HeadPattern head_pattern_of(const Json& value, std::string_view where);
Json head_pattern_json(const HeadPattern& pattern, double score);

}  // namespace tessera
