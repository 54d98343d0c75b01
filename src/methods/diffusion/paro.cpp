// PAROAttention: Pattern-Aware Reordering for Efficient Sparse and Quantized Attention in Visual Generation Models,
// arXiv:2506.16054: every head gets the axis order of the grid under which its attention falls into the fewest blocks,
// and a static block mask, both from calibration.
//
// The first run of all denoising steps calibrates: exact probabilities under the six orders choose the order of a head
// at the first step (few blocks with large entries, and blocks that quantise well), and in each group of steps the
// blocks with the largest sums of probabilities are kept, to the target density. The second half of the steps shares
// one group. Later runs only read the state. Text keys are kept for every query and text queries see everything.
// quantise=int8 runs both products on 8-bit integers.
//
// Differs from the paper: its combination takes the least score with a sparsity where more is better; here the dense
// share enters, so that the least is the best. alpha, the scale of values (per channel) and the rounding of
// probabilities were not published. Calibration sees the first sequence of a batch, and a row keeps its largest block.
// The state lives with the caller and is not written to a file.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "kernels/int8_attention.h"
#include "methods/registry.h"
#include "score/axis_orders.h"
#include "score/token_order.h"

namespace tessera {
namespace {

using score::OrderedTiles;

/// Groups of denoising steps with a mask of their own; the last one is the second half of the steps.
constexpr std::int64_t kSlots = 10;

/// Calibration of one head.
struct HeadCalibration {
  std::size_t order = 0;
  std::vector<std::uint8_t> mask;  ///< [query blocks][key blocks]
};

/// Problem size that a calibration holds for.
using Shape = std::tuple<std::int64_t, std::int64_t, std::array<std::int64_t, 3>, std::int64_t, std::int64_t>;

Shape shape_of(const Problem& problem) {
  const TokenGrid grid = problem.grid_of(0);
  return {problem.q_len_of(0), problem.q_offset_of(0), grid.extent, grid.prefix, grid.suffix};
}

/// What calibration found, and how many calls each layer has seen.
class Calibration final : public MethodState {
 public:
  struct Layer {
    Shape shape;
    std::int64_t calls = 0;
    std::vector<std::array<HeadCalibration, kSlots>> heads;
    std::array<bool, kSlots> known{};
  };
  std::mutex mutex;
  std::map<std::int64_t, Layer> layers;
};

enum class Quantise : std::uint8_t { none, int8 };

class Paro {
 public:
  struct Params {
    double density = 0.5;
    std::int64_t block = 64;
    double eps = 1e-3;
    double sigma = 0.9;
    double alpha = 0.5;
    std::int64_t steps = 30;
    Quantise quantise = Quantise::none;
    void visit(ParameterList& v) {
      v("density", density, 0, 1, "share of the blocks that the mask of a head keeps");
      v("block", block, 8, 256, "tokens per block");
      v("eps", eps, 0, 1, "probability below which an entry is small");
      v("sigma", sigma, 0, 1, "share of small entries that makes a block sparse");
      v("alpha", alpha, 0, 1, "weight of sparsity against incoherence in the choice of the order");
      v("steps", steps, 1, 100000, "denoising steps of a run: calls of a layer before the masks start over");
      v("quantise", quantise, {"none", "int8"}, "8-bit integers for both products");
    }
  };
  static MethodInfo info() {
    return {.name = "paro",
            .family = "diffusion",
            .summary = "per head the axis order that gathers attention into blocks, with calibrated static block masks",
            .paper =
                "PAROAttention: Pattern-Aware Reordering for Efficient Sparse and Quantized Attention in Visual "
                "Generation Models, arXiv:2506.16054",
            .phases = {.prefill = true, .decode = false},
            .domain = {.causal = false,
                       .variable_length = false,
                       .reason = "one grid order for all sequences mixes earlier and later tokens"},
            .budget = {{"density", 0, 1}}};
  }

  explicit Paro(Params params) : params_(params) {}

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<Calibration>(); }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    const std::array<OrderedTiles, 6> orders = orders_of(problem);
    auto* state = dynamic_cast<Calibration*>(context.state);
    if (state == nullptr) {
      std::vector<HeadCalibration> heads = calibrate(problem, inputs, orders, {}, context);
      return plan_of(problem, orders, heads, context);
    }
    const std::lock_guard lock(state->mutex);
    Calibration::Layer& layer = state->layers[context.layer];
    if (layer.heads.size() != static_cast<std::size_t>(problem.q_heads) || layer.shape != shape_of(problem)) {
      layer = {};
      layer.shape = shape_of(problem);
      layer.heads.resize(static_cast<std::size_t>(problem.q_heads));
    }
    const std::int64_t slot = slot_of(layer.calls++ % params_.steps);
    if (!layer.known[slot]) {
      std::vector<std::size_t> fixed;  // the order of a head is that of its first calibration
      const auto earlier = std::find(layer.known.begin(), layer.known.end(), true) - layer.known.begin();
      for (const auto& head : layer.heads) {
        if (earlier < kSlots) fixed.push_back(head[earlier].order);
      }
      std::vector<HeadCalibration> found = calibrate(problem, inputs, orders, fixed, context);
      for (std::size_t head = 0; head < found.size(); ++head) layer.heads[head][slot] = std::move(found[head]);
      layer.known[slot] = true;
    }
    std::vector<HeadCalibration> heads;
    heads.reserve(layer.heads.size());
    for (const auto& head : layer.heads) heads.push_back(head[slot]);
    return plan_of(problem, orders, heads, context);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const auto start = std::chrono::steady_clock::now();
    Plan decided = plan(problem, inputs, context);
    const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
    RunReport report = params_.quantise == Quantise::int8 ? kernels::run_int8(decided, inputs, outputs, context.run)
                                                          : run(decided, inputs, outputs, context.run);
    report.plan_ms = planned.count();
    if (executed != nullptr) *executed = std::move(decided);
    return report;
  }

