// `tessera attend`: one attention call on tensors from a file.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "io/safetensors.h"
#include "support/input_file.h"
#include "support/run_options.h"
#include "tessera/eval.h"
#include "tessera/method.h"

namespace tessera::cli {

namespace {

struct Options {
  std::string qkv;
  std::string method = "dense";
  bool causal = false;
  std::optional<float> scale;
  std::optional<std::int64_t> q_offset;
  std::string out;
  std::string plan_out;
  std::string mask_out;
  bool compare = false;
  GridFlags grid;
  RunFlags run;
  bool json = false;
};

/// Output and LSE of one call, owned.
struct Answer {
  DType dtype;
  std::array<std::int64_t, 4> shape;
  std::vector<std::byte> o;
  std::vector<float> lse;

  Answer(const Problem& problem, DType of_dtype)
      : dtype(of_dtype), shape{problem.batch, problem.q_heads, problem.q_len, problem.value_dim} {
    const auto rows = static_cast<std::size_t>(problem.batch * problem.q_heads * problem.q_len);
    o.resize(rows * static_cast<std::size_t>(problem.value_dim) * size_of(dtype));
    lse.resize(rows);
  }
  AttentionOutputs outputs() { return {mutable_view_of(o.data(), dtype, shape), lse}; }
  TensorView view() const { return view_of(o.data(), dtype, shape); }
};

OutputError compare_with_dense(const Problem& problem, const AttentionInputs& inputs, const Answer& answer,
                               int threads) {
  Answer reference(problem, DType::f32);
  RunOptions options;
  options.kernel = KernelKind::reference;
  options.threads = threads;
  run(dense_plan(problem), inputs, reference.outputs(), options);
  return compare_outputs(answer.view(), answer.lse, reference.view(), reference.lse);
}

void write_answer(const std::string& path, const Answer& answer) {
  const auto [batch, heads, tokens, dim] = answer.shape;
  const std::array tensors{
      NamedTensor{"o", answer.dtype, {batch, heads, tokens, dim}, answer.o},
      named_tensor<float>("lse", DType::f32, {batch, heads, tokens}, answer.lse),
  };
  write_safetensors(path, tensors);
}

void write_mask(const std::string& path, const Plan& plan) {
  const Problem& problem = plan.problem;
  const std::vector<std::uint8_t> mask = dense_mask(plan);
  const std::array tensors{named_tensor<std::uint8_t>(
      "mask", DType::u8, {problem.batch, problem.q_heads, problem.q_len, problem.kv_len}, mask)};
  write_safetensors(path, tensors);
}

void check_mask_size(const Problem& problem) {
  const double elements = static_cast<double>(problem.batch) * static_cast<double>(problem.q_heads) *
                          static_cast<double>(problem.q_len) * static_cast<double>(problem.kv_len);
  require(elements <= 0x1p31, "--mask-out: the mask would have {:.0f} elements; at most 2^31 are written", elements);
}

void run_attend(const Options& options) {
  const RunOptions run_options = run_options_of(options.run);
  const std::unique_ptr<const Method> method = make_method(options.method);
  const bool has_plan = method->info().has_plan;
  for (const auto& [flag, value] : {std::pair{"--plan-out", &options.plan_out}, {"--mask-out", &options.mask_out}}) {
    require(has_plan || value->empty(), "{}: method '{}' is a recurrence and has no plan", flag, method->info().name);
  }
  const InputFile file(options.qkv);
  const AttentionInputs& inputs = file.inputs();
  Problem problem = problem_of(inputs.q, inputs.k, inputs.v, options.causal);
  problem.scale = options.scale;
  problem.q_offset = options.q_offset;
  problem.grid = grid_of(options.grid);
  problem.validate();
  check_inputs(problem, inputs);
  if (!options.mask_out.empty()) check_mask_size(problem);

  PlanContext context;
  context.run = run_options;
  const std::unique_ptr<MethodState> state = method->new_state();
  context.state = state.get();
  Answer answer(problem, inputs.q.dtype);
  Plan plan;
  const RunReport report = method->attend(problem, inputs, answer.outputs(), context, &plan);
  const PlanStatistics stats = has_plan ? statistics(plan) : PlanStatistics{};

  nlohmann::ordered_json json{{"method", method->info().name},
                              {"density", stats.density},
                              {"plan_ms", report.plan_ms},
                              {"kernel_ms", report.kernel_ms}};
  if (options.compare) {
    const OutputError error = compare_with_dense(problem, inputs, answer, run_options.threads);
    json["error"] = {{"rel_l2", error.rel_l2}, {"max_abs", error.max_abs}};
    if (has_plan) json["error"]["softmax_mass"] = error.softmax_mass;  // a recurrence has no softmax
  }
  if (!options.mask_out.empty()) write_mask(options.mask_out, plan);
  if (!options.plan_out.empty()) save(plan, options.plan_out);
  if (!options.out.empty()) write_answer(options.out, answer);

  if (options.json) {
    print_json(json);
    return;
  }
  fmt::print("{} {}: {} kernel, {}, {} threads; plan {:.3f} ms, kernel {:.3f} ms\n{}", method->info().name,
             method->parameters(), name_of(report.kernel), name_of(report.isa), report.threads, report.plan_ms,
             report.kernel_ms, has_plan ? explain(plan) : "recurrence, no plan\n");
  if (options.compare) {
    fmt::print("against dense float64: relative L2 {:.4g}, largest {:.4g}", json["error"]["rel_l2"].get<double>(),
               json["error"]["max_abs"].get<double>());
    if (has_plan) fmt::print(", softmax mass {:.4f}", json["error"]["softmax_mass"].get<double>());
    fmt::print("\n");
  }
}

}  // namespace

void add_attend(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, "attend", "One attention call on tensors q, k, v of a safetensors file",
                                  "tessera attend --qkv qkv.safetensors --method window:size=256 --causal --compare "
                                  "--out o.safetensors");
  command
      ->add_option("--qkv", options->qkv,
                   "Safetensors file with q [B,Hq,Nq,D], k [B,Hkv,Nk,D], v [B,Hkv,Nk,Dv] in f32, bf16 or f16; further "
                   "tensors of these types are side inputs of the method")
      ->required();
  command->add_option("--method", options->method, "SPEC: name, name:key=value,... or a JSON file")
      ->capture_default_str();
  command->add_flag("--causal", options->causal, "A query sees keys up to its own position");
  command->add_option("--scale", options->scale, "Factor of the scores (default: 1/sqrt(D))");
  command->add_option("--q-offset", options->q_offset, "Position of the first query (default: Nk - Nq)");
  command->add_option("--out", options->out, "Write o [B,Hq,Nq,Dv] and lse [B,Hq,Nq] (natural log)");
  command->add_option("--plan-out", options->plan_out, "Write the plan that was run");
  command->add_option("--mask-out", options->mask_out, "Write the pairs that were computed: mask u8 [B,Hq,Nq,Nk]");
  command->add_flag("--compare", options->compare, "Report the error against dense attention in float64");
  add_grid_options(*command, options->grid);
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([options] { run_attend(*options); });
}

}  // namespace tessera::cli
