// Quantised rows: errors within half a step, exact cases, groups, what is not finite, memory.
#include "cache/quantized_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace tessera {
namespace {

using Side = QuantizedSide;
using Scales = QuantizedScales;

struct Rows {
  std::int64_t heads, tokens, dim;
  std::vector<float> numbers;

  Rows(std::int64_t head_count, std::int64_t token_count, std::int64_t dims, std::uint32_t seed = 1)
      : heads(head_count), tokens(token_count), dim(dims) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < heads * tokens * dim; ++i) {
      // Channels of very different size, as keys have them.
      numbers.push_back(normal(random) * (i % dim % 5 == 0 ? 20.0F : 1.0F) + static_cast<float>(i % dim % 3));
    }
  }
  float& at(std::int64_t head, std::int64_t token, std::int64_t d) {
    return numbers[static_cast<std::size_t>((head * tokens + token) * dim + d)];
  }
  QuantizedStore::ReadRow reader(std::int64_t first = 0) {
    return [this, first](std::int64_t head, std::int64_t token, float* row) {
      for (std::int64_t d = 0; d < dim; ++d) row[d] = at(head, first + token, d);
    };
  }
};

struct Case {
  Side side;
  QuantizedFormat format;
};

std::vector<Case> cases() {
  std::vector<Case> list;
  for (const int bits : {2, 3, 4, 8}) {
    for (const Side side : {Side::keys, Side::values}) {
      list.push_back({side, {.bits = bits, .scales = Scales::channel}});
      list.push_back({side, {.bits = bits, .scales = Scales::token}});
      list.push_back({side, {.bits = bits, .scales = Scales::token, .channel_factors = true}});
      list.push_back({side, {.bits = bits, .scales = Scales::token_of_layer, .channel_factors = true}});
      const Scales usual = side == Side::keys ? Scales::channel : Scales::token;
      for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        list.push_back({side, {.bits = bits, .scales = usual, .group = 32, .scale_dtype = dtype}});
      }
    }
  }
  return list;
}

/// The width of a step by definition: range of the numbers that share it, in units of the channel's factor.
class Steps {
 public:
  Steps(Rows& rows, const QuantizedFormat& format) : rows_(rows), format_(format) {}

  double factor(std::int64_t head, std::int64_t d) const {
    if (!format_.channel_factors) return 1;
    double largest = 0;
    for (std::int64_t t = 0; t < rows_.tokens; ++t)
      largest = std::max(largest, std::fabs(double{rows_.at(head, t, d)}));
    return largest > 0 ? std::sqrt(largest) : 1;
  }
  double step(std::int64_t head, std::int64_t token, std::int64_t d) const {
    const bool channel = format_.scales == Scales::channel;
    const std::int64_t size = format_.group > 0 ? format_.group : INT64_MAX / 2;
    const auto shares = [&](std::int64_t h, std::int64_t t, std::int64_t c) {
      if (h != head && format_.scales != Scales::token_of_layer) return false;
      return channel ? c == d && t / size == token / size : t == token && c / size == d / size;
    };
    double low = std::numeric_limits<double>::infinity();
    double high = -low;
    for (std::int64_t h = 0; h < rows_.heads; ++h) {
      for (std::int64_t t = 0; t < rows_.tokens; ++t) {
        for (std::int64_t c = 0; c < rows_.dim; ++c) {
          if (!shares(h, t, c)) continue;
          const double x = rows_.at(h, t, c) / factor(h, c);
          low = std::min(low, x);
          high = std::max(high, x);
        }
      }
    }
    return (high - low) / ((1 << format_.bits) - 1);
  }

 private:
  Rows& rows_;
  const QuantizedFormat& format_;
};

TEST(QuantizedStore, ErrorsAreHalfAStepAtMost) {
  for (const Case& c : cases()) {
    for (const auto& [tokens, dim] : {std::pair{1, 5}, {37, 33}, {130, 8}}) {
      Rows rows(2, tokens, dim);
      QuantizedStore store(c.side, 2, dim, c.format);
      store.append(tokens, rows.reader(), 2);
      const Steps steps(rows, c.format);
      // Scales of 16 bits are rounded outward: the step, and the minimum, which then widens the range.
      const double epsilon = c.format.scale_dtype == DType::bf16  ? 0x1p-7
                             : c.format.scale_dtype == DType::f16 ? 0x1p-10
                                                                  : 0x1p-20;
      const double widest = 100 * epsilon / ((1 << c.format.bits) - 1);
      double largest = 0;
      for (std::int64_t head = 0; head < 2; ++head) {
        const auto back = store.expand(head, 0);
        for (std::int64_t t = 0; t<tokens; t += tokens> 100 ? 9 : 1) {
          for (std::int64_t d = 0; d < dim; ++d) {
            const double error = std::fabs(double{back[static_cast<std::size_t>(t * dim + d)]} - rows.at(head, t, d));
            const double bound = steps.step(head, t, d) / 2 * steps.factor(head, d);
            ASSERT_LE(error, bound * (1 + 2 * epsilon) + widest)
                << c.format.bits << " bits, head " << head << " token " << t << " " << d;
            largest = std::max(largest, error / (bound + 1e-9));
          }
        }
      }
      if (tokens > 1 && c.format.bits < 8) {
        EXPECT_GT(largest, 0.6);  // the bound is not loose
      }
    }
  }
}

