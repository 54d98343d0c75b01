// Every kernel of every instruction set against the float64 reference.
#include <gtest/gtest.h>

#include <cstdlib>

#include "kernels/kernel_case.h"

namespace tessera::testing {
namespace {

Problem small_problem() {
  Problem problem;
  problem.head_dim = problem.value_dim = 64;
  return problem;
}

/// Worst row-element difference, printed with its place.
void expect_close(const KernelCase& c, const KernelCase::Result& expected, const KernelCase::Result& actual, bool pairs,
                  const std::string& what) {
  ASSERT_TRUE(actual.guards_intact) << what << ": wrote outside the output";
  const float bound = c.tolerance(pairs);
  const float lse_bound = c.lse_tolerance();
  float worst = 0;
  std::size_t place = 0;
  for (std::size_t i = 0; i < expected.o.size(); ++i) {
    ASSERT_EQ(std::isnan(expected.o[i]), std::isnan(actual.o[i])) << what << ": NaN differs at element " << i;
    const float difference = std::fabs(expected.o[i] - actual.o[i]);
    if (difference > worst) {
      worst = difference;
      place = i;
    }
  }
  EXPECT_LE(worst, bound) << what << ": element " << place << " expected "
                          << (expected.o.empty() ? 0 : expected.o[place]) << " actual "
                          << (actual.o.empty() ? 0 : actual.o[place]) << "\n"
                          << describe(c.plan);
  for (std::size_t i = 0; i < expected.lse.size(); ++i) {
    if (std::isinf(expected.lse[i])) {
      ASSERT_EQ(expected.lse[i], actual.lse[i]) << what << ": LSE of row " << i << "\n" << describe(c.plan);
    } else if (!std::isnan(expected.lse[i])) {
      ASSERT_NEAR(expected.lse[i], actual.lse[i], lse_bound) << what << ": LSE of row " << i;
    }
  }
}

bool uses_pairs(const TestedLevel& level, const CaseOptions& options, KernelKind kind) {
  return level.kernels->pairs_bf16 && options.dtype == DType::bf16 && kind != KernelKind::split_key;
}

void check_all_kernels(const KernelCase& c, const CaseOptions& options, const std::string& what) {
  const auto expected = c.reference();
  for (const TestedLevel& level : tested_levels()) {
    std::vector<KernelKind> kinds{KernelKind::query_major, KernelKind::split_key};
    if (kernels::can_run_key_major(c.plan)) kinds.push_back(KernelKind::key_major);
    for (const KernelKind kind : kinds) {
      const std::string name = fmt::format("{} {} {} dims {}/{} {}", what, level.name, name_of(kind), options.head_dim,
                                           options.value_dim, name_of(options.dtype));
      expect_close(c, expected, c.with(kind, *level.kernels), uses_pairs(level, options, kind), name);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

class RandomPlans : public ::testing::TestWithParam<int> {};

TEST_P(RandomPlans, EveryKernelMatchesTheReference) {
  for (int round = 0; round < 12; ++round) {
    const int seed = GetParam() * 1000 + round;
    Random random(static_cast<std::uint64_t>(seed));
    CaseOptions options = random_options(random);
    RandomPlanOptions plan_options;
    plan_options.query_orders = chance(random, 25);
    plan_options.key_orders = chance(random, 25);
    options.modifiers = chance(random, 30);
    Plan plan = RandomPlan(random, random_problem(random), plan_options).make();
    if (chance(random, 15)) plan.problem.scale = chance(random, 50) ? -0.2F : 0.0F;
    const KernelCase c(random, std::move(plan), options);
    check_all_kernels(c, options, fmt::format("seed {}", seed));
    if (HasFatalFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, RandomPlans, ::testing::Range(0, 12));

TEST(Kernels, DerivedSourcesWithLogWeights) {
  for (int seed = 0; seed < 12; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    Problem problem = random_problem(random);
    CaseOptions options = random_options(random);
    options.sources = true;
    RandomPlanOptions plan_options;
    plan_options.derived_sources = true;
    const KernelCase c(random, RandomPlan(random, problem, plan_options).make(), options);
    check_all_kernels(c, options, fmt::format("seed {}", seed));
  }
}

TEST(Kernels, PagedKeysAndValues) {
  for (int seed = 0; seed < 12; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    Problem problem = random_problem(random);
    while (problem.variable_length()) problem = random_problem(random);
    CaseOptions options = random_options(random);
    options.page_size = chance(random, 50) ? 16 : 48;
    const KernelCase c(random, RandomPlan(random, problem, {}).make(), options);
    check_all_kernels(c, options, fmt::format("seed {}", seed));
  }
}

TEST(Kernels, DenseOverAwkwardLengths) {
  int seed = 0;
  for (const std::int64_t q_len : {1, 2, 15, 16, 17, 127, 129, 200}) {
    for (const std::int64_t kv_len : {1, 16, 31, 128, 257}) {
      Random random(static_cast<std::uint64_t>(++seed));
      CaseOptions options = random_options(random);
      Problem problem = small_problem();
      problem.q_heads = 4;
      problem.kv_heads = 2;
      problem.q_len = q_len;
      problem.kv_len = kv_len;
      problem.head_dim = options.head_dim;
      problem.value_dim = options.value_dim;
      problem.causal = chance(random, 60);
      const KernelCase c(random, dense_plan(problem, chance(random, 50) ? 128 : 200, 64), options);
      check_all_kernels(c, options, fmt::format("q_len {} kv_len {}", q_len, kv_len));
      if (HasFatalFailure()) return;
    }
  }
}

/// Per-query selection of key tiles shared by a GQA group: what the key-major kernel is for.
Plan per_query_plan(Random& random, std::int64_t tile_q, std::int64_t tile_k, std::int64_t plan_heads) {
  Problem problem = small_problem();
  problem.batch = 2;
  problem.q_heads = 6;
  problem.kv_heads = 2;
  problem.q_len = 90;
  problem.kv_len = 301;
  problem.head_dim = problem.value_dim = 32;
  problem.causal = true;
  PlanBuilder builder(problem, tile_q, tile_k, plan_heads, 2);
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    for (std::int64_t tile = 0; tile < builder.query_tiles(block); ++tile) {
      const std::int64_t first = problem.kv_len - problem.q_len + tile * tile_q;
      const std::int64_t last = std::min(first + tile_q, problem.kv_len) - 1;
      for (std::int64_t key_tile = 0; key_tile <= last / tile_k; ++key_tile) {
        if (chance(random, 60)) continue;
        const bool whole = std::min((key_tile + 1) * tile_k, problem.kv_len) - 1 <= first;
        builder.tiles(key_tile, 1, whole ? EntryMask::none : EntryMask::band, 0);
      }
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

TEST(Kernels, KeyMajorOverTilesAndGroups) {
  int seed = 100;
  for (const std::int64_t tile_q : {1, 3, 8}) {
    for (const std::int64_t tile_k : {16, 64, 200}) {
      for (const std::int64_t plan_heads : {1, 2, 6}) {
        Random random(static_cast<std::uint64_t>(++seed));
        CaseOptions options = random_options(random);
        const KernelCase c(random, per_query_plan(random, tile_q, tile_k, plan_heads), options);
        ASSERT_TRUE(kernels::can_run_key_major(c.plan));
        check_all_kernels(c, options, fmt::format("tile_q {} tile_k {} heads {}", tile_q, tile_k, plan_heads));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Kernels, ResultsDoNotDependOnThreads) {
  for (int seed = 0; seed < 6; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    const CaseOptions options = random_options(random);
    const KernelCase c(random, per_query_plan(random, 1, 64, 2), options);
    for (const KernelKind kind : {KernelKind::query_major, KernelKind::key_major, KernelKind::split_key}) {
      const auto one = c.with(kind, kernels::level_of(default_isa()), 1);
      for (const int threads : {2, 3, 5}) {
        const auto many = c.with(kind, kernels::level_of(default_isa()), threads);
        EXPECT_EQ(one.raw, many.raw) << name_of(kind) << " with " << threads << " threads";
        EXPECT_EQ(0, std::memcmp(one.lse.data(), many.lse.data(), one.lse.size() * sizeof(float)));
      }
    }
  }
}

TEST(Kernels, SplitPiecesMergeOverLongRows) {
  Random random(5);
  Problem problem = small_problem();
  problem.q_heads = 8;
  problem.kv_heads = 2;
  problem.q_len = 3;
  problem.kv_len = 9001;
  problem.head_dim = problem.value_dim = 32;
  problem.causal = true;
  CaseOptions options;
  options.head_dim = options.value_dim = 32;
  options.dtype = DType::bf16;
  const KernelCase c(random, dense_plan(problem), options);
  check_all_kernels(c, options, "long rows");
}

TEST(Kernels, SmallWorkspaceGivesTheSameResult) {
  Random random(6);
  Problem problem = small_problem();
  problem.q_heads = 4;
  problem.kv_heads = 2;
  problem.q_len = problem.kv_len = 300;
  problem.causal = true;
  for (const DType dtype : kAllDtypes) {
    CaseOptions options;
    options.dtype = dtype;
    const KernelCase c(random, dense_plan(problem), options);
    const auto expected = c.reference();
    for (const TestedLevel& level : tested_levels()) {
      for (const std::size_t workspace : {std::size_t{0}, std::size_t{60000}}) {
        const auto actual = c.with(KernelKind::query_major, *level.kernels, 2, workspace);
        expect_close(c, expected, actual, uses_pairs(level, options, KernelKind::query_major),
                     fmt::format("{} workspace {}", level.name, workspace));
      }
    }
  }
}

/// Scores that climb slowly from block to block: the running maximum lags behind and catches up in jumps.
TEST(Kernels, SlowlyRisingScoresKeepTheirPrecision) {
  for (const DType dtype : kAllDtypes) {
    Random random(21);
    Problem problem = small_problem();
    problem.q_len = 40;
    problem.kv_len = 3000;
    CaseOptions options;
    options.dtype = dtype;
    KernelCase c(random, dense_plan(problem, 128, 128), options);
    for (std::int64_t head = 0; head < problem.kv_heads; ++head) {
      for (std::int64_t n = 0; n < problem.kv_len; ++n) {
        const float height = 0.004F * static_cast<float>(n) + (n > 2000 ? 6.0F : 0.0F);
        for (std::int64_t d = 0; d < 64; ++d) {
          store_from_float(c.k.view.row(0, head, n), dtype, d, (d == 0 ? height : 0.02F) * (n % 2 == 0 ? 1.0F : 0.9F));
        }
      }
    }
    check_all_kernels(c, options, "rising " + std::string(name_of(dtype)));
  }
}

/// The scores that the split-key kernel hands out are those of the reference, and only computed pairs are written.
TEST(Kernels, ScoresAreAByProduct) {
  constexpr float untouched = -12345.0F;
  for (int seed = 0; seed < 24; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    Problem problem = random_problem(random);
    while (problem.variable_length()) problem = random_problem(random);
    CaseOptions options = random_options(random);
    options.modifiers = seed % 3 == 0;
    RandomPlanOptions plan_options;
    plan_options.query_orders = seed % 4 == 1;
    plan_options.key_orders = seed % 4 == 2;
    const KernelCase c(random, RandomPlan(random, problem, plan_options).make(), options);
    const auto evaluate = [&](const auto& run_it) {
      const Problem& p = c.plan.problem;
      OwnedTensor scores(DType::f32, {p.batch, p.q_heads, p.q_len, p.kv_len}, Layout::bhnd, 3);
      auto* begin = reinterpret_cast<float*>(scores.memory.data());
      const std::span<float> all(begin, scores.memory.size() / sizeof(float));
      std::fill(all.begin(), all.end(), untouched);
      c.evaluate(options.output, [&](AttentionOutputs outputs) {
        outputs.scores = scores.view;
        run_it(outputs);
      });
      return std::vector<float>(all.begin(), all.end());
    };
    const std::vector<float> expected = evaluate([&](const AttentionOutputs& outputs) {
      RunOptions run_options;
      run_options.kernel = KernelKind::reference;
      run(c.plan, c.inputs, outputs, run_options);
    });
    for (const TestedLevel& level : tested_levels()) {
      const std::vector<float> actual = evaluate([&](const AttentionOutputs& outputs) {
        kernels::run_split_key({c.plan, c.inputs, outputs, 2, std::size_t{48} << 20}, *level.kernels);
      });
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(expected[i], actual[i], 1e-3F * (1 + std::fabs(expected[i])))
            << "seed " << seed << " " << level.name << " " << i;
      }
    }
  }
}

TEST(Kernels, ScoresAreRefusedWhereNoKernelWritesThem) {
  Random random(3);
  Problem problem = small_problem();
  const KernelCase c(random, dense_plan(problem, 16, 16), {});
  const Problem& p = c.plan.problem;
  OwnedTensor scores(DType::f32, {p.batch, p.q_heads, p.q_len, p.kv_len}, Layout::bhnd, 0);
  OwnedTensor wrong(DType::f32, {p.batch, p.q_heads, p.q_len, p.kv_len + 1}, Layout::bhnd, 0);
  c.evaluate(DType::f32, [&](AttentionOutputs outputs) {
    RunOptions run_options;
    run_options.kernel = KernelKind::query_major;
    outputs.scores = scores.view;
    EXPECT_THROW(run(c.plan, c.inputs, outputs, run_options), Error);
    EXPECT_EQ(run(c.plan, c.inputs, outputs).kernel, KernelKind::split_key);
    outputs.scores = wrong.view;
    EXPECT_THROW(run(c.plan, c.inputs, outputs), Error);
  });
}

/// Calls that share a workspace give what calls without one give, whatever came before them.
TEST(Kernels, WorkspaceIsReused) {
  Workspace workspace;
  for (const std::int64_t length : {300, 40, 700, 120}) {
    Random random(5);
    Problem problem = small_problem();
    problem.q_len = problem.kv_len = length;
    problem.causal = true;
    const KernelCase c(random, dense_plan(problem, 16, 16), {});
    for (const KernelKind kind : {KernelKind::query_major, KernelKind::key_major, KernelKind::split_key}) {
      if (kind == KernelKind::key_major && !kernels::can_run_key_major(c.plan)) continue;
      const auto evaluate = [&](Workspace* shared) {
        return c.evaluate(DType::f32, [&](const AttentionOutputs& outputs) {
          RunOptions run_options;
          run_options.kernel = kind;
          run_options.workspace = shared;
          run(c.plan, c.inputs, outputs, run_options);
        });
      };
      EXPECT_EQ(evaluate(nullptr).raw, evaluate(&workspace).raw) << name_of(kind) << " " << length;
    }
  }
}

/// NaN and Inf reach exactly the rows that may see them.
TEST(Kernels, NonFiniteInputsStayInTheirRows) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const bool in_value : {false, true}) {
    for (const float poison : {nan, infinity}) {
      for (const DType dtype : kAllDtypes) {
        Random random(7);
        Problem problem = small_problem();
        problem.q_heads = 2;
        problem.q_len = problem.kv_len = 150;
        problem.causal = true;
        CaseOptions options;
        options.dtype = dtype;
        KernelCase c(random, dense_plan(problem, 128, 128), options);
        constexpr std::int64_t key = 77;
        OwnedTensor& tensor = in_value ? c.v : c.k;
        store_from_float(tensor.view.row(0, 0, key), dtype, 3, poison);
        for (const TestedLevel& level : tested_levels()) {
          for (const KernelKind kind : {KernelKind::query_major, KernelKind::split_key}) {
            const auto result = c.with(kind, *level.kernels);
            for (std::int64_t row = 0; row < problem.q_len; ++row) {
              const float x = result.o[static_cast<std::size_t>(row * 64 + 3)];
              if (row < key) {
                ASSERT_TRUE(std::isfinite(x)) << level.name << " " << name_of(kind) << " row " << row;
              } else if (in_value || std::isnan(poison)) {
                ASSERT_FALSE(std::isfinite(x)) << level.name << " " << name_of(kind) << " row " << row;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Kernels, RowsWithoutKeysAreZeroWithMinusInfinity) {
  Problem problem = small_problem();
  problem.q_len = 70;
  problem.kv_len = 40;
  problem.causal = true;  // the first 30 queries stand before every key
  Random random(8);
  const CaseOptions options;
  const KernelCase c(random, dense_plan(problem), options);
  for (const TestedLevel& level : tested_levels()) {
    const auto result = c.with(KernelKind::query_major, *level.kernels);
    for (std::size_t row = 0; row < 30; ++row) {
      EXPECT_EQ(result.lse[row], -std::numeric_limits<float>::infinity());
      for (std::size_t d = 0; d < 64; ++d) EXPECT_EQ(result.o[row * 64 + d], 0.0F);
    }
    EXPECT_TRUE(std::isfinite(result.lse[30]));
  }
}

TEST(Kernels, HugeLogitsStayFinite) {
  Random random(9);
  Problem problem = small_problem();
  problem.q_heads = 2;
  problem.q_len = problem.kv_len = 140;
  problem.causal = true;
  problem.scale = 1000.0F;
  const CaseOptions options;
  const KernelCase c(random, dense_plan(problem), options);
  for (const TestedLevel& level : tested_levels()) {
    for (const KernelKind kind : {KernelKind::query_major, KernelKind::split_key}) {
      for (const float x : c.with(kind, *level.kernels).o) ASSERT_TRUE(std::isfinite(x));
    }
  }
}

TEST(Isa, EnvironmentForcesTheLevel) {
  for (const Isa isa : supported_isas()) {
    setenv("TESSERA_ISA", std::string(name_of(isa)).c_str(), 1);
    EXPECT_EQ(default_isa(), isa);
    Random random(1);
    Problem problem = small_problem();
    problem.q_len = problem.kv_len = 20;
    const KernelCase c(random, dense_plan(problem), {});
    c.evaluate(DType::f32,
               [&](const AttentionOutputs& outputs) { EXPECT_EQ(run(c.plan, c.inputs, outputs).isa, isa); });
  }
  setenv("TESSERA_ISA", "avx1024", 1);
  EXPECT_THROW(default_isa(), Error);
  unsetenv("TESSERA_ISA");
  EXPECT_EQ(default_isa(), supported_isas().back());
}

}  // namespace
}  // namespace tessera::testing
