// HiP: the tree search and the staged search, what rows are made of, and the lists that decoding keeps.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>

#include "methods/decode/decoding_step.h"
#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

using Score = std::function<double(std::int64_t key)>;
using Keys = std::set<std::int64_t>;

/// The tree of the text once more, with plain loops and no score kept from round to round.
Keys tree(std::int64_t visible, std::int64_t mask_k, std::int64_t bk, bool centre, const Score& score) {
  Keys keys;
  if (visible <= mask_k) {
    for (std::int64_t j = 0; j < visible; ++j) keys.insert(j);
    return keys;
  }
  const std::int64_t m = mask_k / bk;
  const std::int64_t blocks = (visible + bk - 1) / bk;
  std::vector<std::pair<std::int64_t, std::int64_t>> nodes;  // first block, blocks
  for (std::int64_t e = 0; e < m; ++e) nodes.emplace_back(blocks * e / m, blocks * (e + 1) / m - blocks * e / m);
  for (double size = static_cast<double>(blocks) / static_cast<double>(m); size > 1; size /= 2) {
    std::vector<std::tuple<double, std::int64_t, std::int64_t>> halves;  // -score, first block, blocks
    for (const auto& [a, z] : nodes) {
      for (const auto& [begin, count] : {std::pair{a, z / 2}, std::pair{a + z / 2, z - z / 2}}) {
        if (count < 1) continue;
        double best = -1e300;
        const std::int64_t from = (begin + (centre ? count / 2 : 0)) * bk;
        for (std::int64_t j = from; j < std::min(from + bk, visible); ++j) best = std::max(best, score(j));
        halves.emplace_back(-best, begin, count);
      }
    }
    std::sort(halves.begin(), halves.end());
    halves.resize(std::min<std::size_t>(halves.size(), static_cast<std::size_t>(m)));
    nodes.clear();
    for (const auto& [minus, a, z] : halves) nodes.emplace_back(a, z);
  }
  for (const auto& [a, z] : nodes) {
    EXPECT_EQ(z, 1);
    for (std::int64_t j = a * bk; j < std::min((a + 1) * bk, visible); ++j) EXPECT_TRUE(keys.insert(j).second);
  }
  return keys;
}

struct Stage {
  std::int64_t chunk;
  std::int64_t leaving;  ///< keys
};

/// Binary search inside one chunk.
double chunk_score(std::int64_t l, std::int64_t r, const Score& score) {
  if (r - l == 1) return score(l);
  double best = -1e300;
  while (r - l > 1) {
    const std::int64_t c = (l + r) / 2;
    const double left = score((l + c) / 2);
    const double right = score((c + r) / 2);
    best = std::max({best, left, right});
    (right > left ? l : r) = c;
  }
  return best;
}

/// One stage of the staged form: the chunks that leave it.
std::vector<std::int64_t> stage(const std::vector<std::int64_t>& begins, std::int64_t end, const Stage& s,
                                const Score& score) {
  std::vector<std::pair<double, std::int64_t>> ranked;
  ranked.reserve(begins.size());
  for (const std::int64_t b : begins) ranked.emplace_back(-chunk_score(b, std::min(b + s.chunk, end), score), b);
  std::sort(ranked.begin(), ranked.end());
  ranked.resize(std::min(ranked.size(), static_cast<std::size_t>(s.leaving / s.chunk)));
  std::vector<std::int64_t> kept;
  kept.reserve(kept.size() + ranked.size());
  for (const auto& [minus, b] : ranked) kept.push_back(b);
  std::sort(kept.begin(), kept.end());
  return kept;
}

/// Largest product of key j with the queries [first, first + rows), every `step`-th or means of `mean`.
Score score_of(const AttentionCase& input, std::int64_t head, std::int64_t first, std::int64_t rows, std::int64_t step,
               std::int64_t mean) {
  std::vector<std::vector<double>> queries;
  for (std::int64_t r = first; r < first + rows; r += step) {
    const std::int64_t count = std::min(mean, first + rows - r);
    std::vector<double> q(static_cast<std::size_t>(input.problem.head_dim), 0.0);
    for (std::int64_t i = r; i < r + count; ++i) {
      for (std::size_t d = 0; d < q.size(); ++d) {
        q[d] += input.q(0, head, i, static_cast<std::int64_t>(d)) / static_cast<double>(count);
      }
    }
    queries.push_back(q);
  }
  return [&input, head, queries](std::int64_t j) {
    double best = -1e300;
    for (const auto& q : queries) {
      double dot = 0;
      for (std::size_t d = 0; d < q.size(); ++d) {
        dot += q[d] * input.k(0, head / input.problem.group(), j, static_cast<std::int64_t>(d));
      }
      best = std::max(best, dot);
    }
    return best;
  };
}

