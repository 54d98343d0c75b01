// Rows outside a query subset are in no tile of the plan: output 0, LSE -inf.
#include <algorithm>
#include <limits>

#include "kernels/kernels.h"

namespace tessera::kernels {

namespace {

bool has_query_subset(const Plan& plan) {
  for (std::size_t block = 0; block < plan.query_order.size(); ++block) {
    const auto& order = plan.query_order[block];
    const auto queries = plan.problem.q_len_of(plan.sequence_of_block(static_cast<std::int64_t>(block)));
    if (!order.empty() && static_cast<std::int64_t>(order.size()) < queries) return true;
  }
  return false;
}

}  // namespace

void clear_uncovered_rows(const Call& call) {
  if (!has_query_subset(call.plan)) return;
  const Problem& problem = call.problem();
  for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      for (std::int64_t query = 0; query < problem.q_len_of(sequence); ++query) {
        std::byte* o = call.query_row(call.outputs.o, sequence, head, query);
        std::fill_n(o, static_cast<std::size_t>(problem.value_dim) * size_of(call.outputs.o.dtype), std::byte{0});
        const auto index = static_cast<std::size_t>(call.lse_index(sequence, head, query));
        for (const std::span<float> values : {call.outputs.lse, call.outputs.row_maximum}) {
          if (!values.empty()) values[index] = -std::numeric_limits<float>::infinity();
        }
      }
    }
  }
}

}  // namespace tessera::kernels
