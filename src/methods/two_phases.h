// Attention in two phases: an exact region first, whose row statistics decide what else is computed.
//
// AnchorAttention (arXiv 2505.23520) compares with the row maxima of its anchor, SALE (2505.24179) with its partial
// softmax. Both regions are parts of one plan and of one softmax: the branches are joined by their log-sum-exps.
#pragma once

#include <functional>
#include <vector>

#include "tessera/method.h"

namespace tessera {

/// What the rows of a phase saw, in the order of the LSE; natural units, -inf for a row without keys.
struct RowStatistics {
  std::vector<float> lse;
  std::vector<float> maximum;
};

/// Statistics of the plan's rows over q and k alone: no modifiers, values are not read.
RowStatistics row_statistics(const Plan& plan, const AttentionInputs& inputs, const RunOptions& options);

/// What the second phase computes; keys of `exact` are not among it. Entries unmasked or causal.
using ChooseRest = std::function<Plan(const RowStatistics& exact)>;

/// The pairs of both plans, which have the same rows: entries side by side.
Plan join_entries(const Plan& a, const Plan& b);

/// plan(): the first phase is computed for its statistics only.
Plan plan_two_phases(const Plan& exact, const AttentionInputs& inputs, const PlanContext& context,
                     const ChooseRest& choose_rest);

/// attend(): the first phase runs once. Its report counts the choice as planning and both phases as kernel. With
/// modifiers, which the choice does not know, the joint plan is run at once.
RunReport attend_two_phases(const Plan& exact, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                            const PlanContext& context, Plan* executed, const ChooseRest& choose_rest);

}  // namespace tessera
