// Sinks plus a local window, optionally with a dense tail of query rows.
//
// StreamingLLM prefill (Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453) = A-shape of
// MInference (arXiv:2407.02490): position p sees j <= p with p - j < n_local or j < n_init. Tri-shape (SCBench,
// arXiv:2412.10319) lets the last n_last query rows see everything. Positions stay those of the model: the slot
// rotation of StreamingLLM's decode belongs to the cache.
//
// Differs from the authors' code: one pass instead of two stages merged by LSE; the window is counted from the key
// positions, so chunked prefill (fewer queries than keys) and decode see what the whole prompt would see. n_last counts
// from the end of the queries of the call. Without causality the window is symmetric.
#include "methods/registry.h"
#include "score/a_shape.h"

namespace tessera {
namespace {

struct Streaming {
  struct Params {
    std::int64_t n_init = 128;
    std::int64_t n_local = 3968;
    std::int64_t n_last = 0;
    void visit(ParameterList& v) {
      v("n_init", n_init, 0, kMostTokens, "sinks: first keys that every query sees");
      v("n_local", n_local, 1, kMostTokens, "nearest keys that a query sees, itself included");
      v("n_last", n_last, 0, kMostTokens, "last query rows that see every key (Tri-shape: 100)");
    }
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "streaming",
            .family = "pattern",
            .summary = "attention sinks plus a local window (A-shape), optionally with dense last rows (Tri-shape)",
            .paper = "Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453",
            .phases = {.prefill = true, .decode = true, .backward = true},
            .budget = {{"n_local", 16, 1 << 20, true}}};
  }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    return score::a_shape_plan(problem, {params.n_init, params.n_local}, params.n_last, context.run.threads);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(streaming, tessera::Streaming);
