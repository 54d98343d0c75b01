// What must hold for every method, over every kind of input.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::masks_of;

/// Specs that select little on the small cases, so that the selection really happens.
const std::vector<std::string> kSparseSpecs{"dense",
                                            "window:left=40",
                                            "streaming:n_init=4,n_local=50",
                                            "streaming:n_init=70,n_local=30,n_last=9",
                                            "oracle-topk:k=2,block_q=32,block_k=32",
                                            "oracle-topk:unit=token,k=10,block_q=16,forced=outside",
                                            "oracle-topk:rule=topp,p=0.6,block_k=16,sinks=3,local=20,last_rows=2",
                                            "oracle-topk:unit=token,rule=topp,p=0.5,block_q=1,diagonal=false",
                                            "xattention:stride=8,tau=0.6,block=32",
                                            "xattention:stride=16,tau=0.3,block=64,dense_below=50",
                                            "minference:v=5,sl=5",
                                            "moa:alpha=-100,beta=0.5",
                                            "psa:block_q=32,block_k=32,end_1=0.2,end_2=0.4",
                                            "psa:block_q=64,block_k=16,rule=topk,end_1=0.1,sample=2",
                                            "gna:window=20,stride=8",
                                            "gna:window=10,stride=3,dilation=2",
                                            "minference:pattern=stream_llm,n_init=10,n_local=40",
                                            "minference:pattern=block_sparse,k=2"};

/// Specs whose budget is the whole sequence.
const std::vector<std::string> kFullSpecs{"dense",
                                          "window:left=-1,right=-1",
                                          "window:left=100000,right=100000",
                                          "streaming:n_local=100000",
                                          "streaming:n_init=100000,n_local=1",
                                          "streaming:n_init=0,n_local=1,n_last=100000",
                                          "oracle-topk:k=100000",
                                          "oracle-topk:k=100000,block_q=7,block_k=11",
                                          "oracle-topk:rule=topp,p=1",
                                          "oracle-topk:unit=token,k=100000,block_q=16",
                                          "oracle-topk:unit=token,rule=topp,p=1",
                                          "oracle-topk:k=1,dense_below=1000000",
                                          "xattention:tau=1",
                                          "xattention:tau=1,stride=1,block=16",
                                          "xattention:tau=0,dense_below=1000000",
                                          "moa:alpha=0,beta=1",
                                          "paro:density=1,block=16",
                                          "draft:sparsity=0",
                                          "pisa:density=1",
                                          "pisa:density=1,block=16,value_aware=false",
                                          "sla:critical=1,negligible=0",
                                          "psa:end_1=1,end_2=1,end_4=1,end_8=1",
                                          "psa:block_q=32,block_k=16,rule=topk,end_1=1,end_2=1,end_4=1,end_8=1",
                                          "gna:window=0,stride=1",
                                          "gna:window=100000,stride=64,tile_q=9,tile_k=7",
                                          "minference:v=100000,sl=50",
                                          "minference:v=30,sl=100000",
                                          "minference:v=30,sl=50,dense_layers=1",
                                          "minference:pattern=stream_llm,n_init=0,n_local=100000",
                                          "minference:pattern=block_sparse,k=100000"};

class AllMethods : public testing::TestWithParam<CaseShape> {};

/// Patterns whose queries may legitimately see nothing: a window that ends before a query placed beyond the last key.
bool may_be_empty(const std::string& spec, const AttentionCase& input) {
  const bool pattern =
      spec.starts_with("window") || spec.starts_with("streaming") || spec.find("stream_llm") != std::string::npos;
  if (!pattern) return false;
  for (std::int64_t s = 0; s < input.problem.batch; ++s) {
    const std::int64_t last = input.problem.q_offset_of(s) + input.problem.q_len_of(s) - 1;
    if (!input.problem.causal || last >= input.problem.kv_len_of(s)) return true;
  }
  return false;
}

/// Whether a method reads learned weights or the like, which these cases do not have.
bool needs_more(const MethodInfo& info) {
  return std::any_of(info.side.begin(), info.side.end(), [](const SideInputInfo& side) { return side.required; });
}

/// The sparse specs, and every registered method with its defaults that needs nothing beside q, k, v.
std::vector<std::string> specs_to_hold() {
  std::vector<std::string> specs = kSparseSpecs;
  for (const MethodEntry& entry : methods()) {
    if (entry.info.has_plan && !needs_more(entry.info)) specs.push_back(entry.info.name);
  }
  return specs;
}

TEST_P(AllMethods, FullBudgetIsDense) {
  const AttentionCase input(GetParam());
  for (const std::string& spec : kFullSpecs) {
    const auto method = make_method(spec);
    if (method->info().domain.contains(input.problem)) test::expect_full_budget_is_dense(*method, input);
  }
}

