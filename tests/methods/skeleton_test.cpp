// The skeleton that newcomers copy compiles and does what it says. It is not in the library's registry.
#include "../examples/skeleton_method.cpp"  // NOLINT(bugprone-suspicious-include): the example is the thing tested

#include <gtest/gtest.h>

#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;

TEST(Skeleton, HoldsWhatEveryMethodHolds) {
  const auto method = method_files::skeleton_method().make(R"({"keep": 4096})");
  for (const test::CaseShape& shape : test::all_shapes()) {
    const AttentionCase input(shape);
    test::expect_full_budget_is_dense(*method, input);
    test::expect_plans_hold(*method_files::skeleton_method().make(R"({"keep": 2})"), input);
  }
}

TEST(Skeleton, KeepsThePlantedNeedle) {
  AttentionCase input({.name = "needle", .q_heads = 1, .q_len = 640, .kv_len = 640});
  for (std::int64_t n = 0; n < 640; ++n) input.set_q(0, 0, n, 0, 6);
  input.set_k(0, 0, 200, 0, 300);
  const auto mask = test::masks_of(*method_files::skeleton_method().make(R"({"keep": 3})"), input)[0];
  for (std::int64_t n = 256; n < 640; ++n) {
    ASSERT_TRUE(mask.at(n, 200)) << "query " << n;
    ASSERT_TRUE(mask.at(n, 0) && mask.at(n, n)) << "query " << n;
  }
}

TEST(Skeleton, DeclaresItsParameters) {
  EXPECT_THROW(method_files::skeleton_method().make(R"({"keep": 0})"), Error);
  EXPECT_THROW(method_files::skeleton_method().make(R"({"keeps": 1})"), Error);
}

}  // namespace
}  // namespace tessera
