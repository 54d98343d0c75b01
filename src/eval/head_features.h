// One key/value head of the generator: its random choices, and the query, key and value rows that follow from them.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "eval/archetypes.h"
#include "eval/random.h"

namespace tessera::eval {

/// What the heads of one call have in common.
struct HeadSetting {
  std::uint64_t seed = 0;
  std::int64_t tokens = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  bool causal = true;
  bool rotate = true;
  double group_correlation = 1;
  std::array<std::int64_t, 3> grid{};  ///< frames, height, width; the tokens beyond it are text. 0: no grid
  std::int64_t grid_tokens() const { return grid[0] * grid[1] * grid[2]; }
};

/// Logits are sums of features in orthogonal sub-spaces of the head dim, so that a product of real Q and K sees them.
/// At head_dim 128: 1 dim for sinks and verticals, 32 for position (16 pairs), 32 for topics, 32 for retrieval codes,
/// 31 for background; other dims scale the three middle ones to a quarter each and give the rest to the background.
struct Subspaces {
  explicit Subspaces(std::int64_t head_dim);
  std::int64_t pairs;
  std::int64_t topic;
  std::int64_t retrieval;
  std::int64_t background;
  std::int64_t topic_at;
  std::int64_t retrieval_at;
  std::int64_t background_at;
};

/// Immutable once built; rows may be made in any order by many threads. Memory is O(tokens * head_dim).
class FeatureHead {
 public:
  static constexpr std::int64_t topic_count = 64;
  static constexpr std::int64_t anchor_run = 8;
  static constexpr std::int64_t sink_tokens = 4;

  /// `index` numbers the head among all (batch, kv head) of the call.
  FeatureHead(const Archetype& archetype, const HeadSetting& setting, std::int64_t index);

  /// out [count, head_dim]: keys [first, first + count).
  void keys(std::int64_t first, std::int64_t count, std::span<float> out) const;
  /// out [count, value_dim].
  void values(std::int64_t first, std::int64_t count, std::span<float> out) const;
  /// Queries of one member of the group, scaled so that q.k / sqrt(head_dim) has the archetype's amplitudes.
  void queries(std::int64_t member_index, std::int64_t first, std::int64_t count, std::span<float> out) const;

 private:
  /// What a query head of the group multiplies its features by; member 0 is the archetype itself.
  struct Member {
    std::int64_t index;
    double column = 1;
    double position = 1;
    double topic = 1;
    double retrieval = 1;
  };

  Member member_of(std::int64_t index) const;
  void make_frequencies();
  void make_columns();
  void make_topics();
  void make_anchors();
  void make_disguise();
  bool is_text(std::int64_t token) const { return archetype_.video() && token >= setting_.grid_tokens(); }
  /// Frame, row and column of a token; (token, 0, 0) without a grid.
  std::array<double, 3> place_of(std::int64_t token) const;
  /// Adds weight * (cos, sin) pairs of a token moved by `shift` tokens.
  void add_position(std::int64_t token, std::int64_t shift, double weight, float* out) const;
  void key_features(std::int64_t token, float* out) const;
  void query_features(const Member& chosen, std::int64_t token, float* out) const;
  void add_targets(const Member& chosen, std::int64_t token, float* out) const;
  Random random(int purpose, std::int64_t a = 0, std::int64_t b = 0) const;

  Archetype archetype_;
  HeadSetting setting_;
  std::int64_t index_;
  Subspaces spaces_;
  float background_scale_;
  std::vector<std::array<double, 3>> frequencies_;  ///< [pairs], per axis; axis 0 alone without a grid
  std::vector<float> column_;                       ///< [tokens]: coordinate of the key on the first dim
  std::vector<std::uint8_t> topic_;                 ///< [tokens]
  std::vector<float> centroids_;                    ///< [topics, spaces.topic], unit rows
  std::vector<float> topic_values_;                 ///< [topics, value_dim]
  std::vector<std::int64_t> anchors_;               ///< first tokens of the anchor runs, ascending
  std::vector<float> codes_;                        ///< [anchors, spaces.retrieval], unit rows
  std::vector<float> rotation_;                     ///< [head_dim, head_dim]; empty: none
  std::vector<float> constant_;                     ///< [head_dim]: added to every key
};

}  // namespace tessera::eval
