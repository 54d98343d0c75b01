// ProxyAttn: the ranking of a proxy, the count of each head, and how they meet.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

/// Key tiles a query tile keeps.
std::set<std::int64_t> tiles_of(const HeadMask& mask, std::int64_t query, std::int64_t block) {
  std::set<std::int64_t> tiles;
  for (std::int64_t j = 0; j < mask.keys; ++j) {
    if (mask.at(query, j)) tiles.insert(j / block);
  }
  return tiles;
}

/// The text once more, in float64 and with plain loops; lengths are multiples of the tile.
std::set<std::int64_t> expected_tiles(const AttentionCase& input, std::int64_t proxies, double gamma, std::int64_t step,
                                      std::int64_t block, std::int64_t head, std::int64_t tile) {
  const Problem& problem = input.problem;
  const std::int64_t heads = problem.q_heads / proxies;
  const std::int64_t keys = problem.kv_len;
  const std::int64_t key_tiles = keys / block;
  const std::int64_t offset = keys - problem.q_len;
  const auto mean = [&](bool query, std::int64_t n, std::int64_t d) {
    double sum = 0;
    for (std::int64_t h = head / heads * heads; h < (head / heads + 1) * heads; ++h) {
      sum += query ? input.q(0, h, n, d) : input.k(0, h / problem.group(), n, d);
    }
    return sum / static_cast<double>(heads);
  };
  std::vector<double> rank(static_cast<std::size_t>(key_tiles), 0.0);
  for (std::int64_t r = tile * block; r < (tile + 1) * block; r += step) {
    std::vector<double> p;
    for (std::int64_t j = 0; j <= offset + r && j < keys; ++j) {
      double dot = 0;
      for (std::int64_t d = 0; d < problem.head_dim; ++d) dot += mean(true, r, d) * mean(false, j, d);
      p.push_back(std::exp(dot * problem.softmax_scale()));
    }
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    for (std::size_t j = 0; j < p.size(); ++j) {
      double& best = rank[j / static_cast<std::size_t>(block)];
      best = std::max(best, p[j] / sum);
    }
  }
  std::vector<double> mass(static_cast<std::size_t>(key_tiles), 0.0);
  for (std::int64_t r = problem.q_len - block; r < problem.q_len; ++r) {
    const auto p = input.probabilities(0, head, r);
    for (std::int64_t j = 0; j < keys; ++j) mass[j / block] += p[j] / static_cast<double>(block);
  }
  std::sort(mass.begin(), mass.end(), std::greater<>());
  std::int64_t count = 0;
  for (double sum = 0; sum < gamma && count < key_tiles;) sum += mass[count++];
  const std::int64_t visible = offset / block + tile + 1;
  const auto share = static_cast<double>(count) / static_cast<double>(key_tiles);
  const auto keep = std::max<std::int64_t>(1, std::lround(std::ceil(share * static_cast<double>(visible))));
  std::vector<std::int64_t> order(static_cast<std::size_t>(visible));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return rank[a] > rank[b]; });
  std::set<std::int64_t> kept(order.begin(), order.begin() + std::min(keep, visible));
  kept.insert(0);
  kept.insert(visible - 1);
  return kept;
}

TEST(ProxyAttn, FollowsTheTextWithPlainLoops) {
  const AttentionCase input({.name = "heads", .q_heads = 4, .kv_heads = 2, .q_len = 192, .kv_len = 320});
  for (const auto& [proxies, gamma, step] : {std::tuple{1, 0.5, 1}, {2, 0.7, 1}, {4, 0.3, 1}, {2, 0.4, 4}}) {
    const auto masks =
        masks_of(fmt::format("proxyattn:block=16,proxies={},gamma={},query_step={}", proxies, gamma, step), input);
    for (std::int64_t h = 0; h < 4; ++h) {
      for (std::int64_t t = 0; t < 12; ++t) {
        ASSERT_EQ(tiles_of(masks[h], t * 16 + 15, 16), expected_tiles(input, proxies, gamma, step, 16, h, t))
            << "proxies " << proxies << ", head " << h << ", tile " << t;
      }
    }
  }
}

TEST(ProxyAttn, SetsOfOneGroupAreNested) {
  // Head 1 looks much sharper than head 0, so it keeps fewer tiles; they are among those of head 0.
  AttentionCase input({.name = "nested", .q_len = 512, .kv_len = 512});
  for (std::int64_t n = 0; n < 512; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) {
      input.set_q(0, 0, n, d, input.q(0, 0, n, d) * 0.2F);
      input.set_q(0, 1, n, d, input.q(0, 1, n, d) * 3);
    }
  }
  const auto masks = masks_of("proxyattn:block=32,gamma=0.6", input);
  std::int64_t fewer = 0;
  for (std::int64_t n = 31; n < 512; n += 32) {
    const auto wide = tiles_of(masks[0], n, 32);
    const auto narrow = tiles_of(masks[1], n, 32);
    EXPECT_TRUE(std::includes(wide.begin(), wide.end(), narrow.begin(), narrow.end())) << n;
    fewer += narrow.size() < wide.size() ? 1 : 0;
  }
  EXPECT_GT(fewer, 4);
}

TEST(ProxyAttn, OneHotKeyIsNotAveragedAway) {
  // One key that every query likes among keys that point the other way: their mean hides it, the largest does not.
  AttentionCase input({.name = "hot", .q_heads = 1, .q_len = 512, .kv_len = 512});
  for (std::int64_t n = 0; n < 512; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) {
      input.set_q(0, 0, n, d, d == 0 ? 4.0F : 0.0F);
      input.set_k(0, 0, n, d, d == 0 && n / 64 == 3 ? -1.0F : 0.0F);
    }
  }
  input.set_k(0, 0, 210, 0, 9);
  const auto mask = masks_of("proxyattn:block=64,gamma=0.1", input)[0];
  for (std::int64_t n = 256; n < 512; ++n) ASSERT_TRUE(mask.at(n, 210)) << n;
  EXPECT_FALSE(mask.at(500, 128));
}

TEST(ProxyAttn, FullBudgetAndEveryShape) {
  for (const CaseShape& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    for (const std::string spec : {"proxyattn:gamma=1", "proxyattn:gamma=0,dense_below=100000"}) {
      test::expect_full_budget_is_dense(*make_method(spec), input);
    }
    test::expect_plans_hold(*make_method("proxyattn:block=32,gamma=0.5"), input);
    test::expect_plans_hold(*make_method("proxyattn:block=16,gamma=0.2,proxies=2,query_step=8"), input);
  }
}

TEST(ProxyAttn, BadParameters) {
  const AttentionCase input({.name = "two", .q_len = 300, .kv_len = 300});
  EXPECT_THROW(make_method("proxyattn:proxies=3")->plan(input.problem, input.inputs, {}), Error);
  EXPECT_THROW(make_method("proxyattn:query_step=3"), Error);
}

TEST(ProxyAttn, UndefinedScoresAreKept) {
  AttentionCase input({.name = "nan", .q_len = 256, .kv_len = 256});
  input.set_k(0, 0, 40, 0, std::nanf(""));
  for (const auto& mask : masks_of("proxyattn:block=16,gamma=0.1", input)) {
    for (std::int64_t n = 48; n < 256; ++n) ASSERT_TRUE(mask.at(n, 40));
  }
}

}  // namespace
}  // namespace tessera