/// Keys of a whole query tile: sinks, what `search` finds before the window, everything from there on.
void expect_tiles(
    const AttentionCase& input, const std::vector<HeadMask>& masks, std::int64_t bq, std::int64_t sinks,
    std::int64_t window, std::int64_t least,
    const std::function<Keys(std::int64_t head, std::int64_t first, std::int64_t rows, std::int64_t end)>& search) {
  std::int64_t searched = 0;
  for (std::int64_t h = 0; h < input.problem.q_heads; ++h) {
    for (std::int64_t first = 0; first < input.problem.q_len; first += bq) {
      const std::int64_t rows = std::min(bq, input.problem.q_len - first);
      const std::int64_t end = std::max<std::int64_t>(0, test::position(input, 0, first) - window + 1);
      Keys keys;
      if (end > least) {
        keys = search(h, first, rows, end);
        ++searched;
      } else {
        for (std::int64_t j = 0; j < end; ++j) keys.insert(j);
      }
      for (std::int64_t n = first; n < first + rows; ++n) {
        for (std::int64_t j = 0; j < input.problem.kv_len; ++j) {
          const bool kept = keys.contains(j) || j < sinks || j >= end;
          ASSERT_EQ(masks[h].at(n, j), input.allowed(0, n, j) && kept)
              << "head " << h << ", query " << n << ", key " << j << ", searched keys " << end;
        }
      }
    }
  }
  EXPECT_GT(searched, 3);
}

TEST(Hip, TreeFollowsTheTextWithPlainLoops) {
  for (const CaseShape& shape : {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 500, .kv_len = 500},
                                 CaseShape{.name = "chunk", .q_len = 77, .kv_len = 611}}) {
    const AttentionCase input(shape);
    for (const auto& [mask_k, bk, bq, step, window, centre] : {std::tuple{32, 2, 32, 2, 20, false},
                                                               {30, 3, 16, 1, 7, false},
                                                               {64, 2, 32, 5, 33, true},
                                                               {8, 1, 13, 3, 1, false}}) {
      const auto masks = masks_of(
          fmt::format("hip:dense_layers=none,dense_queries=0,mask_k={},block_k={},block_q={},query_step={},window={},"
                      "sinks=5,representative={}",
                      mask_k, bk, bq, step, window, centre ? "centre" : "first"),
          input);
      expect_tiles(input, masks, bq, 5, window, mask_k,
                   [&, mask_k = mask_k, bk = bk, step = step, centre = centre](std::int64_t h, std::int64_t first,
                                                                               std::int64_t rows, std::int64_t end) {
                     return tree(end, mask_k, bk, centre, score_of(input, h, first, rows, step, 1));
                   });
    }
  }
}

TEST(Hip, StagesFollowTheTextWithPlainLoops) {
  for (const CaseShape& shape : {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 500, .kv_len = 500},
                                 CaseShape{.name = "chunk", .q_len = 77, .kv_len = 611}}) {
    const AttentionCase input(shape);
    const auto masks = masks_of(
        "hip:form=staged,dense_layers=none,block_q=24,sinks=9,window=50,stages=64+16:128+4:64,keep=24,refresh=4+2+1",
        input);
    expect_tiles(input, masks, 24, 9, 50, 9 + 24,
                 [&](std::int64_t h, std::int64_t first, std::int64_t rows, std::int64_t end) {
                   const Score means = score_of(input, h, first, rows, 4, 4);
                   const Score all = score_of(input, h, first, rows, 1, 1);
                   std::vector<std::int64_t> begins;
                   for (std::int64_t j = 9; j < end; j += 64) begins.push_back(j);
                   const auto split = [&](const std::vector<std::int64_t>& from, std::int64_t chunk, std::int64_t to) {
                     std::vector<std::int64_t> parts;
                     for (const std::int64_t b : from) {
                       for (std::int64_t j = b; j < std::min(b + chunk, end); j += to) parts.push_back(j);
                     }
                     return parts;
                   };
                   begins = split(stage(begins, end, {64, 128}, means), 64, 16);
                   begins = split(stage(begins, end, {16, 64}, means), 16, 4);
                   begins = stage(begins, end, {4, 24}, all);
                   Keys keys;
                   for (const std::int64_t b : begins) {
                     for (std::int64_t j = b; j < std::min(b + 4, end); ++j) keys.insert(j);
                   }
                   return keys;
                 });
  }
}

