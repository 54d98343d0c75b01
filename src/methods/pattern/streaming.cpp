// Sinks plus a local window, optionally with a dense tail of query rows.
//
// StreamingLLM prefill (Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453) = A-shape of
// MInference (arXiv:2407.02490): position p sees j <= p with p - j < n_local or j < n_init. Tri-shape (SCBench,
// arXiv:2412.10319) lets the last n_last query rows see everything.
//
// The cache holds the sinks and the n_local last tokens from the end of a prompt on (a prompt that this method runs,
// from its first chunk on); a query with n_last sees everything, so that nothing is evicted then. positions = true
// keeps the positions of the text. positions = slot is StreamingLLM's decoding: once tokens are dropped, the sinks come
// so much closer, as if what is kept were the whole text. The plan, and with it every prompt, has true positions.
//
// Differs from the authors' code: one pass instead of two stages merged by LSE; the window is counted from the key
// positions, so chunked prefill (fewer queries than keys) and decode see what the whole prompt would see. n_last counts
// from the end of the queries of the call. Without causality the window is symmetric.
#include "core/error.h"
#include "methods/registry.h"
#include "methods/window_cache.h"
#include "score/a_shape.h"

namespace tessera {
namespace {

struct Streaming {
  enum class Positions : std::uint8_t { text, slot };
  struct Params {
    std::int64_t n_init = 128;
    std::int64_t n_local = 3968;
    std::int64_t n_last = 0;
    Positions positions = Positions::text;
    void visit(ParameterList& v) {
      v("n_init", n_init, 0, kMostTokens, "sinks: first keys that every query sees");
      v("n_local", n_local, 1, kMostTokens, "nearest keys that a query sees, itself included");
      v("n_last", n_last, 0, kMostTokens, "last query rows that see every key (Tri-shape: 100)");
      v("positions", positions, {"true", "slot"},
        "positions of cached keys while decoding: those of the text, or their slots in the cache");
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

  std::int64_t prefill_tile() const { return params.n_last == 0 ? 1 : 0; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    return score::a_shape_plan(problem, {params.n_init, params.n_local}, params.n_last, context.run.threads);
  }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext&) const {
    require(params.positions != Positions::slot || params.n_last == 0,
            "streaming: positions=slot with n_last={}; expected 0, for dropped keys cannot be seen", params.n_last);
    if (params.n_last > 0) return nullptr;
    if (params.positions == Positions::slot) return std::make_unique<SlotCache>(shape, params.n_init, params.n_local);
    const HeadWindow window{.limited = true, .sinks = params.n_init, .recent = params.n_local};
    LayerCacheShape whole_prompt = shape;  // for plans that say what of the text a prompt computes
    whole_prompt.own_prompt = false;
    // The next token is one of the recent ones.
    return std::make_unique<WindowCache>(whole_prompt,
                                         std::vector<HeadWindow>(static_cast<std::size_t>(shape.kv_heads), window),
                                         params.n_local - 1, false);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(streaming, tessera::Streaming);
