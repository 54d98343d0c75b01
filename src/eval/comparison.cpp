#include "eval/comparison.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>
#include <memory>

#include "core/error.h"
#include "eval/side_inputs.h"
#include "methods/neighborhood_parameters.h"

namespace tessera::eval {

namespace {

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 != 0 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

std::string name_in(const std::string& spec) {
  return spec.substr(0, spec.find(':'));
}

/// Whether the SPEC sets the parameter itself.
bool sets(const std::string& spec, const std::string& parameter) {
  return spec.find(":" + parameter + "=") != std::string::npos || spec.find("," + parameter + "=") != std::string::npos;
}

/// The value at `share` of the way from little work to much.
double value_at(const BudgetParameter& budget, double share) {
  if (!budget.logarithmic) return budget.sparsest + share * (budget.densest - budget.sparsest);
  return budget.sparsest * std::pow(budget.densest / budget.sparsest, share);
}

std::string text_of(double value, bool whole) {
  return whole ? fmt::format("{:.0f}", value) : fmt::format("{:.6g}", value);
}

/// Milliseconds that the threads of the process have computed.
double cpu_milliseconds() {
  return 1e3 * static_cast<double>(std::clock()) / static_cast<double>(CLOCKS_PER_SEC);
}

/// By what the times of a report are multiplied: 1, or so that they add up to `cpu_ms`.
double time_factor(const RunReport& report, double cpu_ms, bool cpu_time) {
  const double passed = report.plan_ms + report.kernel_ms;
  return cpu_time && passed > 0 ? cpu_ms / passed : 1;
}

}  // namespace

double predicted_milliseconds(const PlanStatistics& statistics, std::size_t bytes_per_element,
                              const MachineRates& rates) {
  if (rates.gflops <= 0 || rates.gbps <= 0) return 0;
  const double bytes = statistics.kv_bytes / 2 * static_cast<double>(bytes_per_element);
  return std::max(statistics.flops / rates.gflops, bytes / rates.gbps) / 1e6;
}

Comparison::Comparison(const Problem& problem, const AttentionInputs& inputs, ComparisonOptions options)
    : problem_(problem), inputs_(inputs), options_(options), dense_(dense_plan(problem)) {
  check_inputs(problem, inputs);
  require(options_.repeats > 0, "a comparison of {} repeats; expected 1 or more", options_.repeats);
  require(!problem.variable_length(), "a comparison of sequences of different lengths; expected one length");
  const auto rows = static_cast<std::size_t>(problem.batch * problem.q_heads * problem.q_len);
  dense_o_.resize(rows * static_cast<std::size_t>(problem.value_dim) * size_of(inputs.q.dtype));
  dense_lse_.resize(rows);
  const std::array<std::int64_t, 4> shape{problem.batch, problem.q_heads, problem.q_len, problem.value_dim};
  const double begin = cpu_milliseconds();
  const RunReport report =
      run(dense_, inputs_, {mutable_view_of(dense_o_.data(), inputs.q.dtype, shape), dense_lse_}, options_.run);
  first_dense_ms_ = report.kernel_ms * time_factor(report, cpu_milliseconds() - begin, options_.cpu_time);
}

MethodMeasurement Comparison::measure(const std::string& spec) const {
  const std::unique_ptr<const Method> method = make_method(spec);
  const MethodInfo& info = method->info();
  require(info.has_plan, "{}: a recurrence is no approximation of softmax attention; expected a method with a plan",
          info.name);
  require(info.phases.prefill || problem_.q_len == 1, "{}: the method is for decoding; expected one for prefill",
          info.name);
  AttentionInputs inputs = inputs_;
  const RandomSideInputs side(info, problem_, options_.seed);
  side.add_to(inputs);
  const std::array<std::int64_t, 4> shape{problem_.batch, problem_.q_heads, problem_.q_len, problem_.value_dim};
  const DType dtype = inputs.q.dtype;
  std::vector<std::byte> o(dense_o_.size());
  std::vector<float> lse(dense_lse_.size());
  std::vector<std::byte> again(dense_o_.size());
  Plan plan;
  std::vector<double> plan_ms;
  std::vector<double> kernel_ms;
  std::vector<double> dense_ms;
  for (int i = 0; i < options_.repeats; ++i) {
    const std::unique_ptr<MethodState> state = method->new_state();
    PlanContext context;
    context.run = options_.run;
    context.state = state.get();
    const double begin = cpu_milliseconds();
    const RunReport report =
        method->attend(problem_, inputs, {mutable_view_of(o.data(), dtype, shape), lse}, context, &plan);
    const double middle = cpu_milliseconds();
    const double factor = time_factor(report, middle - begin, options_.cpu_time);
    plan_ms.push_back(factor * report.plan_ms);
    kernel_ms.push_back(factor * report.kernel_ms);
    if (options_.repeats == 1) {
      dense_ms.push_back(first_dense_ms_);
      break;
    }
    const RunReport dense = run(dense_, inputs, {mutable_view_of(again.data(), dtype, shape), {}}, options_.run);
    dense_ms.push_back(dense.kernel_ms * time_factor(dense, cpu_milliseconds() - middle, options_.cpu_time));
  }
  MethodMeasurement result;
  result.spec = spec;
  result.method = info.name;
  result.parameters = method->parameters();
  const PlanStatistics statistics = tessera::statistics(plan);
  result.density = statistics.density;
  result.executed_density = statistics.executed_density;
  result.flops = statistics.flops;
  result.dense_flops =
      2.0 * static_cast<double>(statistics.allowed_pairs) * static_cast<double>(problem_.head_dim + problem_.value_dim);
  result.kv_bytes = statistics.kv_bytes / 2 * static_cast<double>(size_of(dtype));
  result.plan_ms = median(plan_ms);
  result.kernel_ms = median(kernel_ms);
  result.dense_ms = median(dense_ms);
  result.predicted_ms = predicted_milliseconds(statistics, size_of(dtype), options_.rates);
  result.kinetics_ms = Cost{result.flops, result.kv_bytes}.milliseconds(options_.rates);
  if (info.name == "gna") {
    if (const auto simulated = simulate_call(problem_, result.parameters)) {
      const auto heads = static_cast<double>(problem_.batch * problem_.q_heads);
      result.simulated_density =
          static_cast<double>(simulated->visited_pairs) * heads / static_cast<double>(statistics.allowed_pairs);
    }
  }
  result.error =
      compare_outputs(view_of(o.data(), dtype, shape), lse, view_of(dense_o_.data(), dtype, shape), dense_lse_);
  if (method->runs_its_plan() && plan.sources.size() == 1) {
    result.quality = judge_selection(plan, inputs_, options_.quality);
  }
  return result;
}

double Comparison::density_of(const std::string& spec) const {
  const std::unique_ptr<const Method> method = make_method(spec);
  AttentionInputs inputs = inputs_;
  const RandomSideInputs side(method->info(), problem_, options_.seed);
  side.add_to(inputs);
  const std::unique_ptr<MethodState> state = method->new_state();
  PlanContext context;
  context.run = options_.run;
  context.state = state.get();
  return statistics(method->plan(problem_, inputs, context)).executed_density;
}

std::optional<std::string> Comparison::at_density(const std::string& spec, double target) const {
  const MethodEntry& entry = find_method(name_in(spec));
  if (!entry.info.budget || !entry.info.has_plan || sets(spec, entry.info.budget->name)) return {};
  BudgetParameter budget = *entry.info.budget;
  const auto declared = std::find_if(entry.parameters.begin(), entry.parameters.end(),
                                     [&](const ParameterInfo& parameter) { return parameter.name == budget.name; });
  const bool whole = declared != entry.parameters.end() && declared->type == "int";
  // Counts beyond the sequence change nothing.
  if (whole)
    budget.densest = std::min(budget.densest, std::max(2.0 * static_cast<double>(problem_.kv_len), budget.sparsest));

  std::optional<std::string> nearest;
  double distance = std::max(0.005, 0.1 * target);
  double low = 0;
  double high = 1;
  std::string previous;
  constexpr int most_steps = 14;
  for (int step = 0; step < most_steps; ++step) {
    const double middle = (low + high) / 2;
    const std::string value = text_of(value_at(budget, middle), whole);
    if (value == previous) break;
    previous = value;
    std::string candidate = with_parameter(spec, budget.name, value);
    const double density = density_of(candidate);
    if (std::abs(density - target) <= distance) {
      distance = std::abs(density - target);
      nearest = std::move(candidate);
      if (distance < 0.02 * target) break;
    }
    (density < target ? low : high) = middle;
  }
  return nearest;
}

std::string with_parameter(const std::string& spec, const std::string& name, const std::string& value) {
  return fmt::format("{}{}{}={}", spec, spec.find(':') == std::string::npos ? ':' : ',', name, value);
}

std::vector<std::string> split_specs(const std::string& text) {
  std::vector<std::string> specs;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const std::size_t equals = part.find('=');
    const bool continues = equals != std::string::npos && part.find(':') > equals && !specs.empty();
    if (continues) {
      specs.back() += "," + part;
    } else {
      specs.push_back(part);
    }
    begin = end + 1;
  }
  return specs;
}

