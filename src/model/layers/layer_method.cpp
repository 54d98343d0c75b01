#include "model/layers/layer_method.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace tessera::model {

namespace {

constexpr std::int64_t kTile = 128;
constexpr std::int64_t kNearest = 64;

}  // namespace

Plan window_plan(const Problem& problem, std::int64_t window, std::int64_t tile_q, std::int64_t tile_k) {
  PlanBuilder builder(problem, tile_q, tile_k, 1, 1);
  const std::int64_t band = builder.add_band({window - 1, 0});
  const std::int64_t offset = problem.q_offset_of(0);
  for (std::int64_t tile = 0; tile < problem.q_len; tile += tile_q) {
    const std::int64_t first = offset + tile;
    const std::int64_t last = offset + std::min(tile + tile_q, problem.q_len) - 1;
    const std::int64_t begin = std::max<std::int64_t>(0, first - window + 1);
    // Keys that all rows of the tile see need no mask.
    const std::int64_t common_begin = std::min(std::max<std::int64_t>(0, last - window + 1), first + 1);
    builder.run(begin, common_begin - begin, EntryMask::band, band);
    builder.run(common_begin, first + 1 - common_begin);
    builder.run(first + 1, last - first, EntryMask::band, band);
    builder.end_row();
  }
  return std::move(builder).finish();
}

std::int64_t LayerMethod::prefill_tile() const {
  const std::int64_t tile = inner_.prefill_tile();
  // Within the window and beyond it a method attends differently: parts that exceed it are all beyond.
  if (window_ == 0 || tile == 0 || inner_.info().name == "dense") return tile;
  return tile * (window_ / tile + 1);
}

Plan LayerMethod::plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
  if (!limits(problem)) return inner_.plan(problem, inputs, context);
  const MethodInfo& info = inner_.info();
  const bool selects = info.name != "dense" && info.has_plan && inner_.runs_its_plan();
  if (!selects) return window_plan(problem, window_, kTile, kTile);
  Plan chosen = inner_.plan(problem, inputs, context);
  if (chosen.sources.size() > 1 || !chosen.query_order.empty() || !chosen.key_order.empty()) {
    return window_plan(problem, window_, kTile, kTile);
  }
  const auto within = [&](std::int64_t window) { return window_plan(problem, window, chosen.tile_q, chosen.tile_k); };
  return unite(intersect(chosen, within(window_)), within(std::min(window_, kNearest)));
}

RunReport LayerMethod::attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                              const PlanContext& context, Plan* executed) const {
  AttentionInputs own = inputs;
  own.modifiers.softcap = softcap_;
  if (!limits(problem)) return inner_.attend(problem, own, outputs, context, executed);
  const auto start = std::chrono::steady_clock::now();
  Plan chosen = plan(problem, own, context);
  const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
  RunReport report = run(chosen, own, outputs, context.run);
  report.plan_ms = planned.count();
  if (executed != nullptr) *executed = std::move(chosen);
  return report;
}

}  // namespace tessera::model
