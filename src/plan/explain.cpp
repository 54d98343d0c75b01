// A plan in a few lines of text.
#include <algorithm>
#include <array>
#include <iterator>
#include <string>

#include <fmt/format.h>

#include "tessera/plan.h"

namespace tessera {

namespace {

/// A number with a unit prefix: 1536 -> "1.54 k".
std::string scaled(double value) {
  constexpr std::array prefixes = {"", "k", "M", "G", "T", "P", "E"};
  std::size_t i = 0;
  for (; value >= 1000 && i + 1 < prefixes.size(); ++i) value /= 1000;
  return fmt::format("{:.3g} {}", value, prefixes[i]);
}

struct Kinds {
  std::array<std::int64_t, 3> by_kind{};  ///< EntryKind
  std::array<std::int64_t, 3> by_mask{};  ///< EntryMask
};

Kinds count_kinds(const Plan& plan) {
  Kinds kinds;
  for (const PlanEntry& entry : plan.entries) {
    ++kinds.by_kind[static_cast<std::size_t>(entry.kind)];
    ++kinds.by_mask[static_cast<std::size_t>(entry.mask)];
  }
  return kinds;
}

}  // namespace

std::string explain(const Plan& plan) {
  const Problem& problem = plan.problem;
  const PlanStatistics numbers = statistics(plan);
  const Kinds kinds = count_kinds(plan);
  std::string text;
  const auto line = [&]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
    fmt::format_to(std::back_inserter(text), format, std::forward<Args>(args)...);
    text += '\n';
  };

  line("{} {} of {} queries x {} keys, {} query heads on {} kv heads, dim {}/{}{}", problem.batch,
       problem.variable_length() ? "sequences (variable length)" : "sequence(s)", problem.q_len, problem.kv_len,
       problem.q_heads, problem.kv_heads, problem.head_dim, problem.value_dim, problem.causal ? ", causal" : "");
  const bool all_heads = plan.plan_heads == problem.q_heads;
  line("tiles {} x {}, {} rows: {}{}", plan.tile_q, plan.tile_k, plan.rows(),
       plan.plan_heads == 1 && !all_heads ? "one set for all heads"
       : all_heads                        ? "one set per query head"
                                          : "one set per GQA group",
       plan.plan_sequences == 1 ? "" : " and sequence");
  line("{} entries ({} tile, {} run, {} gather; {} under a band, {} under a bitmask), {} rows empty", numbers.entries,
       kinds.by_kind[0], kinds.by_kind[1], kinds.by_kind[2], kinds.by_mask[1], kinds.by_mask[2], numbers.empty_rows);
  if (!plan.query_order.empty() || !plan.key_order.empty()) {
    line("reordered: {}{}{}", plan.query_order.empty() ? "" : "queries",
         plan.query_order.empty() || plan.key_order.empty() ? "" : " and ", plan.key_order.empty() ? "" : "keys");
  }
  for (std::size_t s = 1; s < plan.sources.size(); ++s) {
    line("source {}: {}, {} keys{}", s, plan.sources[s].name, plan.sources[s].keys,
         plan.sources[s].repeats_allowed ? ", repeats allowed" : "");
  }
  line("density {:.2f}% planned, {:.2f}% executed ({}pairs of {})", 100 * numbers.density,
       100 * numbers.executed_density, scaled(static_cast<double>(numbers.executed_pairs)),
       scaled(static_cast<double>(numbers.allowed_pairs)));
  std::vector<double> heads = numbers.head_density;
  std::sort(heads.begin(), heads.end());
  line("per head: min {:.2f}%, median {:.2f}%, max {:.2f}%", 100 * heads.front(), 100 * heads[heads.size() / 2],
       100 * heads.back());
  line("{}FLOP, {:.2f}% of dense; {}B of keys and values; plan memory {}B", scaled(numbers.flops),
       100 * numbers.executed_density, scaled(numbers.kv_bytes), scaled(static_cast<double>(plan.memory_bytes())));
  return text;
}

}  // namespace tessera
