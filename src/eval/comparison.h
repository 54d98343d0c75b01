// Methods side by side on one attention call: cost, error against dense attention, quality of the selection; at their
// own settings and at equal density.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "eval/cost_model.h"
#include "eval/selection_quality.h"
#include "tessera/eval.h"
#include "tessera/method.h"

namespace tessera::eval {

/// One method at one setting.
struct MethodMeasurement {
  std::string spec;
  std::string method;
  std::string parameters;                ///< JSON, defaults filled in
  std::optional<double> target_density;  ///< that the setting was searched for
  double density = 0;
  double executed_density = 0;
  double flops = 0;  ///< of the executed pairs, as are the bytes
  double dense_flops = 0;
  double kv_bytes = 0;
  double plan_ms = 0;  ///< medians
  double kernel_ms = 0;
  double dense_ms = 0;      ///< in turns with the two
  double predicted_ms = 0;  ///< of the kernel: roofline over the executed pairs
  double kinetics_ms = 0;   ///< of the kernel: operations plus the price of the bytes (cost_model.h)
  /// What the neighbourhood simulator says that the executed density is; of `gna` where it models the call.
  std::optional<double> simulated_density;
  OutputError error;  ///< against dense attention of the same kernels and dtype
  /// Absent where outputs are not those of the plan's raw keys alone: corrections, branches, pooled keys.
  std::optional<SelectionQuality> quality;

  double selection_share() const { return plan_ms / dense_ms; }
  double speed_up() const { return dense_ms / (plan_ms + kernel_ms); }
};

struct ComparisonOptions {
  int repeats = 3;  ///< timings of each side, in turns; 1: dense attention is timed once, before all methods
  /// Times are what all threads of the process computed for, not what passed: ratios that hold on a busy machine.
  bool cpu_time = false;
  QualityOptions quality;
  MachineRates rates;
  RunOptions run;
  std::uint64_t seed = 0;  ///< of the side inputs that methods need
};

/// Time that the executed pairs of a plan take when either products or reading keys and values bound it (roofline).
double predicted_milliseconds(const PlanStatistics& statistics, std::size_t bytes_per_element,
                              const MachineRates& rates);

/// One attention call that methods are measured on. The tensors must outlive it.
class Comparison {
 public:
  /// Computes dense attention once. Throws Error for tensors that do not fit.
  Comparison(const Problem& problem, const AttentionInputs& inputs, ComparisonOptions options);

  /// Throws Error for a recurrence (it is no approximation of softmax attention), a method without prefill, or a
  /// problem outside of its domain.
  MethodMeasurement measure(const std::string& spec) const;

  /// The SPEC with its budget parameter set so that the executed density is nearest to `target`. Nothing when the
  /// method has no such parameter, the SPEC sets it, or no setting comes within a tenth of the target (or
  /// 0.005).
  std::optional<std::string> at_density(const std::string& spec, double target) const;

  const Problem& problem() const { return problem_; }

 private:
  double density_of(const std::string& spec) const;

  Problem problem_;
  AttentionInputs inputs_;
  ComparisonOptions options_;
  Plan dense_;
  std::vector<std::byte> dense_o_;
  std::vector<float> dense_lse_;
  double first_dense_ms_ = 0;
};

/// `spec` with one more parameter; an error later if it has it already.
std::string with_parameter(const std::string& spec, const std::string& name, const std::string& value);
/// "a,b:x=1,y=2,c" as {"a", "b:x=1,y=2", "c"}: a part "key=value" belongs to the SPEC before it.
std::vector<std::string> split_specs(const std::string& text);

/// Where a curve of measurements meets an error: interpolated between the two settings around it, logarithmically.
struct AtError {
  double density = 0;
  double speed_up = 0;
};
/// Of measurements of one method at different budgets. Nothing when all of them lie on one side of the error.
std::optional<AtError> at_error(std::span<const MethodMeasurement> measurements, double rel_l2);

}  // namespace tessera::eval
