// TidalDecode (arXiv:2410.05076): decoding in which two layers choose tokens for all the others.
//
// Layers below `select_layer` are dense. That layer and `reselect_layer` run dense too and keep, per query head, the
// `budget` tokens of largest q.k; every other layer attends to the tokens that the last of the two chose, head by head,
// at the same positions in its own cache. Lists are made anew at every step. Prefill is dense.
//
// Differs from the authors' code: the newest token is always among the chosen (there it competes in the accuracy build
// and is forced in the speed build), and `share` can give a GQA group one list (there every query head has its own).
#include "core/parallel.h"
#include "methods/layer_reuse.h"
#include "methods/registry.h"
#include "score/top_k.h"

namespace tessera {
namespace {

struct TidalDecode {
  enum class Share : std::uint8_t { none, max, mean };
  struct Params {
    std::int64_t budget = 4096;
    std::int64_t select_layer = 2;
    std::int64_t reselect_layer = 13;
    Share share = Share::none;
    void visit(ParameterList& v) {
      v("budget", budget, 1, kMostTokens, "tokens that reusing layers attend to, the newest included");
      v("select_layer", select_layer, 0, 100000, "layer that chooses; those before it are dense");
      v("reselect_layer", reselect_layer, 0, 100000,
        "layer that chooses anew; none if it does not follow select_layer or the model has fewer layers");
      v("share", share, {"none", "max", "mean"},
        "one list per query head, or per GQA group by its largest or mean score");
    }
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "tidaldecode",
            .family = "decode",
            .summary = "two layers choose tokens by exact scores, the others attend to them",
            .paper =
                "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention, "
                "arXiv:2410.05076",
            .phases = {.prefill = false, .decode = true},
            .budget = {{"budget", 16, 1 << 20, true}}};
  }

  LayerMode mode_of(std::int64_t layer) const {
    if (layer < params.select_layer) return LayerMode::full;
    return layer == params.select_layer || layer == params.reselect_layer ? LayerMode::publish : LayerMode::reuse;
  }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    return plan_with_reuse(mode_of(context.layer), problem, context);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const auto choose = [&](const Problem& p, const TensorView& scores, std::span<const float>, int threads) {
      return choose_tokens(p, scores, threads);
    };
    return attend_with_reuse(mode_of(context.layer), choose, problem, inputs, outputs, context, executed);
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<LayerReuseState>(); }

  score::Selection choose_tokens(const Problem& problem, const TensorView& scores, int threads) const {
    const bool shared = params.share != Share::none;
    score::Selection selection{
        .page = 1, .heads = shared ? problem.kv_heads : problem.q_heads, .kv_len = problem.kv_len, .lists = {}};
    selection.lists.resize(static_cast<std::size_t>(problem.batch * selection.heads));
    std::vector<std::uint8_t> newest(static_cast<std::size_t>(problem.kv_len), 0);
    newest.back() = 1;
    const std::int64_t group = shared ? problem.group() : 1;
    parallel_for(problem.batch * selection.heads, threads, [&](std::int64_t list, int) {
      const std::int64_t sequence = list / selection.heads;
      const std::int64_t first_head = list % selection.heads * group;
      std::vector<float> joined;
      const auto row = [&](std::int64_t head) {
        return std::span(reinterpret_cast<const float*>(scores.row(sequence, head, 0)), newest.size());
      };
      if (shared) joined = join(row, first_head, group);
      selection.lists[static_cast<std::size_t>(list)] =
          score::top_k(shared ? std::span<const float>(joined) : row(first_head), params.budget, newest);
    });
    return selection;
  }

  template <class Row>
  std::vector<float> join(const Row& row, std::int64_t first_head, std::int64_t group) const {
    const std::span<const float> first = row(first_head);
    std::vector<float> joined(first.begin(), first.end());
    for (std::int64_t head = first_head + 1; head < first_head + group; ++head) {
      const std::span<const float> own = row(head);
      for (std::size_t j = 0; j < joined.size(); ++j) {
        // The mean orders like the sum. std::max would lose a NaN, which is to be kept.
        joined[j] = params.share == Share::mean ? joined[j] + own[j] : (joined[j] >= own[j] ? joined[j] : own[j]);
      }
    }
    return joined;
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(tidaldecode, tessera::TidalDecode);