TEST(Hip, FirstQueriesRunDense) {
  // 3 * (mask_k * log2(keys / mask_k / 2) + mask_k) positions: 3 * (16 * 4 + 16) = 240 of 512.
  const AttentionCase input({.name = "first", .q_heads = 1, .q_len = 512, .kv_len = 512});
  const auto mask = masks_of("hip:dense_layers=none,mask_k=16,window=8,sinks=2,block_q=16", input)[0];
  for (std::int64_t n = 0; n < 512; ++n) {
    const auto count = std::count(mask.bits.begin() + n * 512, mask.bits.begin() + n * 512 + n + 1, std::uint8_t{1});
    if (n < 240) {
      EXPECT_EQ(count, n + 1);
    } else {
      EXPECT_LE(count, 16 + 2 + 8 + 16);
    }
  }
}

TEST(Hip, HotRunLongerThanAChunkIsFound) {
  // Piecewise constant scores: nodes of the tree hold 8 or 9 blocks of 2 keys at first; the run is 40 keys long.
  AttentionCase input({.name = "run", .q_heads = 1, .q_len = 1, .kv_len = 1100});
  for (std::int64_t j = 0; j < 1100; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, j, d, d == 0 && j >= 500 && j < 540 ? 5.0F : 0.0F);
  }
  for (std::int64_t d = 0; d < 16; ++d) input.set_q(0, 0, 0, d, d == 0 ? 1.0F : 0.0F);
  for (const std::string spec :
       {"hip:dense_layers=none,mask_k=128,window=10,sinks=0,refresh=8",
        "hip:form=staged,dense_layers=none,stages=32+8:256,keep=48,window=10,sinks=4,refresh=2+1"}) {
    const auto mask = masks_of(spec, input)[0];
    for (std::int64_t j = 500; j < 540; ++j) EXPECT_TRUE(mask.at(0, j)) << spec << ", key " << j;
  }
}

TEST(Hip, TreeClimbsOneHill) {
  // One query, blocks of one key, scores with one peak: the maximum survives wherever it is.
  for (const std::int64_t peak : {0, 1, 77, 300, 511, 640, 801}) {
    AttentionCase input({.name = "hill", .q_heads = 1, .q_len = 1, .kv_len = 812});
    for (std::int64_t j = 0; j < 812; ++j) {
      for (std::int64_t d = 0; d < 16; ++d) {
        input.set_k(0, 0, j, d, d == 0 ? -0.001F * static_cast<float>(std::abs(j - peak)) : 0.0F);
      }
    }
    for (std::int64_t d = 0; d < 16; ++d) input.set_q(0, 0, 0, d, d == 0 ? 1.0F : 0.0F);
    const auto mask = masks_of("hip:dense_layers=none,mask_k=8,block_k=1,query_step=1,window=4,sinks=0", input)[0];
    EXPECT_TRUE(mask.at(0, peak)) << peak;
    EXPECT_EQ(std::count(mask.bits.begin(), mask.bits.end(), std::uint8_t{1}), 8 + 4) << "distinct keys only";
  }
}

