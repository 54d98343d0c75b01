// Byte-pair encoding: the characters of a word are joined pair by pair, the pair of the lowest rank first.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/text/word_model.h"

namespace tessera::model::text {

/// Pairs of ids with their rank and what they become. Open addressing: a word asks for several pairs per character.
class MergeTable {
 public:
  struct Merge {
    std::uint32_t rank;
    std::int32_t id;
  };
  explicit MergeTable(std::size_t expected = 0);
  /// The last entry of a pair counts.
  void set(std::int32_t left, std::int32_t right, Merge merge);
  /// Null if the pair does not merge.
  const Merge* find(std::int32_t left, std::int32_t right) const {
    const std::uint64_t key = key_of(left, right);
    for (std::size_t place = place_of(key);; place = (place + 1) & mask_) {
      if (keys_[place] == key) return &merges_[place];
      if (keys_[place] == empty_key) return nullptr;
    }
  }

 private:
  static constexpr std::uint64_t empty_key = ~std::uint64_t{0};  // no pair of ids from 0 on
  static std::uint64_t key_of(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }
  std::size_t place_of(std::uint64_t key) const {
    key *= 0x9E3779B97F4A7C15U;
    return static_cast<std::size_t>(key ^ key >> 32) & mask_;
  }
  std::vector<std::uint64_t> keys_;
  std::vector<Merge> merges_;
  std::size_t mask_;
  std::size_t used_ = 0;
};

struct BpeOptions {
  std::optional<std::int32_t> unknown = {};    ///< of characters without a token; absent: they vanish
  bool fuse_unknown = false;                   ///< neighbouring unknown characters become one token
  bool byte_fallback = false;                  ///< characters without a token become their bytes
  bool ignore_merges = false;                  ///< a word that is a token is that token
  std::string continuing_subword_prefix = {};  ///< of every character but the first
  std::string end_of_word_suffix = {};         ///< of the last character
};

class Bpe : public WordModel {
 public:
  /// `ids` must outlive the model.
  Bpe(const IdOfToken& ids, MergeTable merges, BpeOptions options);
  void encode(std::string_view word, std::vector<std::int32_t>& ids) const override;

 private:
  struct Symbol {
    std::int32_t id;
    std::int32_t previous;
    std::int32_t next;
    bool merged;
  };
  void add_characters(std::string_view word, std::vector<Symbol>& symbols) const;
  void merge(std::vector<Symbol>& symbols) const;

  const IdOfToken& ids_;
  MergeTable merges_;
  BpeOptions options_;
  std::vector<std::int32_t> byte_ids_;
};

/// The merges that sentencepiece models of type BPE mean by their scores: any two tokens whose joined text is a token
/// may merge, the one of the highest score first, the leftmost among equals. `scores[id]`; tokens that are not
/// `mergeable[id]` neither merge nor come out of merges.
MergeTable merges_of_scores(std::span<const std::string> tokens, const IdOfToken& ids, std::span<const float> scores,
                            const std::vector<bool>& mergeable);

}  // namespace tessera::model::text
