// A method as one layer of a model uses it: within the layer's window, with its capped scores.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "tessera/method.h"

namespace tessera::model {

/// Every query sees the `window` keys that end at its own position. Rows of `tile_q` queries.
Plan window_plan(const Problem& problem, std::int64_t window, std::int64_t tile_q, std::int64_t tile_k);

/// Hands calls on to a method while the window holds every key. Beyond that a layer runs the method's plan intersected
/// with the window, and always the nearest 64 keys of it; the window alone where a method's output is more than its
/// plan (branches, corrections, recurrences), and where its plan reorders tokens or names derived keys. Layers with
/// windows keep every token, whatever cache the method has.
class LayerMethod final : public Method {
 public:
  /// `inner` must outlive the object. `window` 0: all keys; `softcap` 0: none.
  LayerMethod(const Method& inner, std::int64_t window, float softcap)
      : inner_(inner), window_(window), softcap_(softcap) {}

  const MethodInfo& info() const override { return inner_.info(); }
  std::string parameters() const override { return inner_.parameters(); }
  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const override;
  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const override;
  bool runs_its_plan() const override { return inner_.runs_its_plan(); }
  std::unique_ptr<MethodState> new_state() const override { return inner_.new_state(); }
  std::int64_t prefill_tile() const override;

 private:
  bool limits(const Problem& problem) const { return window_ > 0 && window_ < problem.kv_len; }

  const Method& inner_;
  std::int64_t window_;
  float softcap_;
};

}  // namespace tessera::model