TEST(Hip, DenseLayersAndWholeBudgets) {
  for (const CaseShape& shape : test::all_shapes()) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    if (!input.problem.causal) {
      EXPECT_THROW(make_method("hip")->plan(input.problem, input.inputs, {}), Error);
      continue;
    }
    for (const std::string spec :
         {"hip", "hip:dense_layers=none,mask_k=100000", "hip:form=staged,dense_layers=none,keep=100000",
          "hip:dense_layers=none,mask_k=2,window=100000,dense_queries=0",
          "hip:form=staged,dense_layers=none,stages=8,keep=8,sinks=100000,refresh=8"}) {
      test::expect_full_budget_is_dense(*make_method(spec), input);
    }
    for (const std::string spec :
         {"hip:dense_layers=none,dense_queries=0,mask_k=16,window=9,sinks=3",
          "hip:dense_layers=none,dense_queries=0,mask_k=12,block_k=3,block_q=50,window=1,sinks=0,representative=random",
          "hip:form=staged,dense_layers=none,stages=32+8:64+2:32,keep=10,sinks=2,window=5"}) {
      test::expect_plans_hold(*make_method(spec), input);
    }
  }
  const AttentionCase input({.name = "layers", .q_len = 300, .kv_len = 300});
  const auto sparse = [&](const std::string& spec, std::int64_t layer) {
    return !(masks_of(*make_method(spec), input, 0, layer) == test::dense_masks(input));
  };
  EXPECT_FALSE(sparse("hip:mask_k=16,dense_queries=0", 2));
  EXPECT_TRUE(sparse("hip:mask_k=16,dense_queries=0", 3));
  EXPECT_FALSE(sparse("hip:form=staged,keep=8,sinks=0,window=8", 31));
  EXPECT_TRUE(sparse("hip:form=staged,keep=8,sinks=0,window=8", 30));
}

/// Keys of head 0 when the cache of `input` holds `keys` tokens.
std::set<std::int32_t> decoded_keys(const Method& method, const AttentionCase& input, std::int64_t keys,
                                    MethodState* state) {
  Problem problem = input.problem;
  problem.kv_len = keys;
  AttentionInputs inputs = input.inputs;
  inputs.k.shape[2] = inputs.v.shape[2] = keys;
  PlanContext context;
  context.state = state;
  const Plan plan = method.plan(problem, inputs, context);
  validate(plan);
  const auto mask = dense_mask(plan);
  std::set<std::int32_t> kept;
  for (std::int64_t j = 0; j < keys; ++j) {
    if (mask[static_cast<std::size_t>(j)] != 0) kept.insert(static_cast<std::int32_t>(j));
  }
  return kept;
}

TEST(Hip, DecodingRenewsItsListsAtTheirIntervals) {
  const AttentionCase first({.name = "decode", .q_heads = 1, .q_len = 1, .kv_len = 700}, 1);
  const AttentionCase second({.name = "decode", .q_heads = 1, .q_len = 1, .kv_len = 700}, 9);
  // The same keys, another query: a list from the first query differs from one of the second.
  AttentionCase other({.name = "decode", .q_heads = 1, .q_len = 1, .kv_len = 700}, 1);
  for (std::int64_t d = 0; d < 16; ++d) other.set_q(0, 0, 0, d, second.q(0, 0, 0, d));
  struct Form {
    std::string spec;
    std::int64_t renewed;  ///< new tokens after which a whole new list must be there
  };
  for (const Form& form : {Form{"hip:dense_layers=none,mask_k=32,window=20,sinks=3,refresh=8", 8},
                           Form{"hip:form=staged,dense_layers=none,stages=64+16:128+4:64,keep=16,window=20,sinks=3,"
                                "refresh=12+6+3",
                                12}}) {
    const auto method = make_method(form.spec);
    const auto state = method->new_state();
    const auto at_start = decoded_keys(*method, first, 500, state.get());
    EXPECT_EQ(at_start, decoded_keys(*method, first, 500, nullptr));
    const auto fresh = decoded_keys(*method, other, 502, nullptr);
    const auto kept = decoded_keys(*method, other, 502, state.get());
    EXPECT_NE(kept, fresh) << form.spec;
    // The old list, and every token since its window began.
    auto expected = at_start;
    expected.insert(500);
    expected.insert(501);
    EXPECT_EQ(kept, expected) << form.spec;
    EXPECT_EQ(decoded_keys(*method, other, 500 + form.renewed, state.get()),
              decoded_keys(*method, other, 500 + form.renewed, nullptr));
    // A shorter cache than the lists were made for starts anew.
    EXPECT_EQ(decoded_keys(*method, other, 400, state.get()), decoded_keys(*method, other, 400, nullptr));
    EXPECT_GT(state->memory_bytes(), 0U);
  }
  // Between the intervals of the first and the last stage only the last is new.
  const auto method =
      make_method("hip:form=staged,dense_layers=none,stages=64+16:128+4:64,keep=16,window=20,sinks=3,refresh=12+6+3");
  const auto state = method->new_state();
  const auto at_start = decoded_keys(*method, first, 500, state.get());
  const auto partly = decoded_keys(*method, other, 503, state.get());
  EXPECT_NE(partly, decoded_keys(*method, other, 503, nullptr));
  auto old = at_start;
  for (const std::int32_t j : {500, 501, 502}) old.insert(j);
  EXPECT_NE(partly, old);
}

