#include "methods/two_phases.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "methods/branch_merge.h"

namespace tessera {

namespace {

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::int64_t rows_of(const Problem& problem) {
  return (problem.variable_length() ? 1 : problem.batch) * problem.q_heads * problem.q_len;
}

/// The caller's options without what belongs to the whole call.
RunOptions plain(RunOptions options) {
  options.online_skip = {};
  return options;
}

AttentionOutputs outputs_of(Branch& branch, const TensorView& like) {
  return {mutable_view_of(branch.o.data(), DType::f32, like.shape), branch.lse};
}

}  // namespace

RowStatistics row_statistics(const Plan& plan, const AttentionInputs& inputs, const RunOptions& options) {
  // The first columns of the keys stand in for values: few, because their product is of no use.
  constexpr std::int64_t columns = 16;
  Plan without_values = plan;
  Problem& problem = without_values.problem;
  problem.value_dim = std::min(columns, problem.head_dim);
  AttentionInputs keys_only = inputs;
  keys_only.modifiers = {};
  keys_only.v = inputs.k;
  keys_only.v.shape[3] = problem.value_dim;
  const std::int64_t rows = rows_of(problem);
  RowStatistics statistics{std::vector<float>(static_cast<std::size_t>(rows)),
                           std::vector<float>(static_cast<std::size_t>(rows))};
  std::vector<std::uint16_t> unused(static_cast<std::size_t>(rows * problem.value_dim));
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  AttentionOutputs outputs{
      mutable_view_of(unused.data(), DType::bf16, {batch, problem.q_heads, problem.q_len, problem.value_dim}),
      statistics.lse};
  outputs.row_maximum = statistics.maximum;
  RunOptions own = plain(options);
  if (own.kernel != KernelKind::reference) own.kernel = KernelKind::automatic;
  run(without_values, keys_only, outputs, own);
  return statistics;
}

Plan join_entries(const Plan& a, const Plan& b) {
  Plan joined = a;
  joined.entries.clear();
  joined.entries.reserve(a.entries.size() + b.entries.size());
  joined.entry_begin.assign(1, 0);
  joined.entry_begin.reserve(a.entry_begin.size());
  const auto pool = static_cast<std::int64_t>(a.tokens.size());
  joined.tokens.insert(joined.tokens.end(), b.tokens.begin(), b.tokens.end());
  for (std::int64_t r = 0; r < a.rows(); ++r) {
    joined.entries.insert(joined.entries.end(), a.row(r).begin(), a.row(r).end());
    for (PlanEntry entry : b.row(r)) {
      if (entry.kind == EntryKind::gather) entry.begin += pool;
      joined.entries.push_back(entry);
    }
    joined.entry_begin.push_back(static_cast<std::int64_t>(joined.entries.size()));
  }
  return joined;
}

Plan plan_two_phases(const Plan& exact, const AttentionInputs& inputs, const PlanContext& context,
                     const ChooseRest& choose_rest) {
  return join_entries(exact, choose_rest(row_statistics(exact, inputs, context.run)));
}

RunReport attend_two_phases(const Plan& exact, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                            const PlanContext& context, Plan* executed, const ChooseRest& choose_rest) {
  const auto start = Clock::now();
  const Modifiers& modifiers = inputs.modifiers;
  const bool by_products =
      outputs.scores.data != nullptr || !outputs.row_maximum.empty() || outputs.tile_maximum.data != nullptr;
  if (modifiers.changes_scores() || !modifiers.sink_logits.empty() || by_products || context.run.online_skip.used()) {
    Plan plan = plan_two_phases(exact, inputs, context, choose_rest);
    const double plan_ms = milliseconds_since(start);
    RunReport report = run(plan, inputs, outputs, context.run);
    report.plan_ms = plan_ms;
    if (executed != nullptr) *executed = std::move(plan);
    return report;
  }
  const Problem& problem = exact.problem;
  const std::int64_t rows = rows_of(problem);
  Branch first(rows, problem.value_dim);
  RowStatistics statistics;
  statistics.maximum.resize(static_cast<std::size_t>(rows));
  AttentionOutputs first_outputs = outputs_of(first, outputs.o);
  first_outputs.row_maximum = statistics.maximum;
  RunOptions options = context.run;
  if (options.kernel != KernelKind::reference) options.kernel = KernelKind::automatic;
  RunReport report = run(exact, inputs, first_outputs, options);
  double kernel_ms = milliseconds_since(start);

  const auto choice = Clock::now();
  statistics.lse = first.lse;
  const Plan rest = choose_rest(statistics);
  const double plan_ms = milliseconds_since(choice);

  const auto second_start = Clock::now();
  Branch second(rows, problem.value_dim);
  const RunReport second_report = run(rest, inputs, outputs_of(second, outputs.o), options);
  merge_branches(first, second, outputs, options.threads);
  kernel_ms += milliseconds_since(second_start);
  report.plan_ms = plan_ms;
  report.kernel_ms = kernel_ms;
  report.workspace_bytes = std::max(report.workspace_bytes, second_report.workspace_bytes) +
                           2 * (first.o.size() + first.lse.size()) * sizeof(float);
  if (executed != nullptr) *executed = join_entries(exact, rest);
  return report;
}

}  // namespace tessera
