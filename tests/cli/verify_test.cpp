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

TEST_P(Verify, RefusesWrongGradients) {
  SavedForward saved;
  saved.o = outputs().o;
  saved.lse = lse_;
  saved.d_o = data_.q();  // anything of that shape
  std::vector<float> d_q(o_.size());
  Gradients gradients;
  gradients.d_q = mutable_view_of(d_q.data(), DType::f32, {1, 4, 70, 16});
  run_backward(plan_, inputs_, saved, gradients);
  EXPECT_NO_THROW(verify_gradient_samples("the plan", plan_, inputs_, saved, gradients.d_q));
  const float kept = d_q[69 * 16 + 3];  // last row of the first head: always sampled
  d_q[69 * 16 + 3] += 1;
  EXPECT_THROW(verify_gradient_samples("the plan", plan_, inputs_, saved, gradients.d_q), Error);
  d_q[69 * 16 + 3] = kept;
  d_q[69 * 16 + 4] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(verify_gradient_samples("the plan", plan_, inputs_, saved, gradients.d_q), Error);
}

INSTANTIATE_TEST_SUITE_P(Plans, Verify,
                         testing::Values("dense", "random-block:tile=16,density=0.4", "random-token:tile=8,density=0.3",
                                         "per-query:blocks=2,block=16"));

}  // namespace
}  // namespace tessera::cli
