// Pages of the cache by an upper bound of their products with the query.
//
// Quest (Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv:2406.10774). Per page of 16 keys,
// kv head and channel: M_d = max k_d and m_d = min k_d over the keys of the page (as cached, after RoPE). A decoded
// query scores page b by u_b = sum_d max(q_d M_d, q_d m_d) >= every q.k in it, and attends exactly to budget / page
// pages, at least three: the best by u_b and always the last one, whose bounds are still growing. Layers 0 and 1 and
// the prompt are dense, and nothing is evicted.
//
// The bounds are kept in the state, incrementally: a step reads its own page again and no other key.
//
// Differs from the authors' code, which has one kv head per query head: query heads of a group select for themselves
// (group = none), or share one list by the mean or maximum of their bounds or by the union of their choices, so that
// the group's keys are read once. A call with more than decode_rows queries is a prompt.
#include <algorithm>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/page_bounds.h"
#include "methods/registry.h"
#include "score/plan_rows.h"
#include "score/row_access.h"
#include "score/top_k.h"

namespace tessera {
namespace {

struct Quest {
  enum class Group : std::uint8_t { none, mean, max, unite };

  struct Params {
    std::int64_t budget = 1024;
    std::int64_t page = 16;
    std::int64_t least_pages = 3;
    std::int64_t dense_layers = 2;
    std::int64_t decode_rows = 1;
    Group group = Group::none;
    void visit(ParameterList& v) {
      v("budget", budget, 1, kMostTokens, "tokens that a query attends to, rounded up to whole pages");
      v("page", page, 1, 1024, "keys of a page");
      v("least_pages", least_pages, 1, 1 << 20, "pages attended to at least, the last one included");
      v("dense_layers", dense_layers, 0, 1 << 20, "first layers that stay dense");
      v("decode_rows", decode_rows, 1, 1024, "calls with more queries than this are a prompt and run dense");
      v("group", group, {"none", "mean", "max", "union"},
        "query heads of a group: each its own pages, or one list by mean or maximum of the bounds or by union");
    }
  };

  static MethodInfo info() {
    return {.name = "quest",
            .family = "decode",
            .summary = "pages by an upper bound of q.k from the minima and maxima of their keys",
            .paper = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv:2406.10774",
            .phases = {.prefill = true, .decode = true},
            .budget = {{"budget", 16, 1 << 20, true}},
            .search_block = "page"};
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<PageBoundsState>(); }

  /// Shorter calls are decode steps.
  std::int64_t prefill_tile() const { return params.decode_rows + 1; }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < problem.batch; ++s) longest = std::max(longest, problem.q_len_of(s));
    if (longest > params.decode_rows || context.layer < params.dense_layers) return dense_plan(problem);

    auto* state = dynamic_cast<PageBoundsState*>(context.state);
    PageBoundsState once;
    const auto pairs = static_cast<std::size_t>(problem.batch * problem.kv_heads);
    std::vector<PageBounds>& bounds = (state == nullptr ? once : *state).of_layer(context.layer, pairs);
    parallel_for(static_cast<std::int64_t>(pairs), context.run.threads, [&](std::int64_t pair, int) {
      const std::int64_t sequence = pair / problem.kv_heads;
      bounds[static_cast<std::size_t>(pair)].update(problem, inputs, sequence, pair % problem.kv_heads, params.page,
                                                    problem.kv_len_of(sequence) - problem.q_len_of(sequence));
    });
    // Rows of one query: each has its own pages.
    score::PlanRows rows(problem, 1, params.page, params.group == Group::none ? problem.q_heads : problem.kv_heads);
    parallel_for(rows.blocks(), context.run.threads, [&](std::int64_t block, int) {
      const std::int64_t sequence = rows.sequence_of(block);
      const std::int64_t kv_head = rows.head_of(block) / problem.group();
      const PageBounds& own = bounds[static_cast<std::size_t>(sequence * problem.kv_heads + kv_head)];
      const score::QueryTiles tiles = rows.geometry(block);
      for (std::int64_t row = 0; row < tiles.count(); ++row) {
        const std::vector<std::int32_t> pages =
            choose(problem, inputs, own, sequence, rows.head_of(block), row, tiles.visible_tiles(row));
        rows.row(block, row).selected_tiles(tiles, row, pages);
      }
    });
    return std::move(rows).finish(context.run.threads);
  }

  /// The pages of one query, or of the queries of a group in the same place; ascending.
  std::vector<std::int32_t> choose(const Problem& problem, const AttentionInputs& inputs, const PageBounds& bounds,
                                   std::int64_t sequence, std::int64_t first_head, std::int64_t row,
                                   std::int64_t pages) const {
    if (pages == 0) return {};
    const std::int64_t wanted = std::max(params.least_pages, (params.budget + params.page - 1) / params.page);
    std::vector<std::uint8_t> forced(static_cast<std::size_t>(pages));
    forced.back() = 1;
    const std::int64_t heads = params.group == Group::none ? 1 : problem.group();
    std::vector<float> query(static_cast<std::size_t>(problem.head_dim));
    std::vector<float> joint;
    std::vector<float> own;
    std::vector<std::uint8_t> any(static_cast<std::size_t>(pages));
    for (std::int64_t head = first_head; head < first_head + heads; ++head) {
      score::load_queries(problem, inputs, sequence, head, row, 1, query.data());
      bounds.upper_bounds(query.data(), pages, own);
      if (params.group == Group::unite) {
        for (const std::int32_t page : score::top_k(own, wanted, forced)) any[static_cast<std::size_t>(page)] = 1;
      } else if (head == first_head) {
        joint = own;
      } else {
        for (std::size_t b = 0; b < own.size(); ++b) {
          const bool larger = own[b] > joint[b] || own[b] != own[b];
          joint[b] = params.group == Group::mean ? joint[b] + own[b] : (larger ? own[b] : joint[b]);
        }
      }
    }
    if (params.group != Group::unite) return score::top_k(joint, wanted, forced);
    std::vector<std::int32_t> list;
    for (std::int64_t page = 0; page < pages; ++page) {
      if (any[static_cast<std::size_t>(page)] != 0) list.push_back(static_cast<std::int32_t>(page));
    }
    return list;
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(quest, tessera::Quest);
