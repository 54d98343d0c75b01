// Blocks of keys as experts: every query routes to the blocks whose mean key it likes best.
//
// MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv:2502.13189). Keys of a sequence lie in blocks of
// block_size, the last one ragged; kbar_b is the true mean of block b. Per query head, a query at position p scores the
// past blocks with G_b = q . kbar_b in float32, without scale or softmax. The block that holds p is always chosen and
// counts as one of top_k; future blocks never are; ties go to the earlier block; early queries have fewer blocks. The
// query attends exactly to the chosen blocks, causally inside its own.
//
// The authors run the own block and each past block as separate calls and merge them by LSE; here they are one plan row
// per query under one softmax, which the key-major kernel walks block by block over the rows that chose it: the same
// result. Sinks are not forced. The router has no derivative: the backward pass is that of the plan.
//
// Without causality every block competes, the own one still forced. Queries beyond the last key have no own block.
#include <algorithm>

#include "core/parallel.h"
#include "methods/registry.h"
#include "score/plan_rows.h"
#include "score/pooled_tiles.h"
#include "score/product.h"
#include "score/query_blocks.h"
#include "score/row_access.h"
#include "score/top_k.h"

namespace tessera {
namespace {

struct Moba {
  struct Params {
    std::int64_t block_size = 512;
    std::int64_t top_k = 3;
    std::int64_t dense_last_layers = 0;
    void visit(ParameterList& v) {
      v("block_size", block_size, 1, std::int64_t{1} << 20, "keys of a block");
      v("top_k", top_k, 1, kMostTokens, "blocks per query and head, its own among them");
      v("dense_last_layers", dense_last_layers, 0, 1024,
        "last layers of the model that stay dense (published model: 3)");
    }
  };
  static MethodInfo info() {
    return {.name = "moba",
            .family = "trainable",
            .summary = "top-k key blocks per query by mean key, the own block always among them",
            .paper = "MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv:2502.13189",
            .phases = {.prefill = true, .decode = true, .backward = true},
            .budget = {{"top_k", 1, 1 << 20, true}},
            .search_block = "block_size"};
  }

  /// The only block whose mean changes with later keys is a query's own, which it takes anyway.
  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    if (context.layer >= context.layers - params.dense_last_layers) return dense_plan(problem);
    std::vector<std::vector<float>> means(static_cast<std::size_t>(problem.batch * problem.kv_heads));
    parallel_for(static_cast<std::int64_t>(means.size()), context.run.threads, [&](std::int64_t i, int) {
      means[static_cast<std::size_t>(i)] = score::pool_keys(problem, inputs, i / problem.kv_heads, i % problem.kv_heads,
                                                            params.block_size, score::LastTile::real_rows);
    });
    struct Scratch {
      std::vector<float> queries;
      std::vector<float> scores;
      std::vector<std::uint8_t> forced;
    };
    std::vector<Scratch> scratch(static_cast<std::size_t>(thread_count(context.run.threads)));
    score::PlanRows rows(problem, 1, params.block_size, problem.q_heads);
    constexpr std::int64_t queries_at_once = 64;
    const auto route = [&](std::int64_t block, std::int64_t first, std::int64_t count, int thread) {
      const score::QueryTiles tiles = rows.geometry(block);
      const std::int64_t blocks = tiles.key_tiles();
      if (blocks == 0) return;
      const std::int64_t sequence = rows.sequence_of(block);
      const std::int64_t head = rows.head_of(block);
      Scratch& own = scratch[static_cast<std::size_t>(thread)];
      own.queries.resize(static_cast<std::size_t>(count * problem.head_dim));
      own.scores.resize(static_cast<std::size_t>(count * blocks));
      score::load_queries(problem, inputs, sequence, head, first, count, own.queries.data());
      const std::vector<float>& keys =
          means[static_cast<std::size_t>(sequence * problem.kv_heads + head / problem.group())];
      score::multiply_transposed(own.queries.data(), count, problem.head_dim, keys.data(), blocks, problem.head_dim,
                                 problem.head_dim, 1.0F, own.scores.data(), blocks);
      for (std::int64_t i = 0; i < count; ++i) {
        choose(tiles, first + i, {own.scores.data() + i * blocks, static_cast<std::size_t>(blocks)}, own.forced,
               rows.row(block, first + i));
      }
    };
    rows.for_each_band(queries_at_once, context.run.threads, route);
    return std::move(rows).finish(context.run.threads);
  }

  /// The row of one query from its scores of all blocks.
  void choose(const score::QueryTiles& tiles, std::int64_t query, std::span<const float> scores,
              std::vector<std::uint8_t>& forced, score::PlanRow& row) const {
    const auto visible = static_cast<std::size_t>(tiles.visible_tiles(query));
    if (visible == 0) return;
    const std::int64_t own = score::own_block(tiles, query);
    forced.assign(visible, 0);
    if (own >= 0 && own < static_cast<std::int64_t>(visible)) forced[static_cast<std::size_t>(own)] = 1;
    score::add_query_blocks(tiles, query, score::top_k(scores.first(visible), params.top_k, forced), row);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(moba, tessera::Moba);
