// Random problems and valid random plans of every kind, from a seed; and the naive truth about them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "tessera/plan.h"

namespace tessera::testing {

using Random = std::mt19937_64;

/// Uniform integer in [low, high].
inline std::int64_t uniform(Random& random, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
}
inline bool chance(Random& random, int percent) {
  return uniform(random, 0, 99) < percent;
}

inline std::string describe(const Problem& problem) {
  return fmt::format("batch {} heads {}/{} q_len {} kv_len {} causal {} q_offset {} cu_q {} cu_k {}", problem.batch,
                     problem.q_heads, problem.kv_heads, problem.q_len, problem.kv_len, problem.causal,
                     problem.q_offset ? std::to_string(*problem.q_offset) : "none", problem.cu_seqlens_q,
                     problem.cu_seqlens_k);
}
inline std::string describe(const Plan& plan) {
  return fmt::format("{} tiles {} x {} plan_heads {} plan_sequences {} query_order {} key_order {} entries {}",
                     describe(plan.problem), plan.tile_q, plan.tile_k, plan.plan_heads, plan.plan_sequences,
                     plan.query_order.size(), plan.key_order.size(), plan.entries.size());
}

/// Small problems with every feature: GQA, causality with odd offsets, variable lengths (empty sequences too).
inline Problem random_problem(Random& random) {
  Problem problem;
  problem.batch = uniform(random, 1, 3);
  problem.kv_heads = uniform(random, 1, 2);
  problem.q_heads = problem.kv_heads * uniform(random, 1, 3);
  problem.head_dim = 16;
  problem.value_dim = 24;
  problem.causal = chance(random, 60);
  if (chance(random, 30)) {
    problem.cu_seqlens_q = {0};
    problem.cu_seqlens_k = {0};
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      problem.cu_seqlens_q.push_back(problem.cu_seqlens_q.back() + uniform(random, 0, 40));
      problem.cu_seqlens_k.push_back(problem.cu_seqlens_k.back() + uniform(random, 0, 90));
    }
    problem.q_len = problem.cu_seqlens_q.back();
    problem.kv_len = problem.cu_seqlens_k.back();
  } else {
    problem.q_len = uniform(random, 1, 60);
    problem.kv_len = uniform(random, 1, 150);
  }
  if (chance(random, 40)) problem.q_offset = uniform(random, -30, 180);
  return problem;
}

/// Whether the hard mask lets the query see the key, both counted in their sequence.
inline bool allowed(const Problem& problem, std::int64_t sequence, std::int64_t query, std::int64_t key) {
  return !problem.causal || key <= problem.q_offset_of(sequence) + query;
}

/// The hard mask in the shape of dense_mask().
inline std::vector<std::uint8_t> allowed_mask(const Problem& problem) {
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(batch * problem.q_heads * problem.q_len * problem.kv_len));
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < problem.q_heads; ++h) {
      for (std::int64_t q = 0; q < problem.q_len_of(s); ++q) {
        for (std::int64_t k = 0; k < problem.kv_len_of(s); ++k) {
          const std::int64_t row =
              (problem.tensor_batch_of(s) * problem.q_heads + h) * problem.q_len + problem.q_begin_of(s) + q;
          mask[row * problem.kv_len + problem.kv_begin_of(s) + k] = allowed(problem, s, q, k);
        }
      }
    }
  }
  return mask;
}

struct RandomPlanOptions {
  std::int64_t tile_q = 0;    ///< 0: random
  bool query_orders = false;  ///< permutations and subsets
  bool key_orders = false;
  bool derived_sources = false;
};

/// Builds one random plan row by row; the result is valid.
class RandomPlan {
 public:
  RandomPlan(Random& random, const Problem& problem, const RandomPlanOptions& options)
      : random_(random), problem_(problem), options_(options) {}

  Plan make() {
    const std::int64_t tile_q = options_.tile_q != 0 ? options_.tile_q : pick({1, 3, 8, 16, 64});
    const std::int64_t tile_k = pick({1, 4, 16, 32, 64, 70});
    const std::int64_t heads = pick({1, problem_.kv_heads, problem_.q_heads});
    const std::int64_t sequences = problem_.variable_length() ? problem_.batch : pick({1, problem_.batch});
    PlanBuilder builder(problem_, tile_q, tile_k, heads, sequences);
    const std::int64_t band_left = uniform(random_, 0, 40);
    const std::int64_t band_right = problem_.causal ? 0 : uniform(random_, -1, 20);
    bands_ = {builder.add_band({-1, 0}), builder.add_band({band_left, band_right})};
    if (options_.derived_sources) {
      builder.add_source({"pooled", 10, false});
      builder.add_source({"sampled", 20, true});
    }
    for (std::int64_t block = 0; block < builder.blocks(); ++block) {
      const std::int64_t sequence = block / heads;
      queries_ = order(problem_.q_len_of(sequence), options_.query_orders, true);
      keys_ = order(problem_.kv_len_of(sequence), options_.key_orders, false);
      if (options_.query_orders)
        builder.set_query_order(block, ordered_queries_ ? queries_ : std::vector<std::int32_t>{});
      if (options_.key_orders) builder.set_key_order(block, ordered_keys_ ? keys_ : std::vector<std::int32_t>{});
      offset_ = problem_.q_offset_of(sequence);
      for (std::int64_t tile = 0; tile < builder.query_tiles(block); ++tile) {
        add_row(builder, tile);
        builder.end_row();
      }
    }
    return std::move(builder).finish();
  }