 private:
  std::int64_t slot_of(std::int64_t step) const {
    const double done = static_cast<double>(step) / static_cast<double>(params_.steps);
    if (done >= 0.5) return kSlots - 1;
    return std::min<std::int64_t>(static_cast<std::int64_t>(2 * done * (kSlots - 1)), kSlots - 2);
  }

  std::array<OrderedTiles, 6> orders_of(const Problem& problem) const {
    const TokenGrid grid = problem.grid_of(0);
    const auto tiles = [&](std::size_t order) {
      return OrderedTiles(problem, 0, score::with_text(grid, score::axis_order(grid.extent, score::kAxisOrders[order])),
                          params_.block, params_.block);
    };
    return {tiles(0), tiles(1), tiles(2), tiles(3), tiles(4), tiles(5)};
  }

  /// Order and mask of every query head; `fixed` holds the orders where they are known.
  std::vector<HeadCalibration> calibrate(const Problem& problem, const AttentionInputs& inputs,
                                         const std::array<OrderedTiles, 6>& orders, std::span<const std::size_t> fixed,
                                         const PlanContext& context) const {
    std::vector<HeadCalibration> heads(static_cast<std::size_t>(problem.q_heads));
    parallel_for(problem.q_heads, context.run.threads, [&](std::int64_t head, int) {
      const auto known = fixed.empty() ? std::optional<std::size_t>{} : fixed[head];
      const auto metrics =
          score::axis_order_metrics(problem, inputs, orders, head, params_.block, params_.eps, params_.sigma, known);
      HeadCalibration& found = heads[head];
      found.order = fixed.empty() ? score::best_axis_order(metrics, params_.alpha) : fixed[head];
      found.mask = mask_of(orders[found.order], metrics[found.order].sums);
    });
    return heads;
  }

  /// The blocks with the largest sums, to the target density; text and the largest block of a row in any case.
  std::vector<std::uint8_t> mask_of(const OrderedTiles& tokens, std::vector<float> sums) const {
    for (float& sum : sums) sum = std::isnan(sum) ? std::numeric_limits<float>::infinity() : sum;  // kept
    const std::int64_t columns = tokens.key_tiles();
    std::vector<std::uint8_t> mask(sums.size(), 0);
    std::vector<std::int32_t> order(sums.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return sums[a] > sums[b]; });
    const auto kept = static_cast<std::size_t>(std::lround(params_.density * static_cast<double>(sums.size())));
    for (std::size_t i = 0; i < kept; ++i) mask[order[i]] = 1;
    for (std::int64_t i = 0; i < tokens.query_tiles() && columns > 0; ++i) {
      const auto row = std::span(sums).subspan(i * columns, columns);
      mask[i * columns + (std::max_element(row.begin(), row.end()) - row.begin())] = 1;
      for (std::int64_t j = 0; j < columns; ++j) {
        if (tokens.text_queries(i) || tokens.text_keys(j)) mask[i * columns + j] = 1;
      }
    }
    return mask;
  }

  Plan plan_of(const Problem& problem, const std::array<OrderedTiles, 6>& orders,
               std::span<const HeadCalibration> heads, const PlanContext& context) const {
    std::vector<Plan> parts(static_cast<std::size_t>(problem.q_heads));
    parallel_for(problem.q_heads, context.run.threads, [&](std::int64_t head, int) {
      const OrderedTiles& tokens = orders[heads[head].order];
      PlanBuilder builder = PlanBuilder::for_block(problem, params_.block, params_.block, problem.q_heads, 1, head);
      tokens.set_orders(builder, head);
      const std::int64_t columns = tokens.key_tiles();
      for (std::int64_t i = 0; i < tokens.query_tiles(); ++i) {
        const auto kept = std::span(heads[head].mask).subspan(i * columns, columns);
        for (std::int64_t j = 0; j < columns;) {
          std::int64_t end = j;
          while (end < columns && kept[end] != 0) ++end;
          builder.run(j * params_.block, std::min(end * params_.block, tokens.keys()) - j * params_.block);
          j = end + 1;
        }
        builder.end_row();
      }
      parts[head] = std::move(builder).finish();
    });
    return concatenate_blocks(problem, problem.q_heads, 1, parts);
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(paro, tessera::Paro);
