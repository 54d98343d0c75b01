// Sinks, a local window and dense last rows, in the upper layers of a model.
//
// Tri-shape (SCBench, arXiv:2412.10319): rows before the last n_last see the first n_init keys and the nearest n_local,
// the last n_last rows see everything. TriangleMix (Lossless and Efficient Attention Pattern for Long Context
// Prefilling, arXiv:2507.21526) runs it from layer starting_layer on and dense attention below; which layer is the
// model's to say: the first whose middle triangle contributes little. `streaming` is the same pattern without the tail.
//
// The tail is that of the call: with a prompt in chunks, of each chunk.
#include "methods/registry.h"
#include "score/a_shape.h"

namespace tessera {
namespace {

struct TriShape {
  struct Params {
    std::int64_t n_init = 128;
    std::int64_t n_local = 3968;
    std::int64_t n_last = 100;
    std::int64_t starting_layer = 0;
    void visit(ParameterList& v) {
      v("n_init", n_init, 0, kMostTokens, "sinks: first keys that every query sees");
      v("n_local", n_local, 1, kMostTokens, "nearest keys that a query sees, itself included");
      v("n_last", n_last, 0, kMostTokens, "last query rows that see every key");
      v("starting_layer", starting_layer, 0, 1024, "layers of the model before this one run dense");
    }
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "tri-shape",
            .family = "pattern",
            .summary = "sinks, local window and dense last rows, from a layer on",
            .paper = "SCBench: A KV Cache-Centric Analysis of Long-Context Methods, arXiv:2412.10319",
            .phases = {.prefill = true, .decode = false, .backward = true},
            .domain = {.bidirectional = false, .reason = "its last rows are those that see the most"},
            .budget = {{"n_local", 16, 1 << 20, true}}};
  }

  std::int64_t prefill_tile() const { return params.n_last == 0 ? 1 : 0; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    if (context.layer < params.starting_layer) return dense_plan(problem);
    return score::a_shape_plan(problem, {params.n_init, params.n_local}, params.n_last, context.run.threads);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(tri_shape, tessera::TriShape);