TEST_P(AllMethods, PlansAreValidIndependentOfThreadsAndNeverEmpty) {
  const AttentionCase input(GetParam());
  for (const std::string& spec : specs_to_hold()) {
    const auto method = make_method(spec);
    if (!method->info().domain.contains(input.problem)) {
      EXPECT_THROW(method->plan(input.problem, input.inputs, {}), Error) << spec;
    } else if (!may_be_empty(spec, input)) {
      test::expect_plans_hold(*method, input);
    } else {
      EXPECT_NO_THROW(validate(method->plan(input.problem, input.inputs, {}))) << spec;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, AllMethods, testing::ValuesIn(test::all_shapes()),
                         [](const auto& shape) { return shape.param.name; });

/// Copies the values of sequence `from` of one case over sequence `to` of another.
void copy_sequence(const AttentionCase& a, std::int64_t from, AttentionCase& b, std::int64_t to) {
  for (std::int64_t h = 0; h < b.problem.q_heads; ++h) {
    for (std::int64_t n = 0; n < b.problem.q_len_of(to); ++n) {
      for (std::int64_t d = 0; d < b.problem.head_dim; ++d) b.set_q(to, h, n, d, a.q(from, h, n, d));
    }
  }
  for (std::int64_t h = 0; h < b.problem.kv_heads; ++h) {
    for (std::int64_t n = 0; n < b.problem.kv_len_of(to); ++n) {
      for (std::int64_t d = 0; d < b.problem.head_dim; ++d) b.set_k(to, h, n, d, a.k(from, h, n, d));
    }
  }
}

TEST(AllMethods, SelectionIsPerSequence) {
  const AttentionCase together(
      {.name = "varlen", .q_heads = 2, .kv_heads = 2, .q_lens = {130, 70, 33}, .kv_lens = {260, 70, 99}});
  for (const std::string& spec : kSparseSpecs) {
    const auto masks = masks_of(spec, together);
    for (std::int64_t s = 0; s < 3; ++s) {
      AttentionCase alone({.name = "one",
                           .q_heads = 2,
                           .kv_heads = 2,
                           .q_len = together.problem.q_len_of(s),
                           .kv_len = together.problem.kv_len_of(s)});
      copy_sequence(together, s, alone, 0);
      const auto expected = masks_of(spec, alone);
      for (std::int64_t h = 0; h < 2; ++h) {
        EXPECT_TRUE(masks[s * 2 + h] == expected[h]) << spec << ", sequence " << s << ", head " << h;
      }
    }
  }
}

TEST(AllMethods, LayoutAndPagesDoNotMatter) {
  const AttentionCase plain({.name = "plain", .batch = 2, .q_len = 150, .kv_len = 250});
  for (const CaseShape& shape :
       {CaseShape{.name = "bnhd", .batch = 2, .q_len = 150, .kv_len = 250, .layout = Layout::bnhd},
        CaseShape{.name = "paged", .batch = 2, .q_len = 150, .kv_len = 250, .page_size = 32}}) {
    AttentionCase other(shape, 2);
    for (std::int64_t s = 0; s < 2; ++s) copy_sequence(plain, s, other, s);
    for (const std::string& spec : kSparseSpecs) {
      EXPECT_TRUE(masks_of(spec, plain) == masks_of(spec, other)) << spec << ", " << shape.name;
    }
  }
}

TEST(AllMethods, QueryHeadsOfAGroupSelectForThemselves) {
  const AttentionCase input({.name = "group", .q_heads = 4, .kv_heads = 1, .q_len = 900, .kv_len = 900});
  for (const std::string spec :
       {"oracle-topk:k=2,block_q=32,block_k=32", "xattention:stride=8,tau=0.5,block=32", "minference:v=60,sl=130"}) {
    const auto masks = masks_of(spec, input);
    EXPECT_FALSE(masks[0] == masks[1]) << spec;
  }
}

TEST(AllMethods, UndefinedAndHugeScoresNeverEmptyAPlan) {
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30F}) {
    AttentionCase input({.name = "bad", .q_len = 300, .kv_len = 300});
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, 120, d, value);
    for (const std::string& spec : kSparseSpecs) {
      const auto masks = masks_of(spec, input);
      for (const auto& mask : masks) {
        for (std::int64_t n = 0; n < mask.queries; ++n) {
          bool keeps = false;
          for (std::int64_t j = 0; j <= n; ++j) keeps = keeps || mask.at(n, j);
          ASSERT_TRUE(keeps) << spec << ", value " << value << ", query " << n;
        }
      }
    }
  }
}

TEST(AllMethods, UndefinedScoresAreKept) {
  AttentionCase input({.name = "nan", .q_heads = 1, .q_len = 300, .kv_len = 300});
  input.set_k(0, 0, 120, 3, std::numeric_limits<float>::quiet_NaN());
  for (const std::string spec :
       {"oracle-topk:k=1,block_q=32,block_k=32", "oracle-topk:unit=token,k=1,block_q=32", "xattention:tau=0.1",
        "minference:v=30,sl=50", "minference:pattern=block_sparse,k=1"}) {
    EXPECT_TRUE(masks_of(spec, input)[0].at(299, 120)) << spec;
  }
}

