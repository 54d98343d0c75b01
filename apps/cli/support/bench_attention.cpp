#include "support/bench_attention.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "core/parallel.h"
#include "eval/archetypes.h"
#include "eval/side_inputs.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/peak.h"
#include "support/bare_plan.h"
#include "support/measure.h"
#include "support/run_options.h"
#include "support/verify.h"
#include "tessera/eval.h"
#include "tessera/method.h"

namespace tessera::cli {

namespace {

struct Options {
  std::string method;
  std::string plan;
  std::int64_t kv_len = 0;
  std::int64_t q_len = 0;  // 0: kv_len in prefill, 1 in decode
  std::int64_t heads = 8;
  std::int64_t kv_heads = 0;  // 0: heads
  std::int64_t dim = 128;
  std::int64_t value_dim = 0;  // 0: dim
  std::string dtype = "f32";
  bool causal = false;
  std::string data = "randn";
  std::string phase = "prefill";
  std::vector<std::string> side;  // optional side inputs that are given
  int repeats = 5;
  std::uint64_t seed = 1;
  GridFlags grid;
  RunFlags run;
  bool json = false;
};

Problem problem_from(const Options& options) {
  require(options.phase == "prefill" || options.phase == "decode" || options.phase == "backward",
          "--phase is '{}'; expected 'prefill', 'decode' or 'backward'", options.phase);
  const auto positive = [](std::string_view name, std::int64_t value) {
    require(value > 0 && value <= std::int64_t{1} << 31, "{} is {}; expected 1 to 2^31", name, value);
    return value;
  };
  Problem problem;
  problem.kv_len = positive("--len", options.kv_len);
  problem.q_len =
      options.q_len != 0 ? positive("--q-len", options.q_len) : (options.phase == "decode" ? 1 : problem.kv_len);
  problem.q_heads = positive("--heads", options.heads);
  problem.kv_heads = options.kv_heads != 0 ? positive("--kv-heads", options.kv_heads) : problem.q_heads;
  problem.head_dim = positive("--dim", options.dim);
  problem.value_dim = options.value_dim != 0 ? positive("--value-dim", options.value_dim) : problem.head_dim;
  problem.causal = options.causal;
  problem.grid = grid_of(options.grid);
  problem.validate();
  return problem;
}

HeadOptions head_options_of(const Options& options, const Problem& problem) {
  const std::vector<std::string> kinds = head_kinds();
  require(std::find(kinds.begin(), kinds.end(), options.data) != kinds.end(),
          "unknown kind of data '{}'; did you mean '{}'?", options.data, nearest_name(options.data, kinds));
  HeadOptions heads;
  heads.kind = options.data;
  heads.tokens = problem.kv_len;
  heads.q_tokens = problem.q_len;
  heads.q_heads = problem.q_heads;
  heads.kv_heads = problem.kv_heads;
  heads.head_dim = problem.head_dim;
  heads.value_dim = problem.value_dim;
  heads.seed = options.seed;
  heads.dtype = dtype_from_name(options.dtype);
  heads.causal = problem.causal;
  if (problem.grid && options.data != "randn" && eval::archetypes_of(options.data, 1).front()->video()) {
    heads.grid = problem.grid->extent;
  }
  return heads;
}

/// What one execution took.
struct Times {
  double plan_ms = 0;
  double kernel_ms = 0;
};

/// Keys or values in memory like that of the cache: huge pages where they are large.
class CacheCopy {
 public:
  /// `view` looks at `bytes`, which are freed.
  CacheCopy(const TensorView& view, std::vector<std::byte>& bytes) : buffer_(bytes.size()), view_(view) {
    std::copy(bytes.begin(), bytes.end(), buffer_.data());
    view_.data = buffer_.data();
    std::vector<std::byte>().swap(bytes);
  }
  const TensorView& view() const { return view_; }
  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  kernels::AlignedBuffer buffer_;
  TensorView view_;
};

/// The thing that is measured: a method, which plans anew each time, or a plan built once.
class Subject {
 public:
  Subject(const Options& options, const Problem& problem, const RunOptions& run) : problem_(problem) {
    context_.run = run;
    if (!options.method.empty()) {
      method_ = make_method(options.method);
      const Phases phases = method_->info().phases;
      const bool supported = options.phase == "decode"     ? phases.decode
                             : options.phase == "backward" ? phases.backward
                                                           : phases.prefill;
      require(supported, "method '{}' does not support {}", method_->info().name, options.phase);
      side_inputs_.emplace(method_->info(), problem_, options.seed, options.side);
      name_ = method_->info().name;
      parameters_ = nlohmann::ordered_json::parse(method_->parameters());
      return;
    }
    const Stopwatch stopwatch;
    BarePlan bare = make_bare_plan(options.plan, problem);
    plan_ms_ = stopwatch.milliseconds();
    name_ = bare.name;
    parameters_ = bare.parameters;
    plan_ = std::move(bare.plan);
  }

