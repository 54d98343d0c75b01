#include "support/verify.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "support/bare_plan.h"
#include "tessera/eval.h"

namespace tessera::cli {
namespace {

class Verify : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    HeadOptions options;
    options.kind = "randn";
    options.tokens = 70;
    options.q_heads = 4;
    options.kv_heads = 2;
    options.head_dim = 16;
    data_ = make_heads(options);
    data_.problem.causal = true;
    plan_ = make_bare_plan(GetParam(), data_.problem).plan;
    inputs_.q = data_.q();
    inputs_.k = data_.k();
    inputs_.v = data_.v();
    o_.resize(4 * 70 * 16);
    lse_.resize(4 * 70);
    run(plan_, inputs_, outputs());
  }
  AttentionOutputs outputs() { return {mutable_view_of(o_.data(), DType::f32, {1, 4, 70, 16}), lse_}; }
  void verify() { verify_samples("the plan", plan_, inputs_, outputs()); }

  HeadData data_;
  Plan plan_;
  AttentionInputs inputs_;
  std::vector<float> o_;
  std::vector<float> lse_;
};

TEST_P(Verify, AcceptsTheRightAnswer) {
  EXPECT_NO_THROW(verify());
}

TEST_P(Verify, RefusesWrongOutput) {
  o_[5] += 0.1F;  // first row of the first head: always sampled
  EXPECT_THROW(verify(), Error);
}

TEST_P(Verify, RefusesNan) {
  o_.back() = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(verify(), Error);
}

TEST_P(Verify, RefusesWrongLse) {
  lse_[0] += 0.01F;
  EXPECT_THROW(verify(), Error);
  lse_[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(verify(), Error);
}

TEST_P(Verify, RefusesTheAnswerOfAnotherPlan) {
  run(make_bare_plan("window:size=3", data_.problem).plan, inputs_, outputs());
  EXPECT_THROW(verify(), Error);
}

INSTANTIATE_TEST_SUITE_P(Plans, Verify,
                         testing::Values("dense", "random-block:tile=16,density=0.4", "random-token:tile=8,density=0.3",
                                         "per-query:blocks=2,block=16"));

}  // namespace
}  // namespace tessera::cli
