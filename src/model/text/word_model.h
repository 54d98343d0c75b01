// What turns words into token ids: byte-pair encoding or a unigram model.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace tessera::model::text {

/// Lets maps of strings be asked with views.
struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
using IdOfToken = std::unordered_map<std::string, std::int32_t, StringHash, std::equal_to<>>;

/// Immutable and thread-safe.
class WordModel {
 public:
  WordModel() = default;
  WordModel(const WordModel&) = delete;
  WordModel& operator=(const WordModel&) = delete;
  virtual ~WordModel() = default;
  /// Appends the ids of a non-empty word.
  virtual void encode(std::string_view word, std::vector<std::int32_t>& ids) const = 0;
};

/// The ids of the 256 byte tokens "<0x00>" to "<0xFF>", -1 where there is none.
std::vector<std::int32_t> byte_token_ids(const IdOfToken& ids);

}  // namespace tessera::model::text