  const std::string& name() const { return name_; }
  const nlohmann::ordered_json& parameters() const { return parameters_; }
  /// The plan of the last execution.
  const Plan& plan() const { return plan_; }
  const RunReport& report() const { return report_; }
  /// Whether outputs can be checked against the plan: not those of methods with branches or corrections.
  bool verifiable() const { return plan_.sources.size() == 1 && (method_ == nullptr || method_->runs_its_plan()); }
  bool has_plan() const { return method_ == nullptr || method_->info().has_plan; }

  /// Adds random side inputs: those that the method needs, and the optional ones that are named.
  void add_side_inputs(AttentionInputs& inputs) const {
    if (side_inputs_) side_inputs_->add_to(inputs);
  }

  /// Compares a recurrence on its first tokens with itself in float64. Throws Error when it is wrong.
  void verify_recurrence(const AttentionInputs& inputs) {
    Problem part = problem_;
    constexpr std::int64_t most_tokens = 256;
    part.kv_len = std::min(problem_.kv_len, most_tokens);
    part.q_len = std::min(problem_.q_len, part.kv_len);
    AttentionInputs first = inputs;
    first.q.shape[2] = part.q_len;
    first.k.shape[2] = first.v.shape[2] = part.kv_len;
    for (const SideInputInfo& side : method_->info().side) {
      const auto at = std::find(side.axes.begin(), side.axes.end(), SideAxis::tokens);
      for (SideTensor& tensor : first.side) {
        if (tensor.name == side.name && at != side.axes.end()) {
          tensor.view.shape.at(static_cast<std::size_t>(4 - (side.axes.end() - at))) = part.kv_len;
        }
      }
    }
    const auto answer = [&](KernelKind kernel) {
      PlanContext context = context_;
      context.run.kernel = kernel;
      std::vector<float> o(static_cast<std::size_t>(part.q_heads * part.q_len * part.value_dim));
      const AttentionOutputs outputs{
          mutable_view_of(o.data(), DType::f32, {1, part.q_heads, part.q_len, part.value_dim}), {}};
      method_->attend(part, first, outputs, context);
      return o;
    };
    const std::vector<float> expected = answer(KernelKind::reference);
    const std::vector<float> actual = answer(context_.run.kernel);
    double error = 0;
    double size = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      error += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
      size += std::pow(static_cast<double>(expected[i]), 2);
    }
    const double relative = std::sqrt(error / std::max(size, 1e-300));
    constexpr double allowed = 1e-4;
    require(relative <= allowed,
            "{}: wrong answer; against its float64 form on {} tokens the relative L2 error is {:.3g}; allowed {:.3g}",
            name_, part.kv_len, relative, allowed);
  }

  Times execute(const AttentionInputs& inputs, const AttentionOutputs& outputs) {
    if (method_ == nullptr) {
      report_ = run(plan_, inputs, outputs, context_.run);
      return {plan_ms_, report_.kernel_ms};
    }
    const std::unique_ptr<MethodState> state = method_->new_state();
    context_.state = state.get();
    if (!has_plan() && problem_.q_len < problem_.kv_len) see_earlier_tokens(inputs, outputs);
    report_ = method_->attend(problem_, inputs, outputs, context_, &plan_);
    context_.state = nullptr;
    return {report_.plan_ms, report_.kernel_ms};
  }

