// DELTA (arXiv:2510.09883): decoding in layer groups; the last full layer of a group chooses pages for the sparse
// layers behind it.
//
// A full layer whose successor is not full keeps its scores S and LSE. A token weighs what the head that likes it most
// gives it, a_j = max over query heads of exp(S[h,j] - LSE_h), a page the sum over its tokens. The `pages` best pages,
// the last `recent` always among them, are read by all heads of the sparse layers until the next choosing layer of the
// same step. Short sequences (page count up to `pages` times `ratio`) run dense. Prefill is dense.
//
// Differs from the authors' code: one natural-log LSE of the very pass that made the scores.
#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/layer_list.h"
#include "methods/layer_reuse.h"
#include "methods/registry.h"
#include "score/top_k.h"

namespace tessera {
namespace {

struct Delta {
  struct Params {
    std::string full_layers = "0-2+14+22";
    std::int64_t page = 16;
    std::int64_t pages = 64;
    std::int64_t recent = 8;
    double ratio = 1;
    void visit(ParameterList& v) {
      v("full_layers", full_layers, "layers that attend densely, as numbers and ranges joined by +; 0 must be one");
      v("page", page, 1, 65536, "tokens of a page");
      v("pages", pages, 1, kMostTokens, "pages that sparse layers read");
      v("recent", recent, 1, kMostTokens, "last pages that are always among them");
      v("ratio", ratio, 1, 1e9, "sequences of up to this many times `pages` pages run dense");
    }
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "delta",
            .family = "decode",
            .summary = "full layers choose pages by the probabilities of all heads for the sparse layers behind them",
            .paper =
                "DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning, "
                "arXiv:2510.09883",
            .phases = {.prefill = false, .decode = true},
            .budget = {{"pages", 8, 1 << 20, true}}};
  }

  explicit Delta(Params given)
      : params(std::move(given)), full(read_layer_list("delta: full_layers", params.full_layers)) {
    require(is_full(0), "delta: full_layers={} lacks layer 0; expected it, for sparse layers need an earlier choice",
            params.full_layers);
    require(params.recent <= params.pages, "delta: recent={} exceeds pages={}; expected at most as many", params.recent,
            params.pages);
  }

  bool is_full(std::int64_t layer) const { return std::binary_search(full.begin(), full.end(), layer); }

  LayerMode mode_of(const Problem& problem, const PlanContext& context) const {
    const std::int64_t in_use = (problem.kv_len + params.page - 1) / params.page;
    if (static_cast<double>(in_use) <= params.ratio * static_cast<double>(params.pages)) return LayerMode::full;
    if (!is_full(context.layer)) return LayerMode::reuse;
    const std::int64_t next = context.layer + 1;
    const bool last = context.layers > 1 && next == context.layers;  // nobody reads its choice
    return is_full(next) || last ? LayerMode::full : LayerMode::publish;
  }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    return plan_with_reuse(mode_of(problem, context), problem, context);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const auto choose = [&](const Problem& p, const TensorView& scores, std::span<const float> lse, int threads) {
      return choose_pages(p, scores, lse, threads);
    };
    return attend_with_reuse(mode_of(problem, context), choose, problem, inputs, outputs, context, executed);
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<LayerReuseState>(); }

  score::Selection choose_pages(const Problem& problem, const TensorView& scores, std::span<const float> lse,
                                int threads) const {
    const std::int64_t count = (problem.kv_len + params.page - 1) / params.page;
    score::Selection selection{.page = params.page, .heads = 1, .kv_len = problem.kv_len, .lists = {}};
    selection.lists.resize(static_cast<std::size_t>(problem.batch));
    std::vector<std::uint8_t> forced(static_cast<std::size_t>(count), 0);
    std::fill(forced.end() - std::min(count, params.recent), forced.end(), std::uint8_t{1});
    for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
      std::vector<float> mass(static_cast<std::size_t>(count));
      parallel_for(count, threads, [&](std::int64_t page, int) {
        mass[static_cast<std::size_t>(page)] = mass_of_page(problem, scores, lse, sequence, page);
      });
      selection.lists[static_cast<std::size_t>(sequence)] = score::top_k(mass, params.pages, forced);
    }
    return selection;
  }

  float mass_of_page(const Problem& problem, const TensorView& scores, std::span<const float> lse,
                     std::int64_t sequence, std::int64_t page) const {
    const std::int64_t first = page * params.page;
    const std::int64_t last = std::min(first + params.page, problem.kv_len);
    std::vector<float> best(static_cast<std::size_t>(last - first), 0.0F);
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const auto* row = reinterpret_cast<const float*>(scores.row(sequence, head, 0)) + first;
      const float own = lse[static_cast<std::size_t>(sequence * problem.q_heads + head)];
      // A NaN weighs nothing: std::max keeps its first argument then.
      for (std::size_t j = 0; j < best.size(); ++j) best[j] = std::max(best[j], std::exp(row[j] - own));
    }
    float sum = 0;
    for (const float x : best) sum += x;
    return sum;
  }

  Params params;
  std::vector<std::int64_t> full;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(delta, tessera::Delta);
