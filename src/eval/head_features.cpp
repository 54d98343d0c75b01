#include "eval/head_features.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "eval/matrix.h"

namespace tessera::eval {
namespace {

constexpr double kMeanSegment = 256;       // tokens of one topic
constexpr double kDesignTokens = 16384;    // length for which slash distances are given
constexpr std::int64_t kMemberBlock = 64;  // queries of a group member that agree or disagree with the group
constexpr float kTopicNoise = 0.05F;
constexpr std::int64_t kFieldWaves = 48;  // cosine waves of the smooth topic field over a grid

/// What a stream of random numbers is for.
enum Purpose : int {
  frequencies,
  columns,
  segments,
  scattering,
  centroids,
  topic_means,
  anchor_runs,
  anchor_codes,
  rotation,
  constant,
  member,
  key_row,
  value_row,
  query_row,
  member_topic,
  target_choice
};

void make_unit_rows(std::span<float> rows, std::int64_t width, Random random) {
  std::fill(rows.begin(), rows.end(), 0.0F);
  for (std::size_t at = 0; at < rows.size(); at += width) {
    const std::span<float> row = rows.subspan(at, width);
    random.add_normal(row, 1);
    const float norm = std::sqrt(std::inner_product(row.begin(), row.end(), row.begin(), 0.0F));
    for (float& value : row) value /= norm;
  }
}

/// |z| below which a standard normal stays with probability p.
double half_normal_quantile(double p) {
  double low = 0;
  double high = 8;
  for (int step = 0; step < 60; ++step) {
    const double middle = (low + high) / 2;
    (std::erf(middle / std::numbers::sqrt2) < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

}  // namespace

Subspaces::Subspaces(std::int64_t head_dim)
    : pairs(head_dim / 8),
      topic(head_dim / 4),
      retrieval(head_dim / 4),
      background(head_dim - 1 - 2 * pairs - topic - retrieval),
      topic_at(1 + 2 * pairs),
      retrieval_at(topic_at + topic),
      background_at(retrieval_at + retrieval) {}

FeatureHead::FeatureHead(const Archetype& archetype, const HeadSetting& setting, std::int64_t index)
    : archetype_(archetype), setting_(setting), index_(index), spaces_(setting.head_dim) {
  // Two independent normal vectors of this scale have a product of unit variance.
  background_scale_ = static_cast<float>(std::pow(static_cast<double>(spaces_.background), -0.25));
  make_frequencies();
  make_columns();
  make_topics();
  make_anchors();
  make_disguise();
}

Random FeatureHead::random(int purpose, std::int64_t a, std::int64_t b) const {
  return {setting_.seed, {purpose, index_, a, b}};
}

void FeatureHead::make_frequencies() {
  Random draw = random(frequencies);
  const double pairs = static_cast<double>(spaces_.pairs);
  for (std::int64_t f = 0; f < spaces_.pairs; ++f) {
    std::array<double, 3> w{};
    switch (archetype_.kernel) {
      case PositionKernel::none:
        return;
      case PositionKernel::band:
        w[0] = half_normal_quantile((static_cast<double>(f) + 0.5) / pairs) / archetype_.sigma;
        break;
      case PositionKernel::power_law:
        // Log-spaced from 1 down to 1 / N: the mean cosine falls linearly in log distance.
        w[0] = std::pow(static_cast<double>(setting_.tokens), -(static_cast<double>(f) + draw.uniform()) / pairs);
        break;
      case PositionKernel::grid:
        for (int axis = 0; axis < 3; ++axis) w[axis] = draw.normal() / archetype_.grid_sigma[axis];
        break;
    }
    frequencies_.push_back(w);
  }
}

void FeatureHead::make_columns() {
  column_.assign(setting_.tokens, 0.0F);
  Random draw = random(columns);
  for (std::int64_t j = 0; j < setting_.tokens; ++j) {
    const bool chosen = draw.uniform() < archetype_.vertical_share;
    const double height = draw.uniform(0.8, 1);
    if (j < sink_tokens && archetype_.sink > 0) {
      column_[j] = static_cast<float>(archetype_.sink);
    } else if (is_text(j)) {
      column_[j] = static_cast<float>(archetype_.text);
    } else if (chosen) {
      column_[j] = static_cast<float>(archetype_.vertical * height);
    }
  }
}

void FeatureHead::make_topics() {
  topic_.resize(setting_.tokens);
  Random draw = random(segments);
  if (archetype_.video()) {
    // Level sets of a smooth random field over the grid: clusters that no raster order makes contiguous.
    std::vector<std::array<double, 4>> waves(kFieldWaves);
    for (auto& wave : waves) {
      for (int axis = 0; axis < 3; ++axis) wave[axis] = draw.normal() / (2 * archetype_.grid_sigma[axis]);
      wave[3] = draw.uniform(0, 2 * std::numbers::pi);
    }
    for (std::int64_t j = 0; j < setting_.tokens; ++j) {
      const std::array<double, 3> at = place_of(j);
      double field = 0;
      for (const auto& wave : waves) field += std::cos(wave[0] * at[0] + wave[1] * at[1] + wave[2] * at[2] + wave[3]);
      // The sum of many waves is near normal with variance waves / 2; its distribution function spreads the levels.
      const double level = 0.5 * std::erfc(-field / std::sqrt(static_cast<double>(kFieldWaves)));
      topic_[j] = static_cast<std::uint8_t>(std::min(level * topic_count, topic_count - 1.0));
    }
  } else {
    std::int64_t now = draw.below(topic_count);
    for (std::int64_t j = 0; j < setting_.tokens; ++j) {
      if (draw.uniform() * kMeanSegment < 1) now = draw.below(topic_count);
      topic_[j] = static_cast<std::uint8_t>(now);
    }
  }
  if (archetype_.scatter > 0) {
    Random shuffle = random(scattering);
    std::vector<std::int64_t> moved;
    for (std::int64_t j = 0; j < setting_.tokens; ++j) {
      if (shuffle.uniform() < archetype_.scatter) moved.push_back(j);
    }
    for (std::int64_t i = static_cast<std::int64_t>(moved.size()) - 1; i > 0; --i) {
      std::swap(topic_[moved[i]], topic_[moved[shuffle.below(i + 1)]]);
    }
  }
  centroids_.resize(topic_count * spaces_.topic);
  make_unit_rows(centroids_, spaces_.topic, random(centroids));
  topic_values_.resize(topic_count * setting_.value_dim);
  random(topic_means).add_normal(topic_values_, 1);
}

void FeatureHead::make_anchors() {
  if (archetype_.retrieval == 0) return;
  Random draw = random(anchor_runs);
  for (std::int64_t first = 0; first + anchor_run <= setting_.tokens; first += anchor_run) {
    if (draw.uniform() < archetype_.anchor_share) anchors_.push_back(first);
  }
  codes_.resize(anchors_.size() * spaces_.retrieval);
  make_unit_rows(codes_, spaces_.retrieval, random(anchor_codes));
}

void FeatureHead::make_disguise() {
  const std::int64_t dim = setting_.head_dim;
  if (setting_.rotate) rotation_ = random_orthogonal(dim, random(rotation));
  // Root mean square of a key channel: the unit of the large channels.
  double power = 1 + background_scale_ * background_scale_ * static_cast<double>(spaces_.background);
  if (archetype_.kernel != PositionKernel::none) power += 1;
  const double unit = std::sqrt(power / static_cast<double>(dim));
  constant_.assign(dim, 0.0F);
  Random draw = random(constant);
  draw.add_normal(constant_, static_cast<float>(0.5 * unit));
  for (int large = 0; large < 4; ++large) {
    const double sign = draw.uniform() < 0.5 ? -1 : 1;
    constant_[draw.below(dim)] = static_cast<float>(sign * draw.uniform(6, 20) * unit);
  }
}

FeatureHead::Member FeatureHead::member_of(std::int64_t index) const {
  Member chosen{.index = index};
  if (index == 0) return chosen;
  Random draw = random(member, index);
  for (double* factor : {&chosen.column, &chosen.position, &chosen.topic, &chosen.retrieval}) {
    *factor = draw.uniform(0.8, 1.2);
  }
  return chosen;
}

std::array<double, 3> FeatureHead::place_of(std::int64_t token) const {
  if (!archetype_.video()) return {static_cast<double>(token), 0, 0};
  const std::int64_t frame = token / (setting_.grid[1] * setting_.grid[2]);
  const std::int64_t row = token / setting_.grid[2] % setting_.grid[1];
  const std::int64_t column = token % setting_.grid[2];
  return {static_cast<double>(frame), static_cast<double>(row), static_cast<double>(column)};
}

void FeatureHead::add_position(std::int64_t token, std::int64_t shift, double weight, float* out) const {
  if (frequencies_.empty() || is_text(token)) return;
  const std::array<double, 3> at = place_of(token - shift);
  for (std::size_t f = 0; f < frequencies_.size(); ++f) {
    const auto& w = frequencies_[f];
    const double angle = w[0] * at[0] + w[1] * at[1] + w[2] * at[2];
    out[2 * f] += static_cast<float>(weight * std::cos(angle));
    out[2 * f + 1] += static_cast<float>(weight * std::sin(angle));
  }
}

void FeatureHead::key_features(std::int64_t token, float* out) const {
  Random draw = random(key_row, token);
  out[0] = column_[token];
  // Keys and queries share the weight 1 / pairs of the position kernel evenly.
  add_position(token, 0, 1 / std::sqrt(static_cast<double>(spaces_.pairs)), out + 1);
  draw.add_normal({out + spaces_.background_at, static_cast<std::size_t>(spaces_.background)}, background_scale_);
  // Keys tell their topic whether or not this head asks for it: content that page bounds and quantisers meet.
  if (!is_text(token)) {
    float* part = out + spaces_.topic_at;
    std::copy_n(centroids_.data() + topic_[token] * spaces_.topic, spaces_.topic, part);
    draw.add_normal({part, static_cast<std::size_t>(spaces_.topic)}, kTopicNoise);
  }
  if (!anchors_.empty()) {
    const auto after = std::upper_bound(anchors_.begin(), anchors_.end(), token);
    if (after != anchors_.begin() && token - *(after - 1) < anchor_run) {
      const std::int64_t run = after - anchors_.begin() - 1;
      std::copy_n(codes_.data() + run * spaces_.retrieval, spaces_.retrieval, out + spaces_.retrieval_at);
    }
  }
}

void FeatureHead::add_targets(const Member& chosen, std::int64_t token, float* out) const {
  if (anchors_.empty()) return;
  const std::int64_t block = token / archetype_.coherence;
  bool shared = chosen.index == 0;
  if (!shared) shared = random(member, chosen.index, 1 + block).uniform() < setting_.group_correlation;
  Random draw = random(target_choice, block, shared ? 0 : chosen.index);
  if (draw.uniform() >= archetype_.active_share) return;
  std::int64_t known = static_cast<std::int64_t>(anchors_.size());
  if (setting_.causal) {
    // All queries of the block must be able to see a target.
    const std::int64_t last_start = block * archetype_.coherence - anchor_run;
    known = std::upper_bound(anchors_.begin(), anchors_.end(), last_start) - anchors_.begin();
  }
  if (known == 0) return;
  const float amplitude = static_cast<float>(archetype_.retrieval * chosen.retrieval);
  for (std::int64_t t = 0; t < archetype_.targets; ++t) {
    const float* code = codes_.data() + draw.below(known) * spaces_.retrieval;
    for (std::int64_t c = 0; c < spaces_.retrieval; ++c) out[spaces_.retrieval_at + c] += amplitude * code[c];
  }
}

void FeatureHead::query_features(const Member& chosen, std::int64_t token, float* out) const {
  Random draw = random(query_row, token, chosen.index);
  out[0] = static_cast<float>((0.9 + 0.1 * draw.normal()) * chosen.column);
  draw.add_normal({out + spaces_.background_at, static_cast<std::size_t>(spaces_.background)}, background_scale_);
  const double share = chosen.position / std::sqrt(static_cast<double>(spaces_.pairs));
  if (archetype_.position > 0) add_position(token, 0, archetype_.position * share, out + 1);
  const double shrink = std::min(1.0, static_cast<double>(setting_.tokens) / kDesignTokens);
  for (const Slash& slash : archetype_.slashes) {
    const auto distance = static_cast<std::int64_t>(std::lround(static_cast<double>(slash.distance) * shrink));
    add_position(token, distance, slash.amplitude * share, out + 1);
  }
  if (archetype_.topic > 0 && !is_text(token)) {
    std::int64_t label = topic_[token];
    if (chosen.index > 0) {
      Random other = random(member_topic, chosen.index, token / kMemberBlock);
      const bool agrees = other.uniform() < setting_.group_correlation;
      if (!agrees) label = other.below(topic_count);
    }
    const float amplitude = static_cast<float>(archetype_.topic * chosen.topic);
    const float* centroid = centroids_.data() + label * spaces_.topic;
    for (std::int64_t c = 0; c < spaces_.topic; ++c) out[spaces_.topic_at + c] = amplitude * centroid[c];
  }
  add_targets(chosen, token, out);
}

void FeatureHead::keys(std::int64_t first, std::int64_t count, std::span<float> out) const {
  const std::int64_t dim = setting_.head_dim;
  std::vector<float> features(count * dim, 0.0F);
  for (std::int64_t i = 0; i < count; ++i) key_features(first + i, features.data() + i * dim);
  if (rotation_.empty()) {
    std::copy(features.begin(), features.end(), out.begin());
  } else {
    multiply_rows(features.data(), count, dim, rotation_.data(), dim, out.data(), dim);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t c = 0; c < dim; ++c) out[i * dim + c] += constant_[c];
  }
}

void FeatureHead::queries(std::int64_t member_index, std::int64_t first, std::int64_t count,
                          std::span<float> out) const {
  const std::int64_t dim = setting_.head_dim;
  const Member chosen = member_of(member_index);
  std::vector<float> features(count * dim, 0.0F);
  for (std::int64_t i = 0; i < count; ++i) query_features(chosen, first + i, features.data() + i * dim);
  const float scale = std::sqrt(static_cast<float>(dim));
  for (float& value : features) value *= scale;
  if (rotation_.empty()) {
    std::copy(features.begin(), features.end(), out.begin());
  } else {
    multiply_rows(features.data(), count, dim, rotation_.data(), dim, out.data(), dim);
  }
}

void FeatureHead::values(std::int64_t first, std::int64_t count, std::span<float> out) const {
  const std::int64_t dim = setting_.value_dim;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t token = first + i;
    const std::span<float> row = out.subspan(i * dim, dim);
    const float* mean = topic_values_.data() + topic_[token] * dim;
    for (std::int64_t c = 0; c < dim; ++c) row[c] = 0.7F * mean[c];
    random(value_row, token).add_normal(row, 0.7F);
    // Real sinks carry next to nothing.
    if (archetype_.sink > 0 && token < sink_tokens) {
      for (float& value : row) value *= 0.05F;
    }
  }
}

}  // namespace tessera::eval
