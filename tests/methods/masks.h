// Masks of plans, cut into (sequence, head) pieces, for the tests of methods.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "score/attention_case.h"
#include "tessera/method.h"

namespace tessera::test {

/// Pairs of one (sequence, query head): [queries][keys], 1 = computed.
struct HeadMask {
  std::int64_t queries = 0;
  std::int64_t keys = 0;
  std::vector<std::uint8_t> bits;

  bool at(std::int64_t n, std::int64_t j) const { return bits[n * keys + j] != 0; }
  friend bool operator==(const HeadMask&, const HeadMask&) = default;
};

inline HeadMask head_mask(const Plan& plan, const std::vector<std::uint8_t>& mask, std::int64_t s, std::int64_t h) {
  const Problem& problem = plan.problem;
  HeadMask head{problem.q_len_of(s), problem.kv_len_of(s), {}};
  for (std::int64_t n = 0; n < head.queries; ++n) {
    const std::int64_t row =
        (problem.tensor_batch_of(s) * problem.q_heads + h) * problem.q_len + problem.q_begin_of(s) + n;
    const auto* first = mask.data() + row * problem.kv_len + problem.kv_begin_of(s);
    head.bits.insert(head.bits.end(), first, first + head.keys);
  }
  return head;
}

/// Plans, validates and returns the masks of all (sequence, head) pairs, sequence by sequence.
inline std::vector<HeadMask> masks_of(const Method& method, const AttentionCase& input, int threads = 0,
                                      std::int64_t layer = 0) {
  PlanContext context;
  context.layer = layer;
  context.layers = layer + 1;
  context.run.threads = threads;
  const Plan plan = method.plan(input.problem, input.inputs, context);
  validate(plan);
  const auto mask = dense_mask(plan);
  std::vector<HeadMask> heads;
  for (std::int64_t s = 0; s < plan.problem.batch; ++s) {
    for (std::int64_t h = 0; h < plan.problem.q_heads; ++h) heads.push_back(head_mask(plan, mask, s, h));
  }
  return heads;
}

inline std::vector<HeadMask> masks_of(const std::string& spec, const AttentionCase& input, int threads = 0) {
  return masks_of(*make_method(spec), input, threads);
}

/// keep(sequence, head, query, key) as masks.
inline std::vector<HeadMask> masks_where(
    const AttentionCase& input,
    const std::function<bool(std::int64_t, std::int64_t, std::int64_t, std::int64_t)>& keep) {
  std::vector<HeadMask> heads;
  for (std::int64_t s = 0; s < input.problem.batch; ++s) {
    for (std::int64_t h = 0; h < input.problem.q_heads; ++h) {
      HeadMask head{input.problem.q_len_of(s), input.problem.kv_len_of(s), {}};
      for (std::int64_t n = 0; n < head.queries; ++n) {
        for (std::int64_t j = 0; j < head.keys; ++j) head.bits.push_back(keep(s, h, n, j) ? 1 : 0);
      }
      heads.push_back(std::move(head));
    }
  }
  return heads;
}

/// Every pair the problem allows.
inline std::vector<HeadMask> dense_masks(const AttentionCase& input) {
  return masks_where(
      input, [&](std::int64_t s, std::int64_t, std::int64_t n, std::int64_t j) { return input.allowed(s, n, j); });
}

/// Position of a query among the keys.
inline std::int64_t position(const AttentionCase& input, std::int64_t s, std::int64_t n) {
  return input.problem.q_offset_of(s) + n;
}

/// The whole budget computes exactly the pairs that the problem allows, for every kind of input of that causality.
inline void expect_full_budget_is_dense(const Method& method, const AttentionCase& input) {
  EXPECT_TRUE(masks_of(method, input) == dense_masks(input)) << method.info().name << " " << method.parameters();
}

/// Plans are valid and independent of the number of threads, and a query that may see a key keeps one.
inline void expect_plans_hold(const Method& method, const AttentionCase& input) {
  SCOPED_TRACE(method.info().name + " " + method.parameters());
  PlanContext one;
  one.run.threads = 1;
  PlanContext two;
  two.run.threads = 2;
  const Plan plan = method.plan(input.problem, input.inputs, one);
  EXPECT_NO_THROW(validate(plan));
  EXPECT_TRUE(plan == method.plan(input.problem, input.inputs, two));
  const auto mask = dense_mask(plan);
  for (std::int64_t s = 0; s < plan.problem.batch; ++s) {
    for (std::int64_t h = 0; h < plan.problem.q_heads; ++h) {
      const HeadMask head = head_mask(plan, mask, s, h);
      for (std::int64_t n = 0; n < head.queries; ++n) {
        bool keeps = false;
        for (std::int64_t j = 0; j < head.keys; ++j) keeps = keeps || head.at(n, j);
        const bool sees = head.keys > 0 && input.allowed(s, n, 0);
        ASSERT_EQ(keeps, sees) << "sequence " << s << ", head " << h << ", query " << n;
      }
    }
  }
}

}  // namespace tessera::test