TEST(QuantizedStore, ConstantRowsAndDeadChannelsComeBack) {
  for (const Case& c : cases()) {
    Rows rows(2, 40, 20);
    for (std::int64_t head = 0; head < 2; ++head) {
      for (std::int64_t t = 0; t < 40; ++t) {
        for (std::int64_t d = 0; d < 20; ++d) rows.at(head, t, d) = d == 3 ? 0.0F : 2.25F;
        if (c.format.scales == Scales::token && !c.format.channel_factors) rows.at(head, t, 3) = 2.25F;
        if (c.format.scales == Scales::token_of_layer) rows.at(head, t, 3) = 2.25F;
      }
    }
    QuantizedStore store(c.side, 2, 20, c.format);
    store.append(40, rows.reader(), 1);
    for (std::int64_t head = 0; head < 2; ++head) {
      const auto back = store.expand(head, 0);
      for (std::int64_t i = 0; i < 800; ++i) {
        ASSERT_FLOAT_EQ(back[static_cast<std::size_t>(i)], rows.at(head, i / 20, i % 20)) << c.format.bits << " " << i;
      }
    }
  }
}

TEST(QuantizedStore, AppendingWholeGroupsInPartsStoresTheSame) {
  Rows rows(2, 96, 10);
  const QuantizedFormat format{.bits = 3, .scales = Scales::channel, .group = 32, .scale_dtype = DType::f16};
  QuantizedStore whole(Side::keys, 2, 10, format);
  QuantizedStore parts(Side::keys, 2, 10, format);
  whole.append(96, rows.reader(), 1);
  parts.append(32, rows.reader(), 1);
  parts.append(64, rows.reader(32), 1);
  ASSERT_EQ(parts.batches(), 2U);
  EXPECT_EQ(parts.tokens(), 96);
  for (std::int64_t head = 0; head < 2; ++head) {
    auto joined = parts.expand(head, 0);
    const auto second = parts.expand(head, 1);
    joined.insert(joined.end(), second.begin(), second.end());
    EXPECT_EQ(joined, whole.expand(head, 0));
  }
}

TEST(QuantizedStore, WhatIsNotFiniteSpoilsItsScaleAlone) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Rows rows(2, 40, 20);
    rows.at(1, 17, 4) = bad;
    QuantizedStore keys(Side::keys, 2, 20, {.bits = 4, .scales = Scales::channel});
    keys.append(40, rows.reader(), 1);
    QuantizedStore values(Side::values, 2, 20, {.bits = 4, .scales = Scales::token, .channel_factors = true});
    values.append(40, rows.reader(), 1);
    for (std::int64_t head = 0; head < 2; ++head) {
      const auto k = keys.expand(head, 0);
      const auto v = values.expand(head, 0);
      for (std::int64_t t = 0; t < 40; ++t) {
        for (std::int64_t d = 0; d < 20; ++d) {
          const auto i = static_cast<std::size_t>(t * 20 + d);
          EXPECT_EQ(std::isnan(k[i]), head == 1 && d == 4);
          EXPECT_EQ(std::isnan(v[i]), head == 1 && t == 17);
        }
      }
    }
  }
}

TEST(QuantizedStore, TakesTheMemoryOfItsBits) {
  constexpr std::int64_t tokens = 4096, dim = 128, heads = 2;
  Rows rows(heads, tokens, dim);
  for (const int bits : {2, 3, 4, 8}) {
    constexpr std::int64_t numbers = heads * tokens * dim;
    QuantizedStore keys(Side::keys, heads, dim, {.bits = bits, .scales = Scales::channel});
    keys.append(tokens, rows.reader(), 2);
    EXPECT_EQ(keys.memory_bytes(), static_cast<std::size_t>(numbers * bits / 8 + 2 * 4 * heads * dim));
    QuantizedStore values(Side::values, heads, dim,
                          {.bits = bits, .scales = Scales::token_of_layer, .channel_factors = true});
    values.append(tokens, rows.reader(), 2);
    // A factor per channel and two numbers per token, whatever the number of heads.
    EXPECT_EQ(values.memory_bytes(), static_cast<std::size_t>(numbers * bits / 8 + 4 * heads * dim + 2 * 4 * tokens));
    keys.clear();
    EXPECT_EQ(keys.memory_bytes(), 0U);
    EXPECT_EQ(keys.tokens(), 0);
  }
}

TEST(QuantizedStore, RefusesFormatsItDoesNotHave) {
  const auto make = [](Side side, const QuantizedFormat& format) { QuantizedStore store(side, 1, 16, format); };
  EXPECT_THROW(make(Side::keys, {.bits = 5}), Error);
  EXPECT_THROW(make(Side::keys, {.group = 48}), Error);
  EXPECT_THROW(make(Side::keys, {.scales = Scales::token, .group = 32}), Error);
  EXPECT_THROW(make(Side::values, {.scales = Scales::channel, .group = 32}), Error);
  EXPECT_THROW(make(Side::keys, {.scales = Scales::channel, .channel_factors = true}), Error);
  EXPECT_THROW(make(Side::keys, {.scale_dtype = DType::f64}), Error);
}

}  // namespace
}  // namespace tessera
