// Unigram language model (arXiv:1804.10959): the cut of a word whose tokens have the highest sum of log-probabilities.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/text/word_model.h"

namespace tessera::model::text {

class Unigram : public WordModel {
 public:
  /// Pieces and scores by id. Unknown characters, which score ten below the lowest, join into one piece and become
  /// their bytes if that is wanted and all have tokens, else `unknown`. `ids` must outlive the model.
  Unigram(std::span<const std::string> pieces, std::vector<double> scores, std::optional<std::int32_t> unknown,
          bool byte_fallback, const IdOfToken& ids);
  /// Throws Error for unknown characters if the model has no token for them.
  void encode(std::string_view word, std::vector<std::int32_t>& ids) const override;

 private:
  /// A node of the trie of pieces: children lie sorted by byte.
  struct Node {
    std::int32_t piece = -1;
    std::uint32_t first_child = 0;
    std::uint32_t children = 0;
  };
  void build(std::span<const std::pair<std::string_view, std::int32_t>> sorted);
  void add_piece(std::string_view piece, bool unknown, std::vector<std::int32_t>& ids) const;

  std::vector<Node> nodes_;
  std::vector<unsigned char> labels_;  ///< of each node
  std::vector<double> scores_;
  std::optional<std::int32_t> unknown_;
  bool byte_fallback_;
  double unknown_score_ = 0;
  const IdOfToken& ids_;
  std::vector<std::int32_t> byte_ids_;
};

}  // namespace tessera::model::text
