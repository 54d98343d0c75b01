// PBS-Attn: the order of the keys, the tiles that pooled scores choose among them, and the own segment.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "methods/masks.h"
#include "score/row_probe.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

/// The text once more, in float64 and with plain loops.
class Reference {
 public:
  Reference(const AttentionCase& input, std::int64_t head, std::int64_t block, std::int64_t segment)
      : input_(input), head_(head), block_(block), segment_(segment), keys_(input.problem.kv_len) {
    const std::int64_t complete = keys_ / segment * segment;
    std::vector<double> weight(static_cast<std::size_t>(keys_), 0.0);
    const std::int64_t queries = input.problem.q_len;
    for (std::int64_t r = std::max<std::int64_t>(0, queries - block); r < queries; ++r) {
      std::vector<double> p;
      for (std::int64_t j = 0; j < complete; ++j) p.push_back(std::exp(dot(r, j) * input.problem.softmax_scale()));
      const double sum = std::accumulate(p.begin(), p.end(), 0.0);
      for (std::int64_t j = 0; j < complete; ++j) weight[j] += p[j] / sum;
    }
    order.resize(static_cast<std::size_t>(keys_));
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t first = 0; first < complete; first += segment) {
      std::stable_sort(order.begin() + first, order.begin() + first + segment,
                       [&](auto a, auto b) { return weight[a] > weight[b]; });
    }
  }

  /// Keys that query n keeps.
  std::set<std::int64_t> kept(std::int64_t n, double threshold) const {
    const std::int64_t offset = keys_ - input_.problem.q_len;
    const std::int64_t tile = n / block_;
    const std::int64_t earlier = (offset + tile * block_) / segment_ * segment_ / block_;
    std::vector<double> score;
    const std::int64_t end = std::min(tile * block_ + block_, input_.problem.q_len);
    for (std::int64_t j = 0; j < earlier; ++j) {
      double mean = 0;
      for (std::int64_t r = tile * block_; r < end; ++r) {
        for (std::int64_t c = j * block_; c < (j + 1) * block_; ++c) mean += dot(r, order[c]);
      }
      mean /= static_cast<double>((end - tile * block_) * block_);
      score.push_back(std::exp(mean * input_.problem.softmax_scale()));
    }
    const double total = std::accumulate(score.begin(), score.end(), 0.0);
    std::vector<std::int64_t> best(score.size());
    std::iota(best.begin(), best.end(), 0);
    std::stable_sort(best.begin(), best.end(), [&](auto a, auto b) { return score[a] > score[b]; });
    std::set<std::int64_t> tiles;
    double sum = 0;
    for (const std::int64_t j : best) {
      if (sum >= threshold * total && threshold < 1) break;
      sum += score[j];
      tiles.insert(j);
    }
    const auto sink = std::find(order.begin(), order.end(), 0) - order.begin();
    std::set<std::int64_t> keys;
    for (std::int64_t place = 0; place < keys_; ++place) {
      const bool own = place >= earlier * block_;
      if (own || tiles.contains(place / block_) || place / block_ == sink / block_) {
        if (order[place] <= offset + n) keys.insert(order[place]);
      }
    }
    return keys;
  }

  std::vector<std::int64_t> order;

 private:
  double dot(std::int64_t n, std::int64_t j) const {
    double sum = 0;
    for (std::int64_t d = 0; d < input_.problem.head_dim; ++d) {
      sum += static_cast<double>(input_.q(0, head_, n, d)) * input_.k(0, head_ / input_.problem.group(), j, d);
    }
    return sum;
  }

  const AttentionCase& input_;
  std::int64_t head_;
  std::int64_t block_;
  std::int64_t segment_;
  std::int64_t keys_;
};

std::set<std::int64_t> keys_of(const HeadMask& mask, std::int64_t query) {
  std::set<std::int64_t> keys;
  for (std::int64_t j = 0; j < mask.keys; ++j) {
    if (mask.at(query, j)) keys.insert(j);
  }
  return keys;
}