 private:
  std::int64_t pick(const std::vector<std::int64_t>& values) {
    return values[static_cast<std::size_t>(uniform(random_, 0, static_cast<std::int64_t>(values.size()) - 1))];
  }

  std::vector<std::int32_t> order(std::int64_t tokens, bool permute, bool subset) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(tokens));
    std::iota(order.begin(), order.end(), 0);
    const bool ordered = permute && tokens > 0 && chance(random_, 80);
    (subset ? ordered_queries_ : ordered_keys_) = ordered;
    if (!ordered) return order;
    std::shuffle(order.begin(), order.end(), random_);
    if (subset && chance(random_, 50)) order.resize(static_cast<std::size_t>(uniform(random_, 1, tokens)));
    return order;
  }

  bool visible(std::int64_t row_place, std::int64_t key_place) const {
    return !problem_.causal || keys_[key_place] <= offset_ + queries_[row_place];
  }

  /// Cuts the keys into stretches and says about each: skip, or an entry of some kind under some mask.
  void add_row(PlanBuilder& builder, std::int64_t tile) {
    const auto keys = static_cast<std::int64_t>(keys_.size());
    const std::int64_t first = tile * builder.tile_q();
    const std::int64_t rows = std::min(builder.tile_q(), static_cast<std::int64_t>(queries_.size()) - first);
    if (chance(random_, 10)) return;
    if (options_.derived_sources) add_derived(builder);
    for (std::int64_t begin = 0; begin < keys;) {
      std::int64_t end = std::min(keys, begin + uniform(random_, 1, 50));
      if (chance(random_, 40)) {  // end on a tile border so that tile entries occur
        end = std::min(keys, (begin / builder.tile_k() + 1) * builder.tile_k());
      }
      if (!chance(random_, 40)) add_stretch(builder, first, rows, begin, end);
      begin = end;
    }
  }

  void add_derived(PlanBuilder& builder) {
    builder.run(uniform(random_, 0, 4), uniform(random_, 1, 5), EntryMask::none, 0, 1);
    const std::vector<std::int32_t> sampled = {1, 3, 3, 19};
    builder.gather(builder.add_tokens(sampled), 4, EntryMask::none, 0, 2);
  }

  void add_stretch(PlanBuilder& builder, std::int64_t first, std::int64_t rows, std::int64_t begin, std::int64_t end) {
    std::vector<std::int32_t> tokens;
    const bool gather = chance(random_, 35);
    for (std::int64_t k = begin; k < end; ++k) {
      if (!gather || chance(random_, 60)) tokens.push_back(static_cast<std::int32_t>(k));
    }
    if (tokens.empty()) return;
    bool all_visible = true;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (const std::int32_t token : tokens) all_visible = all_visible && visible(first + r, token);
    }
    const std::int64_t choice = uniform(random_, 0, 2);
    if (choice == 0 && all_visible) {
      add(builder, gather, tokens, EntryMask::none, 0);
    } else if (choice == 1) {
      add(builder, gather, tokens, EntryMask::band, bands_[static_cast<std::size_t>(uniform(random_, 0, 1))]);
    } else {
      // One bitmask, or two that share out the pairs: overlapping entries are valid when no pair is covered twice.
      const bool split = chance(random_, 25);
      const std::int64_t words = (static_cast<std::int64_t>(tokens.size()) + 63) / 64;
      std::vector<std::uint64_t> one(static_cast<std::size_t>(rows * words));
      std::vector<std::uint64_t> other(one.size());
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::size_t i = 0; i < tokens.size(); ++i) {
          if (!visible(first + r, tokens[i]) || chance(random_, 40)) continue;
          auto& bits = split && chance(random_, 50) ? other : one;
          bits[r * words + static_cast<std::int64_t>(i) / 64] |= std::uint64_t{1} << (i % 64);
        }
      }
      add(builder, gather, tokens, EntryMask::bitmask, builder.add_mask(one));
      if (split) add(builder, gather, tokens, EntryMask::bitmask, builder.add_mask(other));
    }
  }

  void add(PlanBuilder& builder, bool gather, const std::vector<std::int32_t>& tokens, EntryMask mask,
           std::int64_t mask_index) {
    const auto count = static_cast<std::int64_t>(tokens.size());
    const std::int64_t begin = tokens.front();
    const std::int64_t tile_k = builder.tile_k();
    const bool ends_on_tile = (begin + count) % tile_k == 0 || begin + count == static_cast<std::int64_t>(keys_.size());
    if (gather) {
      builder.gather(builder.add_tokens(tokens), count, mask, mask_index);
    } else if (begin % tile_k == 0 && ends_on_tile) {
      builder.tiles(begin / tile_k, (count + tile_k - 1) / tile_k, mask, mask_index);
    } else {
      builder.run(begin, count, mask, mask_index);
    }
  }

  Random& random_;
  const Problem& problem_;
  RandomPlanOptions options_;
  std::vector<std::int64_t> bands_;
  std::vector<std::int32_t> queries_;  ///< original query at each place of the block
  std::vector<std::int32_t> keys_;
  bool ordered_queries_ = false;
  bool ordered_keys_ = false;
  std::int64_t offset_ = 0;
};

inline Plan random_plan(Random& random, const Problem& problem, const RandomPlanOptions& options = {}) {
  return RandomPlan(random, problem, options).make();
}

}  // namespace tessera::testing