TEST(Hip, DecodesInBatchesAndSeveralRows) {
  for (const std::int64_t rows : {1, 3}) {
    const AttentionCase input(
        {.name = "batch", .batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = rows, .kv_len = 400, .page_size = 16});
    const auto method = make_method("hip:dense_layers=none,mask_k=32,window=20,sinks=3,decode_rows=4");
    const auto state = method->new_state();
    const test::LayerResult with = test::attend_layer(*method, input, 5, state.get());
    const test::LayerResult without = test::attend_layer(*method, input, 5, nullptr);
    EXPECT_TRUE(with.plan == without.plan);
    EXPECT_EQ(with.plan.tile_q, 1);
  }
}

TEST(Hip, PairsOfBf16FindWhatFloatsFind) {
  // The same bf16 numbers searched as pairs (where the machine has them) and as floats.
  AttentionCase input(
      {.name = "pairs", .q_heads = 2, .q_len = 200, .kv_len = 600, .head_dim = 64, .dtype = DType::bf16});
  const auto method = make_method("hip:dense_layers=none,dense_queries=0,mask_k=32,window=20");
  std::vector<Plan> plans;
  for (const Isa isa : supported_isas()) {
    PlanContext context;
    context.run.isa = isa;
    plans.push_back(method->plan(input.problem, input.inputs, context));
  }
  for (const Plan& plan : plans) EXPECT_GT(coverage(plan, plans.front()), 0.999);
}

TEST(Hip, UndefinedAndHugeScoresKeepEveryRow) {
  for (const float value : {std::nanf(""), std::numeric_limits<float>::infinity(), 1e30F, 0.0F}) {
    AttentionCase input({.name = "bad", .q_len = 300, .kv_len = 300});
    for (std::int64_t j = 0; j < 300; ++j) {
      for (std::int64_t d = 0; d < 16; ++d) {
        if (value == 0 || j % 50 == 20) input.set_k(0, 0, j, d, value);
      }
    }
    for (const std::string spec : {"hip:dense_layers=none,dense_queries=0,mask_k=16,window=9,sinks=3",
                                   "hip:form=staged,dense_layers=none,stages=32+8:64+2:32,keep=10,sinks=2,window=5"}) {
      test::expect_plans_hold(*make_method(spec), input);
    }
  }
  // A block that is looked at and undefined is kept.
  AttentionCase input({.name = "nan", .q_heads = 1, .q_len = 1, .kv_len = 300});
  input.set_k(0, 0, 0, 3, std::nanf(""));
  EXPECT_TRUE(masks_of("hip:dense_layers=none,mask_k=8,window=9,sinks=0", input)[0].at(0, 0));
}

TEST(Hip, KeepsWholeBlocks) {
  const AttentionCase input({.name = "rounded", .q_heads = 1, .q_len = 300, .kv_len = 300});
  const std::string rest = ",block_k=8,dense_layers=none,dense_queries=0,window=9,sinks=3";
  const auto kept = masks_of("hip:mask_k=24" + rest, input);
  EXPECT_EQ(masks_of("hip:mask_k=17" + rest, input)[0], kept[0]);
  EXPECT_NE(masks_of("hip:mask_k=16" + rest, input)[0], kept[0]);
}

TEST(Hip, BadParameters) {
  for (const std::string spec : {"hip:form=staged,stages=256+100",
                                 "hip:form=staged,stages=", "hip:form=staged,stages=8:x", "hip:form=staged,refresh=3",
                                 "hip:refresh=", "hip:refresh=a", "hip:dense_layers=x", "hip:representative=last"}) {
    EXPECT_THROW(make_method(spec), Error) << spec;
  }
}

}  // namespace
}  // namespace tessera