  /// Gradients for the plan of the last execution.
  Times execute_backward(const AttentionInputs& inputs, const SavedForward& saved, const Gradients& gradients) {
    report_ = method_ == nullptr ? run_backward(plan_, inputs, saved, gradients, context_.run)
                                 : method_->backward(problem_, inputs, saved, gradients, context_, &plan_);
    return {report_.plan_ms, report_.kernel_ms};
  }

 private:
  /// Decoding with a recurrence begins with a state that has seen what precedes the queries; that is not measured.
  void see_earlier_tokens(AttentionInputs inputs, AttentionOutputs outputs) {
    Problem earlier = problem_;
    earlier.kv_len -= problem_.q_len;
    earlier.q_len = inputs.q.shape[2] = outputs.o.shape[2] = 0;
    inputs.k.shape[2] = inputs.v.shape[2] = earlier.kv_len;
    for (const SideInputInfo& side : method_->info().side) {
      const auto at = std::find(side.axes.begin(), side.axes.end(), SideAxis::tokens);
      for (SideTensor& tensor : inputs.side) {
        if (tensor.name == side.name && at != side.axes.end()) {
          tensor.view.shape.at(static_cast<std::size_t>(4 - (side.axes.end() - at))) = earlier.kv_len;
        }
      }
    }
    outputs.lse = {};
    method_->attend(earlier, inputs, outputs, context_);
  }

  Problem problem_;
  PlanContext context_;
  std::optional<eval::RandomSideInputs> side_inputs_;
  std::unique_ptr<const Method> method_;
  std::string name_;
  nlohmann::ordered_json parameters_;
  Plan plan_;
  double plan_ms_ = 0;
  RunReport report_;
};

/// What the machine can do.
struct PeakRates {
  Spread gflops;
  Spread gbps;
};

/// Passes over registers and over memory, to be taken in turn with the kernels.
class PeakPasses {
 public:
  /// The kernels compute bf16 with dot products where the machine has them, all else, and recurrences, in f32.
  PeakPasses(Isa isa, DType dtype, int threads, bool recurrence)
      : isa_(isa),
        compute_(isa == Isa::avx512_bf16 && dtype == DType::bf16 && !recurrence ? DType::bf16 : DType::f32),
        threads_(threads),
        reader_(threads) {}

  void multiply() {
    constexpr int rounds = 4;  // long enough to be interrupted as often as a kernel is
    products_.push_back(kernels::product_pass(isa_, compute_, threads_, rounds));
  }
  void read() { reads_.push_back(reader_.pass()); }

  /// Fills up what took no turns.
  PeakRates finish() {
    constexpr std::size_t enough = 7;
    while (products_.size() < enough) multiply();
    while (reads_.size() < enough) read();
    return {spread_of(products_), spread_of(reads_)};
  }

 private:
  Isa isa_;
  DType compute_;
  int threads_;
  kernels::MemoryReader reader_;
  std::vector<double> products_;
  std::vector<double> reads_;
};

struct Result {
  Problem problem;
  RunReport report;
  PlanStatistics statistics;
  Spread plan_ms;
  Spread kernel_ms;
  Spread dense_ms;
  Spread forward_ms;         ///< of the same subject, in the backward phase
  double forward_flops = 0;  ///< of a recurrence in that phase
  PeakRates peaks;
  std::optional<OutputError> error;  ///< of the subject against dense, in the same dtype; none for a recurrence
  double peak_rss_mb = 0;
  double extra_mb = 0;  ///< what one execution needed beyond its inputs and outputs
  double inputs_outputs_mb = 0;
};

/// Memory of a backward call: dO drawn at random, gradients in float: of q, k, v and of the side inputs that were asked
/// for by name.
class BackwardData {
 public:
  BackwardData(const Options& options, const Problem& problem, const AttentionInputs& inputs,
               const AttentionOutputs& outputs) {
    HeadOptions heads = head_options_of(options, problem);
    heads.head_dim = problem.value_dim;
    heads.kind = "randn";
    heads.seed = options.seed + 1;
    d_o_ = make_heads(heads);
    const auto tensor = [](std::vector<float>& memory, std::int64_t h, std::int64_t n, std::int64_t d) {
      memory.resize(static_cast<std::size_t>(h * n * d));
      return mutable_view_of(memory.data(), DType::f32, {1, h, n, d});
    };
    gradients.d_q = tensor(d_q_, problem.q_heads, problem.q_len, problem.head_dim);
    gradients.d_k = tensor(d_k_, problem.kv_heads, problem.kv_len, problem.head_dim);
    gradients.d_v = tensor(d_v_, problem.kv_heads, problem.kv_len, problem.value_dim);
    for (const std::string& name : options.side) {
      const std::array<std::int64_t, 4> shape = inputs.find_side(name)->shape;
      std::vector<float>& memory = d_side_.emplace_back();
      memory.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
      gradients.side.push_back({name, mutable_view_of(memory.data(), DType::f32, shape)});
    }
    saved.o = outputs.o;
    saved.lse = outputs.lse;
    saved.d_o = d_o_.q();
  }

