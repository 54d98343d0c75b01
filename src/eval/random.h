// Random numbers with random access: a generator is a hash of what it is for, so any row can be made on its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numbers>
#include <span>

namespace tessera::eval {

/// splitmix64 started at a hash of (seed, stream...). Streams name the purpose, the head, the row, ...
class Random {
 public:
  Random(std::uint64_t seed, std::initializer_list<std::int64_t> stream) : state_(mix(seed + golden_step)) {
    for (const std::int64_t part : stream) state_ = mix((state_ ^ static_cast<std::uint64_t>(part)) + golden_step);
  }

  std::uint64_t next() { return mix(state_ += golden_step); }
  /// [0, 1) with 53 random bits.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  /// [0, count); the bias of the product is below count / 2^32.
  std::int64_t below(std::int64_t count) {
    return static_cast<std::int64_t>(((next() >> 32) * static_cast<std::uint64_t>(count)) >> 32);
  }
  float normal() {
    float pair[2];
    normal_pair(pair);
    return pair[0];
  }
  /// out[i] += scale * standard normal.
  void add_normal(std::span<float> out, float scale) {
    float pair[2];
    std::size_t i = 0;
    for (; i + 1 < out.size(); i += 2) {
      normal_pair(pair);
      out[i] += scale * pair[0];
      out[i + 1] += scale * pair[1];
    }
    if (i < out.size()) out[i] += scale * normal();
  }

 private:
  static constexpr std::uint64_t golden_step = 0x9e3779b97f4a7c15;

  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  /// Box-Muller from the two halves of one draw.
  void normal_pair(float* pair) {
    const std::uint64_t bits = next();
    const float u = static_cast<float>((bits >> 40) + 1) * 0x1p-24F;
    const float angle = static_cast<float>(bits & 0xffffff) * (0x1p-24F * 2 * std::numbers::pi_v<float>);
    const float radius = std::sqrt(-2 * std::log(u));
    pair[0] = radius * std::cos(angle);
    pair[1] = radius * std::sin(angle);
  }

  std::uint64_t state_;
};

}  // namespace tessera::eval
