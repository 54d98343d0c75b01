// The float64 backward pass against central differences of the float64 forward pass, and every instruction set against
// the float64 backward pass.
#include <gtest/gtest.h>

#include "kernels/gradient_case.h"

namespace tessera::testing {
namespace {

void expect_close(const GradientCase& c, const GradientValues& expected, const GradientValues& magnitude,
                  const GradientValues& actual, bool pairs, DType dtype, const std::string& what) {
  ASSERT_TRUE(actual.guards_intact) << what << ": wrote outside a gradient";
  ASSERT_EQ(expected.tensors.size(), actual.tensors.size());
  const double bound = c.tolerance(pairs, dtype);
  for (std::size_t t = 0; t < expected.tensors.size(); ++t) {
    const auto& e = expected.tensors[t];
    const auto& a = actual.tensors[t];
    ASSERT_EQ(e.values.size(), a.values.size()) << what << " " << e.name;
    for (std::size_t i = 0; i < e.values.size(); ++i) {
      // Numbers below the smallest normal f16 round by its spacing.
      const double floor = dtype == DType::f16 ? 1e-7 : 1e-12;
      ASSERT_NEAR(e.values[i], a.values[i], bound * magnitude.tensors[t].values[i] + floor)
          << what << ": " << e.name << " element " << i << " of magnitude " << magnitude.tensors[t].values[i];
    }
  }
}

void check_all_levels(Random& random, const KernelCase& forward, const CaseOptions& options, const std::string& what) {
  const DType d_o_type = chance(random, 70) ? options.dtype : pick(random, kAllDtypes);
  const GradientCase c(random, forward, d_o_type, chance(random, 40));
  const GradientValues expected = c.reference();
  const GradientValues magnitude = c.magnitudes();
  for (const TestedLevel& level : tested_levels()) {
    for (const bool key_major : {false, true}) {
      if (key_major && !kernels::can_run_key_major(forward.plan)) continue;
      const bool pairs = level.kernels->pairs_bf16 && options.dtype == DType::bf16 && c.saved.d_o.dtype == DType::bf16;
      const std::string name =
          fmt::format("{} {} {} dims {}/{} {}\n{}", what, level.name, key_major ? "key-major" : "query-major",
                      options.head_dim, options.value_dim, name_of(options.dtype), describe(forward.plan));
      expect_close(c, expected, magnitude, c.with(*level.kernels, key_major, options.output), pairs, options.output,
                   name);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

class BackwardRandomPlans : public ::testing::TestWithParam<int> {};

TEST_P(BackwardRandomPlans, EveryLevelMatchesTheReference) {
  for (int round = 0; round < 10; ++round) {
    const int seed = GetParam() * 1000 + round;
    Random random(static_cast<std::uint64_t>(seed));
    CaseOptions options = random_options(random);
    RandomPlanOptions plan_options;
    plan_options.query_orders = chance(random, 25);
    plan_options.key_orders = chance(random, 25);
    options.modifiers = chance(random, 40);
    Plan plan = RandomPlan(random, random_problem(random), plan_options).make();
    if (chance(random, 15)) plan.problem.scale = chance(random, 50) ? -0.2F : 0.0F;
    const KernelCase forward(random, std::move(plan), options);
    check_all_levels(random, forward, options, fmt::format("seed {}", seed));
    if (HasFatalFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, BackwardRandomPlans, ::testing::Range(0, 12));

TEST(Backward, DerivedSourcesWithLogWeightsAndRepeats) {
  for (int seed = 0; seed < 12; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    Problem problem = random_problem(random);
    CaseOptions options = random_options(random);
    options.sources = true;
    options.modifiers = chance(random, 30);
    RandomPlanOptions plan_options;
    plan_options.derived_sources = true;
    const KernelCase forward(random, RandomPlan(random, problem, plan_options).make(), options);
    check_all_levels(random, forward, options, fmt::format("seed {}", seed));
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(Backward, DenseOverAwkwardLengths) {
  int seed = 0;
  for (const std::int64_t q_len : {1, 15, 16, 17, 127, 129, 200}) {
    for (const std::int64_t kv_len : {1, 16, 31, 128, 257}) {
      Random random(static_cast<std::uint64_t>(++seed));
      CaseOptions options = random_options(random);
      Problem problem;
      problem.q_heads = 4;
      problem.kv_heads = 2;
      problem.q_len = q_len;
      problem.kv_len = kv_len;
      problem.head_dim = options.head_dim;
      problem.value_dim = options.value_dim;
      problem.causal = chance(random, 60);
      const KernelCase forward(random, dense_plan(problem, chance(random, 50) ? 128 : 200, 64), options);
      check_all_levels(random, forward, options, fmt::format("q_len {} kv_len {}", q_len, kv_len));
      if (HasFatalFailure()) return;
    }
  }
}

/// Per-query selection of key tiles: what the key-major kernel is for.
Plan per_query_plan(Random& random, std::int64_t tile_q, std::int64_t tile_k, std::int64_t plan_heads) {
  Problem problem;
  problem.batch = 2;
  problem.q_heads = 6;
  problem.kv_heads = 2;
  problem.q_len = 41;
  problem.kv_len = 217;
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

TEST(Backward, KeyMajorOverTilesAndGroups) {
  int seed = 100;
  for (const std::int64_t tile_q : {1, 3, 8}) {
    for (const std::int64_t tile_k : {16, 64, 200}) {
      for (const std::int64_t plan_heads : {1, 2, 6}) {
        Random random(static_cast<std::uint64_t>(++seed));
        CaseOptions options = random_options(random);
        options.modifiers = chance(random, 30);
        const KernelCase forward(random, per_query_plan(random, tile_q, tile_k, plan_heads), options);
        ASSERT_TRUE(kernels::can_run_key_major(forward.plan));
        check_all_levels(random, forward, options,
                         fmt::format("tile_q {} tile_k {} heads {}", tile_q, tile_k, plan_heads));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Backward, ResultsDoNotDependOnThreads) {
  for (int seed = 0; seed < 6; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    CaseOptions options = random_options(random);
    options.modifiers = true;
    const KernelCase forward(random, per_query_plan(random, 1, 64, 2), options);
    const GradientCase c(random, forward, options.dtype, true);
    for (const bool key_major : {false, true}) {
      const auto one = c.with(kernels::level_of(default_isa()), key_major, DType::f32, 1);
      for (const int threads : {2, 3, 5}) {
        const auto many = c.with(kernels::level_of(default_isa()), key_major, DType::f32, threads);
        for (std::size_t t = 0; t < one.tensors.size(); ++t) {
          EXPECT_EQ(one.tensors[t].values, many.tensors[t].values) << one.tensors[t].name << ", " << threads;
        }
      }
    }
  }
}

/// Gradients of a run as [d_q, d_k, d_v].
std::vector<std::vector<float>> gradients_by(const Plan& plan, const AttentionInputs& inputs, const SavedForward& saved,
                                             const RunOptions& options) {
  const Problem& p = plan.problem;
  std::vector<std::vector<float>> values(3);
  const auto make = [&](std::size_t i, std::int64_t heads, std::int64_t tokens, std::int64_t dim) {
    values[i].assign(static_cast<std::size_t>(heads * tokens * dim), 99.0F);
    return mutable_view_of(values[i].data(), DType::f32, {1, heads, tokens, dim});
  };
  Gradients gradients;
  gradients.d_q = make(0, p.q_heads, p.q_len, p.head_dim);
  gradients.d_k = make(1, p.kv_heads, p.kv_len, p.head_dim);
  gradients.d_v = make(2, p.kv_heads, p.kv_len, p.value_dim);
  run_backward(plan, inputs, saved, gradients, options);
  return values;
}

/// Lanes clear and add only the keys that they meet: what an earlier call left in the workspace must not show, and keys
/// that nobody meets have a gradient of 0.
TEST(Backward, SumsOfAnEarlierCallDoNotShow) {
  Problem problem;
  problem.q_heads = 4;
  problem.kv_heads = 2;
  problem.q_len = problem.kv_len = 700;
  problem.head_dim = problem.value_dim = 16;
  problem.causal = true;
  constexpr std::int64_t tile_q = 16;
  const auto plan_of = [&](const auto& add_row) {
    PlanBuilder builder(problem, tile_q, 16, 1, 1);
    for (std::int64_t tile = 0; tile < builder.query_tiles(0); ++tile) {
      add_row(builder, tile * tile_q);
      builder.end_row();
    }
    return std::move(builder).finish();
  };
  std::vector<Plan> plans;
  plans.push_back(dense_plan(problem));
  plans.push_back(plan_of([](PlanBuilder& builder, std::int64_t first) {  // a window
    if (first > 0) builder.run(std::max<std::int64_t>(0, first - 80), std::min<std::int64_t>(80, first));
  }));
  plans.push_back(plan_of([](PlanBuilder& builder, std::int64_t first) {  // three keys, of late queries alone
    const std::vector<std::int32_t> tokens{3, 199, 450};
    if (first > 600) builder.gather(builder.add_tokens(tokens), 3);
  }));
  plans.push_back(plan_of([](PlanBuilder&, std::int64_t) {}));  // nothing
  Random random(3);
  std::normal_distribution<float> normal;
  const auto draw = [&](std::int64_t heads) {
    std::vector<float> values(static_cast<std::size_t>(heads * 700 * 16));
    for (float& value : values) value = normal(random);
    return values;
  };
  const auto q = draw(4);
  const auto k = draw(2);
  const auto v = draw(2);
  const auto d_o = draw(4);
  AttentionInputs inputs;
  inputs.q = view_of(q.data(), DType::f32, {1, 4, 700, 16});
  inputs.k = view_of(k.data(), DType::f32, {1, 2, 700, 16});
  inputs.v = view_of(v.data(), DType::f32, {1, 2, 700, 16});
  Workspace workspace;
  for (const Plan& plan : plans) {
    std::vector<float> o(q.size());
    std::vector<float> lse(4 * 700);
    run(plan, inputs, {mutable_view_of(o.data(), DType::f32, {1, 4, 700, 16}), lse}, {});
    SavedForward saved;
    saved.o = view_of(o.data(), DType::f32, {1, 4, 700, 16});
    saved.d_o = view_of(d_o.data(), DType::f32, {1, 4, 700, 16});
    saved.lse = lse;
    RunOptions shared;
    shared.workspace = &workspace;
    RunOptions reference;
    reference.kernel = KernelKind::reference;
    const auto actual = gradients_by(plan, inputs, saved, shared);
    EXPECT_EQ(actual, gradients_by(plan, inputs, saved, {}));
    const auto expected = gradients_by(plan, inputs, saved, reference);
    for (std::size_t t = 0; t < 3; ++t) {
      for (std::size_t i = 0; i < expected[t].size(); ++i) ASSERT_NEAR(actual[t][i], expected[t][i], 2e-4) << t;
    }
  }
}

/// Loss = sum(dO * O) + sum(dLSE * LSE) in float64, over rows that have keys.
double loss_of(const KernelCase& forward, const GradientCase& c) {
  const Problem& p = forward.plan.problem;
  const AttentionOutputs no_outputs{};
  const kernels::Call call{forward.plan, forward.inputs, no_outputs, 1, 0};
  double loss = 0;
  for (std::int64_t s = 0; s < p.batch; ++s) {
    for (std::int64_t head = 0; head < p.q_heads; ++head) {
      const std::int64_t block = forward.plan.block_of(s, head);
      const auto sources = kernels::reference_sources(call, s, head / p.group());
      for (std::int64_t place = 0; place < forward.plan.queries_of(block); ++place) {
        const kernels::ReferenceRow row{s, head, block, place};
        const kernels::ReferenceOutput result = kernels::attend_row(call, row, sources);
        if (std::isinf(result.lse)) continue;
        const std::int64_t query = kernels::query_of(call, row);
        const std::byte* d_o = call.query_row(c.saved.d_o, s, head, query);
        for (std::int64_t d = 0; d < p.value_dim; ++d) {
          loss += result.output[static_cast<std::size_t>(d)] * load_as_float(d_o, c.saved.d_o.dtype, d);
        }
        const auto index = static_cast<std::size_t>(call.lse_index(s, head, query));
        if (!c.saved.d_lse.empty()) loss += result.lse * c.saved.d_lse[index];
      }
    }
  }
  return loss;
}

/// Derivative by one float: central differences at h and 2h, extrapolated, which leaves an error of h^4.
double difference(float& x, const KernelCase& forward, const GradientCase& c) {
  constexpr float h = 1.0F / 256;
  const float kept = x;
  const auto slope = [&](float step) {
    x = kept + step;
    const float above_x = x;
    const double above = loss_of(forward, c);
    x = kept - step;
    const double width = static_cast<double>(above_x) - static_cast<double>(x);
    const double below = loss_of(forward, c);
    x = kept;
    return (above - below) / width;
  };
  return (4 * slope(h) - slope(2 * h)) / 3;
}

/// Floats that a view reads, in the order of its axes.
std::vector<float*> floats_of(const TensorView& view) {
  std::vector<float*> floats;
  for (std::int64_t b = 0; b < view.batch(); ++b) {
    for (std::int64_t h = 0; h < view.heads(); ++h) {
      for (std::int64_t n = 0; n < view.tokens(); ++n) {
        auto* row = const_cast<float*>(reinterpret_cast<const float*>(view.row(b, h, n)));
        for (std::int64_t d = 0; d < view.dim(); ++d) floats.push_back(row + d);
      }
    }
  }
  return floats;
}
std::vector<float*> floats_of(std::span<const float> span) {
  std::vector<float*> floats;
  for (const float& x : span) floats.push_back(const_cast<float*>(&x));
  return floats;
}

TEST(Backward, ReferenceMatchesCentralDifferences) {
  for (int seed = 0; seed < 8; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    Problem problem = random_problem(random);
    CaseOptions options;
    options.head_dim = 6;
    options.value_dim = 5;
    options.modifiers = seed % 2 == 0;
    options.sources = seed % 4 >= 2;
    RandomPlanOptions plan_options;
    plan_options.query_orders = seed % 3 == 0;
    plan_options.key_orders = seed % 3 == 1;
    plan_options.derived_sources = options.sources;
    const KernelCase forward(random, RandomPlan(random, problem, plan_options).make(), options);
    const GradientCase c(random, forward, DType::f32, seed % 2 == 1);
    const GradientValues gradients = c.reference();
    const GradientValues magnitude = c.magnitudes();
    const AttentionInputs& inputs = forward.inputs;
    std::vector<std::vector<float*>> places{floats_of(inputs.q), floats_of(inputs.k), floats_of(inputs.v)};
    if (inputs.modifiers.key_bias.data != nullptr) places.push_back(floats_of(inputs.modifiers.key_bias));
    for (const KeySource& source : inputs.sources) {
      places.push_back(floats_of(source.k));
      places.push_back(floats_of(source.v));
    }
    places.push_back(floats_of(inputs.modifiers.sink_logits));
    for (const KeySource& source : inputs.sources) places.push_back(floats_of(source.log_weight));
    ASSERT_EQ(places.size(), gradients.tensors.size());
    for (std::size_t t = 0; t < places.size(); ++t) {
      ASSERT_EQ(places[t].size(), gradients.tensors[t].values.size());
      for (int sample = 0; sample < 25 && !places[t].empty(); ++sample) {
        const auto i = static_cast<std::size_t>(uniform(random, 0, static_cast<std::int64_t>(places[t].size()) - 1));
        // The saved O and LSE are rounded to f32; h^4 times a fifth derivative is of the same size.
        ASSERT_NEAR(gradients.tensors[t].values[i], difference(*places[t][i], forward, c),
                    2e-6 * (magnitude.tensors[t].values[i] + 1))
            << "seed " << seed << " " << gradients.tensors[t].name << " element " << i;
      }
    }
  }
}

/// Parts merged by LSE: each with the merged output and LSE gives its share of the whole.
TEST(Backward, PartsWithTheMergedLseAddUpToTheWhole) {
  Problem problem;
  problem.q_len = 40;
  problem.kv_len = 100;
  const auto part = [&](std::int64_t first, std::int64_t count) {
    PlanBuilder builder(problem, 40, 16, 1, 1);
    builder.run(first, count);
    builder.end_row();
    return std::move(builder).finish();
  };
  problem.head_dim = problem.value_dim = 16;
  CaseOptions options;
  options.head_dim = options.value_dim = 16;
  Random random(3);
  const KernelCase whole(random, part(0, 100), options);
  const GradientCase c(random, whole, DType::f32, false);
  const GradientValues expected = c.reference();
  std::vector<float> d_q(40 * 16);
  std::vector<float> sum(40 * 16, 0.0F);
  for (const auto& [first, count] : {std::pair{0, 37}, std::pair{37, 63}}) {
    Plan plan = part(first, count);
    Gradients gradients;
    gradients.d_q = mutable_view_of(d_q.data(), DType::f32, {1, 1, 40, 16});
    run_backward(plan, whole.inputs, c.saved, gradients);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += d_q[i];
  }
  for (std::size_t i = 0; i < sum.size(); ++i) EXPECT_NEAR(sum[i], expected.tensors[0].values[i], 1e-5);
}

TEST(Backward, NonFiniteInputsStayInTheirRowsAndKeys) {
  for (const DType dtype : kAllDtypes) {
    for (const int where : {0, 1, 2, 3}) {  // q, k, v, dO
      Random random(7);
      Problem problem;
      problem.q_len = problem.kv_len = 150;
      problem.head_dim = problem.value_dim = 64;
      problem.causal = true;
      CaseOptions options;
      options.dtype = dtype;
      KernelCase forward(random, dense_plan(problem, 128, 128), options);
      GradientCase c(random, forward, dtype, false);
      constexpr std::int64_t token = 77;
      OwnedTensor* const tensors[] = {&forward.q, &forward.k, &forward.v, &c.d_o()};
      store_from_float(tensors[where]->view.row(0, 0, token), dtype, 3, std::numeric_limits<float>::quiet_NaN());
      for (const TestedLevel& level : tested_levels()) {
        const GradientValues result = c.with(*level.kernels, false, DType::f32);
        const bool row_spoiled = where == 0 || where == 3;
        for (std::int64_t n = 0; n < 150; ++n) {
          const auto finite = [&](std::size_t tensor) {
            return std::isfinite(result.tensors[tensor].values[static_cast<std::size_t>(n * 64 + 3)]);
          };
          ASSERT_EQ(finite(0), row_spoiled ? n != token : n < token) << level.name << " d_q " << where << " " << n;
          if (row_spoiled) {
            ASSERT_EQ(finite(1), n > token) << level.name << " d_k " << where << " " << n;
            ASSERT_EQ(finite(2), n > token) << level.name << " d_v " << where << " " << n;
          } else {
            ASSERT_EQ(finite(1), n != token) << level.name << " d_k " << where << " " << n;
          }
        }
      }
    }
  }
}

TEST(Backward, RefusesWhatDoesNotFit) {
  Random random(1);
  Problem problem;
  problem.q_len = problem.kv_len = 20;
  problem.head_dim = problem.value_dim = 64;
  const KernelCase forward(random, dense_plan(problem), {});
  GradientCase c(random, forward, DType::f32, true);
  std::vector<float> d_q(20 * 64);
  Gradients gradients;
  gradients.d_q = mutable_view_of(d_q.data(), DType::f32, {1, 1, 20, 64});
  EXPECT_NO_THROW(run_backward(forward.plan, forward.inputs, c.saved, gradients));
  const auto refuses = [&](const SavedForward& saved, const Gradients& wanted, RunOptions options = {}) {
    EXPECT_THROW(run_backward(forward.plan, forward.inputs, saved, wanted, options), Error);
  };
  SavedForward saved = c.saved;
  saved.lse = saved.lse.subspan(1);
  refuses(saved, gradients);
  saved = c.saved;
  saved.d_lse = saved.d_lse.subspan(1);
  refuses(saved, gradients);
  saved = c.saved;
  saved.o.data = nullptr;
  refuses(saved, gradients);
  saved = c.saved;
  saved.d_o.shape[2] = 19;
  refuses(saved, gradients);
  Gradients wanted = gradients;
  wanted.d_q.dtype = DType::f64;
  refuses(c.saved, wanted);
  wanted = gradients;
  wanted.d_k = mutable_view_of(d_q.data(), DType::f32, {1, 1, 19, 64});
  refuses(c.saved, wanted);
  wanted = gradients;
  wanted.d_sink_logits = d_q;
  refuses(c.saved, wanted);
  wanted = gradients;
  wanted.sources.resize(1);
  refuses(c.saved, wanted);
  RunOptions options;
  options.kernel = KernelKind::split_key;
  refuses(c.saved, gradients, options);
}

}  // namespace
}  // namespace tessera::testing