  SavedForward saved;
  Gradients gradients;

 private:
  HeadData d_o_;
  std::vector<float> d_q_;
  std::vector<float> d_k_;
  std::vector<float> d_v_;
  std::deque<std::vector<float>> d_side_;
};

/// Backward against dense backward, and the forward pass of the same subject beside them. `outputs` holds what the
/// subject's forward pass left.
void measure_backward(const Options& options, const Plan& dense, const RunOptions& dense_options,
                      const AttentionInputs& inputs, const AttentionOutputs& outputs, Subject& subject,
                      PeakPasses& peaks, Result& result) {
  const Problem& problem = dense.problem;
  std::vector<std::byte> dense_o(static_cast<std::size_t>(problem.q_heads * problem.q_len * problem.value_dim) *
                                 size_of(outputs.o.dtype));
  std::vector<float> dense_lse(outputs.lse.size());
  const AttentionOutputs dense_outputs{mutable_view_of(dense_o.data(), outputs.o.dtype, outputs.o.shape), dense_lse};
  run(dense, inputs, dense_outputs, dense_options);
  const BackwardData own(options, problem, inputs, outputs);
  Options without_side = options;
  without_side.side.clear();
  const BackwardData yardstick(without_side, problem, inputs, dense_outputs);
  subject.execute_backward(inputs, own.saved, own.gradients);
  if (subject.verifiable()) {
    verify_gradient_samples(subject.name(), subject.plan(), inputs, own.saved, own.gradients.d_q);
  }
  run_backward(dense, inputs, yardstick.saved, yardstick.gradients, dense_options);
  verify_gradient_samples("dense", dense, inputs, yardstick.saved, yardstick.gradients.d_q);
  std::vector<double> plan_ms;
  std::vector<double> kernel_ms;
  std::vector<double> dense_ms;
  std::vector<double> forward_ms;
  for (int i = 0; i < options.repeats; ++i) {
    peaks.multiply();
    forward_ms.push_back(subject.execute(inputs, outputs).kernel_ms);
    result.forward_flops = subject.report().flops;
    const Times times = subject.execute_backward(inputs, own.saved, own.gradients);
    plan_ms.push_back(times.plan_ms);
    kernel_ms.push_back(times.kernel_ms);
    dense_ms.push_back(run_backward(dense, inputs, yardstick.saved, yardstick.gradients, dense_options).kernel_ms);
    fmt::print(stderr, "{}/{}: {} backward {:.2f} ms (forward {:.2f} ms), dense backward {:.2f} ms\n", i + 1,
               options.repeats, subject.name(), kernel_ms.back(), forward_ms.back(), dense_ms.back());
  }
  result.peaks = peaks.finish();
  result.report = subject.report();
  result.plan_ms = spread_of(plan_ms);
  result.kernel_ms = spread_of(kernel_ms);
  result.dense_ms = spread_of(dense_ms);
  result.forward_ms = spread_of(forward_ms);
}

Result measure(const Options& options, const Problem& problem, Subject& subject, const RunOptions& run_options) {
  Result result;
  result.problem = problem;
  const DType dtype = dtype_from_name(options.dtype);
  const int threads = thread_count(run_options.threads);

  fmt::print(stderr, "data ({}) ...\n", options.data);
  HeadOptions head_options = head_options_of(options, problem);
  head_options.threads = threads;
  HeadData data = make_heads(head_options);
  const CacheCopy k(data.k(), data.k_bytes);
  const CacheCopy v(data.v(), data.v_bytes);
  std::vector<std::byte> o(static_cast<std::size_t>(problem.q_heads * problem.q_len * problem.value_dim) *
                           size_of(dtype));
  std::vector<float> lse(static_cast<std::size_t>(problem.q_heads * problem.q_len));
  AttentionInputs inputs;
  inputs.q = data.q();
  inputs.k = k.view();
  inputs.v = v.view();
  subject.add_side_inputs(inputs);
  const AttentionOutputs outputs{
      mutable_view_of(o.data(), dtype, {1, problem.q_heads, problem.q_len, problem.value_dim}), lse};
  result.inputs_outputs_mb =
      static_cast<double>(data.q_bytes.size() + k.bytes() + v.bytes() + o.size() + lse.size() * sizeof(float)) / 1e6;

  const Plan dense = dense_plan(problem);
  RunOptions dense_options = run_options;
  dense_options.kernel = KernelKind::automatic;
  fmt::print(stderr, "checking {} and dense against the reference ...\n", subject.name());
  reset_peak_memory();
  const double resident_mb = peak_memory_mb();
  subject.execute(inputs, outputs);
  result.peak_rss_mb = peak_memory_mb();
  result.extra_mb = result.peak_rss_mb - resident_mb;
  if (!subject.has_plan()) {
    subject.verify_recurrence(inputs);
  } else {
    if (subject.verifiable()) verify_samples(subject.name(), subject.plan(), inputs, outputs);
    result.statistics = statistics(subject.plan());
  }
  PeakPasses peaks(*run_options.isa, dtype, threads, !subject.has_plan());
  if (options.phase == "backward") {
    measure_backward(options, dense, dense_options, inputs, outputs, subject, peaks, result);
    return result;
  }
  std::vector<std::byte> subject_o = o;
  std::vector<float> subject_lse = lse;
  run(dense, inputs, outputs, dense_options);
  verify_samples("dense", dense, inputs, outputs);
  if (subject.has_plan()) {
    result.error = compare_outputs(view_of(subject_o.data(), dtype, outputs.o.shape), subject_lse, outputs.o, lse);
  }
  std::vector<std::byte>().swap(subject_o);
  std::vector<float>().swap(subject_lse);

  std::vector<double> plan_ms;
  std::vector<double> kernel_ms;
  std::vector<double> dense_ms;
  for (int i = 0; i < options.repeats; ++i) {
    if (options.phase == "decode") {
      peaks.read();
    } else {
      peaks.multiply();
    }
    const Times times = subject.execute(inputs, outputs);
    plan_ms.push_back(times.plan_ms);
    kernel_ms.push_back(times.kernel_ms);
    dense_ms.push_back(run(dense, inputs, outputs, dense_options).kernel_ms);
    fmt::print(stderr, "{}/{}: {} {:.2f} ms (plan {:.2f} ms), dense {:.2f} ms\n", i + 1, options.repeats,
               subject.name(), kernel_ms.back(), plan_ms.back(), dense_ms.back());
  }
  result.peaks = peaks.finish();
  result.report = subject.report();
  result.plan_ms = spread_of(plan_ms);
  result.kernel_ms = spread_of(kernel_ms);
  result.dense_ms = spread_of(dense_ms);
  return result;
}

nlohmann::ordered_json to_json(const Options& options, const Subject& subject, const Result& result) {
  const Problem& problem = result.problem;
  const double seconds = result.kernel_ms.median / 1e3;
  const bool backward = options.phase == "backward";
  const double pairs = static_cast<double>(result.statistics.planned_pairs);
  const double forward_flops = 2.0 * pairs * static_cast<double>(problem.head_dim + problem.value_dim);
  // S, dQ and dK are products over head_dim, dP and dV over value_dim.
  const double planned_flops =
      backward ? 2.0 * pairs * static_cast<double>(3 * problem.head_dim + 2 * problem.value_dim) : forward_flops;
  const double flops = subject.has_plan() ? planned_flops : result.report.flops;
  // The statistics count keys and values at two bytes an element.
  const double bytes = result.statistics.kv_bytes / 2 * static_cast<double>(size_of(dtype_from_name(options.dtype)));
  const double gflops = flops / seconds / 1e9;
  const double gbps = bytes / seconds / 1e9;
  const double ratio = result.kernel_ms.median / result.dense_ms.median;
  nlohmann::ordered_json json = {
      {"method", subject.name()},
      {"params", subject.parameters()},
      {"isa", name_of(result.report.isa)},
      {"threads", result.report.threads},
      {"dtype", options.dtype},
      {"density", result.statistics.density},
      {"plan_ms", to_json(result.plan_ms)},
      {"kernel_ms", to_json(result.kernel_ms)},
      {"gflops", gflops},
      {"peak_gflops", result.peaks.gflops.median},
      {"fraction_of_peak", gflops / result.peaks.gflops.median},
      {"dense_ms", to_json(result.dense_ms)},
      {"ratio_to_dense", ratio},
      {"gbps", gbps},
      {"peak_gbps", result.peaks.gbps.median},
      {"fraction_of_bandwidth", gbps / result.peaks.gbps.median},
      {"peak_gflops_best", result.peaks.gflops.max},
      {"peak_gbps_best", result.peaks.gbps.max},
      {"kernel", name_of(result.report.kernel)},
      {"executed_density", result.statistics.executed_density},
      {"ratio_to_density_times_dense", subject.has_plan() ? ratio / result.statistics.density : 0},
      {"tokens_per_second", static_cast<double>(problem.q_len) / seconds},
      {"plan_to_dense", result.plan_ms.median / result.dense_ms.median},
      {"peak_rss_mb", result.peak_rss_mb},
      {"inputs_outputs_mb", result.inputs_outputs_mb},
      {"extra_mb", result.extra_mb},
      {"workspace_mb", static_cast<double>(result.report.workspace_bytes) / 1e6}};
  if (!options.side.empty()) json["side"] = options.side;
  if (result.error) {
    json["error"] = {{"rel_l2", result.error->rel_l2},
                     {"max_abs", result.error->max_abs},
                     {"softmax_mass", result.error->softmax_mass}};
  }
  if (backward) {
    const double forward_gflops =
        (subject.has_plan() ? forward_flops : result.forward_flops) / (result.forward_ms.median / 1e3) / 1e9;
    json["forward_ms"] = to_json(result.forward_ms);
    json["forward_fraction_of_peak"] = forward_gflops / result.peaks.gflops.median;
  }
  return json;
}

void print_text(const nlohmann::ordered_json& json) {
  const auto number = [&](const char* key) { return json[key].get<double>(); };
  const auto spread = [&](const char* key) {
    return fmt::format("{:.3f} ms (from {:.3f} to {:.3f})", json[key]["median"].get<double>(),
                       json[key]["min"].get<double>(), json[key]["max"].get<double>());
  };
  fmt::print("{} {}{}\n", json["method"].get<std::string>(), json["params"].dump(),
             json.contains("side") ? " with " + json["side"].dump() : "");
  fmt::print("  {} kernel, {}, {} threads, {}\n", json["kernel"].get<std::string>(), json["isa"].get<std::string>(),
             json["threads"].get<int>(), json["dtype"].get<std::string>());
  const bool has_plan = number("density") > 0;
  if (has_plan) {
    fmt::print("  density    {:.4f} (executed {:.4f})\n", number("density"), number("executed_density"));
    fmt::print("  plan       {}, {:.2f} % of dense\n", spread("plan_ms"), 100 * number("plan_to_dense"));
  } else {
    fmt::print("  recurrence {:.0f} tokens/s\n", number("tokens_per_second"));
  }
  fmt::print("  kernel     {}\n", spread("kernel_ms"));
  fmt::print("  dense      {}\n", spread("dense_ms"));
  if (has_plan) {
    fmt::print("  ratio      {:.4f} of dense = {:.3f} x density x dense\n", number("ratio_to_dense"),
               number("ratio_to_density_times_dense"));
  } else {
    fmt::print("  ratio      {:.4f} of dense\n", number("ratio_to_dense"));
  }
  if (json.contains("error")) {
    fmt::print("  error      relative L2 {:.4g}, largest {:.4g}, softmax mass {:.4f}, against dense in {}\n",
               json["error"]["rel_l2"].get<double>(), json["error"]["max_abs"].get<double>(),
               json["error"]["softmax_mass"].get<double>(), json["dtype"].get<std::string>());
  }
  fmt::print("  arithmetic {:.1f} GFLOP/s, {:.1f} % of the peak {:.1f}\n", number("gflops"),
             100 * number("fraction_of_peak"), number("peak_gflops"));
  fmt::print("  memory     {:.2f} GB/s of keys and values, {:.1f} % of the peak {:.2f}\n", number("gbps"),
             100 * number("fraction_of_bandwidth"), number("peak_gbps"));
  fmt::print(
      "  resident   {:.1f} MB at most; inputs and outputs {:.1f} MB, beyond them {:.1f} MB (workspace {:.1f} MB)\n",
      number("peak_rss_mb"), number("inputs_outputs_mb"), number("extra_mb"), number("workspace_mb"));
}

/// What the backward phase adds.
void print_backward(const nlohmann::ordered_json& json) {
  const auto forward = json["forward_fraction_of_peak"].get<double>();
  fmt::print("  forward    {:.3f} ms, {:.1f} % of the peak; backward reaches {:.3f} of that fraction\n",
             json["forward_ms"]["median"].get<double>(), 100 * forward,
             json["fraction_of_peak"].get<double>() / forward);
}

void run_bench_attention(const Options& options) {
  require(options.method.empty() != options.plan.empty(), "give one of --method and --plan");
  require(options.side.empty() || !options.method.empty(), "--side is for methods; a plan has no side inputs");
  require(options.repeats > 0 && options.repeats <= 1000, "--repeats is {}; expected 1 to 1000", options.repeats);
  const DType dtype = dtype_from_name(options.dtype);
  require(is_attention_dtype(dtype), "--dtype is {}; expected f32, bf16 or f16", options.dtype);
  const Problem problem = problem_from(options);
  Workspace workspace;
  RunOptions run_options = run_options_of(options.run);
  run_options.workspace = &workspace;
  head_options_of(options, problem);  // an unknown kind of data fails before the work starts
  Subject subject(options, problem, run_options);
  const nlohmann::ordered_json json = to_json(options, subject, measure(options, problem, subject, run_options));
  if (options.json) {
    print_json(json);
  } else {
    print_text(json);
    if (options.phase == "backward") print_backward(json);
  }
}

}  // namespace