TEST(AllMethods, UniformScoresPlanEveryRow) {
  AttentionCase input({.name = "uniform", .q_heads = 1, .q_len = 300, .kv_len = 300});
  for (std::int64_t n = 0; n < 300; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) input.set_k(0, 0, n, d, 0);
  }
  for (const std::string& spec : kSparseSpecs) {
    const auto mask = masks_of(spec, input)[0];
    for (std::int64_t n = 0; n < 300; ++n) {
      bool keeps = false;
      for (std::int64_t j = 0; j <= n; ++j) keeps = keeps || mask.at(n, j);
      ASSERT_TRUE(keeps) << spec << ", query " << n;
    }
  }
}

TEST(AllMethods, PlantedNeedleIsKept) {
  // One key far from every window answers all queries.
  AttentionCase input({.name = "needle", .q_heads = 1, .q_len = 640, .kv_len = 640});
  for (std::int64_t n = 0; n < 640; ++n) input.set_q(0, 0, n, 0, 6);
  input.set_k(0, 0, 200, 0, 12);
  for (const std::string spec :
       {"oracle-topk:k=3,block_q=64,block_k=64", "oracle-topk:unit=token,k=2,block_q=64,forced=outside",
        "oracle-topk:rule=topp,p=0.5", "xattention:tau=0.5,stride=8,block=64", "minference:v=40,sl=50",
        "minference:pattern=block_sparse,k=3"}) {
    const auto mask = masks_of(spec, input)[0];
    for (std::int64_t n = 200; n < 640; ++n) ASSERT_TRUE(mask.at(n, 200)) << spec << ", query " << n;
  }
}

TEST(AllMethods, AttendRunsThePlanThatItReports) {
  const AttentionCase input({.name = "attend", .q_len = 70, .kv_len = 130});
  const Problem& problem = input.problem;
  std::vector<float> o(static_cast<std::size_t>(problem.q_heads * problem.q_len * problem.value_dim));
  std::vector<float> lse(static_cast<std::size_t>(problem.q_heads * problem.q_len));
  const AttentionOutputs outputs{
      mutable_view_of(o.data(), DType::f32, {1, problem.q_heads, problem.q_len, problem.value_dim}), lse};
  PlanContext context;
  context.run.kernel = KernelKind::reference;
  Plan executed;
  const auto method = make_method("oracle-topk:k=1,block_q=32,block_k=32,forced=outside");
  method->attend(problem, input.inputs, outputs, context, &executed);
  EXPECT_TRUE(executed == method->plan(problem, input.inputs, context));
  // exp(lse of the plan - lse of dense) = retained mass: below 1, never above.
  const auto mask = test::head_mask(executed, dense_mask(executed), 0, 1);
  for (std::int64_t n = 0; n < problem.q_len; ++n) {
    const auto p = input.probabilities(0, 1, n);
    std::vector<double> expected(static_cast<std::size_t>(problem.value_dim));
    double sum = 0;
    for (std::int64_t j = 0; j < problem.kv_len; ++j) {
      if (!mask.at(n, j)) continue;
      sum += p[j];
      for (std::int64_t d = 0; d < problem.value_dim; ++d) {
        expected[d] += p[j] * load_as_float(input.inputs.v.row(0, 0, j), DType::f32, d);
      }
    }
    for (std::int64_t d = 0; d < problem.value_dim; ++d) {
      ASSERT_NEAR(o[(problem.q_len + n) * problem.value_dim + d], expected[d] / sum, 1e-4);
    }
  }
}

TEST(AllMethods, BudgetParametersRunFromLittleWorkToMuch) {
  const AttentionCase causal({.name = "causal", .q_len = 300, .kv_len = 300});
  const AttentionCase bidirectional({.name = "bidirectional", .q_len = 300, .kv_len = 300, .causal = false});
  for (const MethodEntry& entry : methods()) {
    if (!entry.info.budget || needs_more(entry.info)) continue;
    const BudgetParameter& budget = *entry.info.budget;
    SCOPED_TRACE(entry.info.name + " " + budget.name);
    const auto declared = std::find_if(entry.parameters.begin(), entry.parameters.end(),
                                       [&](const ParameterInfo& parameter) { return parameter.name == budget.name; });
    ASSERT_TRUE(declared != entry.parameters.end());
    const AttentionCase& input = entry.info.domain.causal ? causal : bidirectional;
    const auto density = [&](double value) {
      const std::string text = declared->type == "int" ? fmt::format("{:.0f}", value) : fmt::format("{}", value);
      const auto method = make_method(entry.info.name + ":" + budget.name + "=" + text);
      return entry.info.phases.prefill ? statistics(method->plan(input.problem, input.inputs, {})).density : 0;
    };
    EXPECT_LE(density(budget.sparsest), density(budget.densest));
    if (budget.logarithmic) {
      EXPECT_TRUE(budget.sparsest > 0 && budget.densest > 0);
    }
  }
}

}  // namespace
}  // namespace tessera
