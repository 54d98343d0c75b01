// A method to copy. It keeps, for every tile of 64 queries, the key tiles whose mean key points most in the direction
// of the mean query, next to the first keys and the tile's own keys.
//
// To make a method of your own:
//   1. Copy this file to src/methods/<family>/<your_name>.cpp; families: pattern, prefill, decode, diffusion,
//      trainable, linear. The file's name uses underscores.
//   2. Write the header comment: what is computed, the paper (title, arXiv id), the formula, and what differs from the
//      authors' code.
//   3. Change the parameters, the scorer and the budget. Look through src/score/ first: most are there already.
//   4. Keep the last line, with the file's name in it.
//   5. Copy tests/methods/skeleton_test.cpp.
// Nothing else is touched: the registry, the command line, the documentation and the viewer find the method.
#include "methods/registry.h"
#include "score/always_keep.h"
#include "score/plan_rows.h"
#include "score/pooled_tiles.h"
#include "score/top_k.h"

namespace tessera {
namespace {  // nothing but the registration is visible outside this file

class Skeleton {
 public:
  // Parameters are declared once. Each visit names a field, its range and its meaning; command line, JSON, checks,
  // error messages and documentation come from it. Types: std::int64_t, double, bool, std::string, enums.
  struct Params {
    std::int64_t keep = 16;
    double scale = 1;
    score::AlwaysKeep always{.sinks = 1};
    void visit(ParameterList& v) {
      v("keep", keep, 1, 4096, "key tiles kept per query tile");
      v("scale", scale, 0, 1e3, "factor of the scores");
      always.visit(v);  // sinks, local, diagonal, last_rows, dense_below: the same names in every method
    }
  };

  // What the registry says about the method.
  static MethodInfo info() {
    return {.name = "skeleton",
            .family = "prefill",
            .summary = "key tiles by mean query and mean key, best k",
            .paper = "title of the paper, arXiv:0000.00000",
            .phases = {.prefill = true, .decode = false}};
  }

  // Bound once per SPEC. Ranges are checked already; check here what concerns several fields, and read files.
  explicit Skeleton(Params params) : params_(params) {}

  // Decides what to compute. The tensors fit the problem (checked). The problem may be causal or not, batched, of
  // variable length, grouped (GQA), with fewer queries than keys (chunked prefill, decode); keys may lie in pages.
  // The helpers below take care of all that as long as sequences, heads and positions are asked of them.
  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    // One row set per (sequence, query head). Patterns that look at no data pass 1 instead of q_heads.
    score::PlanRows rows(problem, tile, tile, problem.q_heads);

    // Threads fill rows in any order; results must not depend on how many there are.
    parallel_for(rows.blocks(), context.run.threads, [&](std::int64_t block, int) {
      const std::int64_t sequence = rows.sequence_of(block);
      const std::int64_t q_head = rows.head_of(block);
      const std::int64_t kv_head = q_head / problem.group();

      // Scorer: one number per (query tile, key tile).
      const auto pool = score::LastTile::real_rows;
      const auto queries = score::pool_queries(problem, inputs, sequence, q_head, tile, pool);
      const auto keys = score::pool_keys(problem, inputs, sequence, kv_head, tile, pool);
      const score::QueryTiles tiles = rows.geometry(block);
      std::vector<float> scores(static_cast<std::size_t>(tiles.key_tiles()));
      std::vector<std::uint8_t> forced;

      for (std::int64_t i = 0; i < tiles.count(); ++i) {
        if (params_.always.dense(tiles, i)) {
          rows.row(block, i).everything(tiles, i);
          continue;
        }
        // Memory stays proportional to one row of tiles, never N x N.
        score::pooled_scores(queries, keys, problem.head_dim, i, 1, static_cast<float>(params_.scale), scores);

        // Budget: among the tiles that this query tile may see, and what is kept in any case.
        params_.always.force_tiles(tiles, i, forced);
        const std::span<const float> visible(scores.data(), forced.size());
        rows.row(block, i).selected_tiles(tiles, i, score::top_k(visible, params_.keep, forced));
      }
    });
    return std::move(rows).finish(context.run.threads);
  }

 private:
  static constexpr std::int64_t tile = 64;

  Params params_;
};

}  // namespace
}  // namespace tessera

// The registration: the file's name without ending, and the type.
TESSERA_METHOD(skeleton_method, tessera::Skeleton);