TEST(Pbs, FollowsTheTextWithPlainLoops) {
  for (const CaseShape& shape :
       {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 256, .kv_len = 256},
        CaseShape{.name = "tail", .q_len = 300, .kv_len = 300}, CaseShape{.name = "chunk", .q_len = 100, .kv_len = 333},
        CaseShape{.name = "few_queries", .q_len = 7, .kv_len = 200}}) {
    const AttentionCase input(shape);
    for (const auto& [block, segment, threshold] :
         {std::tuple{16, 32, 0.5}, {16, 64, 0.8}, {32, 32, 0.3}, {16, 32, 1.0}, {16, 48, 0.02}}) {
      const auto masks =
          masks_of(fmt::format("pbs:block={},segment={},threshold={}", block, segment, threshold), input);
      for (std::int64_t h = 0; h < shape.q_heads; ++h) {
        const Reference expected(input, h, block, segment);
        for (std::int64_t n = 0; n < shape.q_len; ++n) {
          ASSERT_EQ(keys_of(masks[h], n), expected.kept(n, threshold))
              << shape.name << ", block " << block << ", segment " << segment << ", head " << h << ", query " << n;
        }
      }
    }
  }
}

TEST(Pbs, OrderIsByImportanceInsideSegments) {
  const AttentionCase input({.name = "order", .q_heads = 2, .q_len = 150, .kv_len = 150});
  const Plan plan = make_method("pbs:block=16,segment=64")->plan(input.problem, input.inputs, {});
  ASSERT_EQ(plan.key_order.size(), 2U);
  for (std::int64_t h = 0; h < 2; ++h) {
    const Reference expected(input, h, 16, 64);
    EXPECT_TRUE(std::equal(expected.order.begin(), expected.order.end(), plan.key_order[h].begin())) << h;
    EXPECT_FALSE(std::is_sorted(plan.key_order[h].begin(), plan.key_order[h].begin() + 64));
    EXPECT_TRUE(std::is_sorted(plan.key_order[h].begin() + 128, plan.key_order[h].end())) << "the tail keeps its order";
  }
}

TEST(Pbs, TwoTilesPerSegmentHalveTheTilesOfScatteredHotKeys) {
  // One hot key per tile: unsorted, every tile is as good as any other. Sorted in segments of two tiles, the two hot
  // keys of a segment share its first tile.
  AttentionCase input({.name = "scattered", .q_heads = 1, .q_len = 2048, .kv_len = 2048});
  for (std::int64_t n = 0; n < 2048; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) {
      input.set_q(0, 0, n, d, d == 0 ? 1.0F : 0.0F);
      // Pooled scores see 64 * hot / 128 against 0 for a tile without hot keys.
      input.set_k(0, 0, n, d, d == 0 && n % 32 == 17 ? 400.0F : 0.0F);
    }
  }
  const auto tiles_of_last = [&](const std::string& segment) {
    const auto mask = masks_of("pbs:block=32,threshold=0.99,segment=" + segment, input)[0];
    std::int64_t keys = 0;
    double hot = 0;
    for (std::int64_t j = 0; j < 1984; ++j) {
      keys += mask.at(2047, j) ? 1 : 0;
      hot += mask.at(2047, j) && j % 32 == 17 ? 1 : 0;
    }
    EXPECT_EQ(hot, 62) << "all hot keys are found, segment " << segment;
    return keys / 32;
  };
  EXPECT_EQ(tiles_of_last("32"), 62);
  EXPECT_EQ(tiles_of_last("64"), 31);
}

TEST(Pbs, FirstKeyIsAlwaysSeen) {
  AttentionCase input({.name = "sink", .q_len = 700, .kv_len = 700});
  for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, 0, d, 0);
  for (const auto& mask : masks_of("pbs:block=16,segment=128,threshold=0", input)) {
    for (std::int64_t n = 0; n < 700; ++n) ASSERT_TRUE(mask.at(n, 0)) << n;
  }
}

TEST(Pbs, FullBudgetAndEveryShape) {
  for (const CaseShape& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    if (!input.problem.causal) {
      EXPECT_THROW(make_method("pbs")->plan(input.problem, input.inputs, {}), Error);
      continue;
    }
    for (const std::string spec :
         {"pbs:threshold=1", "pbs:threshold=1,block=16,segment=32", "pbs:threshold=0,block=16,segment=1024"}) {
      test::expect_full_budget_is_dense(*make_method(spec), input);
    }
    test::expect_plans_hold(*make_method("pbs:block=16,segment=64,threshold=0.5"), input);
  }
}

TEST(Pbs, BadParametersAndUndefinedScores) {
  EXPECT_THROW(make_method("pbs:block=128,segment=200"), Error);
  AttentionCase input({.name = "nan", .q_heads = 1, .q_len = 256, .kv_len = 256});
  input.set_k(0, 0, 40, 0, std::nanf(""));
  const auto mask = masks_of("pbs:block=16,segment=32,threshold=0.1", input)[0];
  for (std::int64_t n = 64; n < 256; ++n) ASSERT_TRUE(mask.at(n, 40));
}

}  // namespace
}  // namespace tessera