std::optional<AtError> at_error(std::span<const MethodMeasurement> measurements, double rel_l2) {
  std::vector<const MethodMeasurement*> curve;
  for (const MethodMeasurement& measurement : measurements) {
    if (measurement.error.rel_l2 > 0 && measurement.executed_density > 0) curve.push_back(&measurement);
  }
  std::sort(curve.begin(), curve.end(),
            [](const auto* a, const auto* b) { return a->executed_density < b->executed_density; });
  // From the dense end, so that a curve that is not monotone is met where it stays below the error.
  for (std::size_t i = curve.size(); i-- > 1;) {
    const MethodMeasurement& sparse = *curve[i - 1];
    const MethodMeasurement& dense = *curve[i];
    if (sparse.error.rel_l2 < rel_l2 || dense.error.rel_l2 > rel_l2) continue;
    const double span = std::log(sparse.error.rel_l2 / dense.error.rel_l2);
    const double share = span > 0 ? std::log(rel_l2 / dense.error.rel_l2) / span : 0;
    const auto between = [&](double at_dense, double at_sparse) {
      return at_dense * std::pow(at_sparse / at_dense, share);
    };
    return AtError{between(dense.executed_density, sparse.executed_density),
                   between(dense.speed_up(), sparse.speed_up())};
  }
  return {};
}

}  // namespace tessera::eval