void add_bench_attention(CLI::App& bench) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      add_command(bench, "attention", "One attention call against dense attention and the machine's peaks",
                  "tessera bench attention --plan random-block:tile=128,density=0.05 --len 32768 --heads 8 "
                  "--kv-heads 2 --dim 128 --dtype bf16 --causal\n\nPlans with their defaults:\n" +
                      bare_plan_help());
  command->add_option("--method", options->method, "Method SPEC: name or name:key=value,... (see tessera methods)");
  command->add_option("--plan", options->plan, "Plan without a method: name or name:key=value,... (below)");
  command->add_option("--len", options->kv_len, "Keys")->required();
  command->add_option("--q-len", options->q_len, "Queries (default: --len, or 1 with --phase decode)");
  command->add_option("--heads", options->heads, "Query heads")->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads, "Key and value heads (default: --heads)");
  command->add_option("--dim", options->dim, "Head dimension")->capture_default_str();
  command->add_option("--value-dim", options->value_dim, "Dimension of the values (default: --dim)");
  command->add_option("--dtype", options->dtype, "f32, bf16 or f16")->capture_default_str();
  command->add_flag("--causal", options->causal, "Queries see keys up to their own position");
  command->add_option("--data", options->data, fmt::format("Data: {}", fmt::join(head_kinds(), ", ")))
      ->capture_default_str();
  command->add_option("--phase", options->phase, "prefill, decode or backward")->capture_default_str();
  command
      ->add_option(
          "--side", options->side,
          "Optional side inputs of the method to give it, NAME,NAME (see tessera methods NAME), such as learned "
          "weights; drawn at random, with gradients in the backward phase")
      ->delimiter(',');
  command->add_option("--repeats", options->repeats, "Measurements of each side, alternating")->capture_default_str();
  command->add_option("--seed", options->seed, "Seed of the data")->capture_default_str();
  add_grid_options(*command, options->grid);
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([options] { run_bench_attention(*options); });
}

}  // namespace tessera::cli
