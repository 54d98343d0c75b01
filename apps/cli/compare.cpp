// `tessera compare`: methods side by side on the same attention calls, at their own settings and at equal density.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "core/parallel.h"
#include "eval/comparison.h"
#include "io/atomic_file.h"
#include "kernels/peak.h"
#include "support/csv.h"
#include "support/input_file.h"
#include "support/number_list.h"
#include "support/progress.h"
#include "support/run_options.h"
#include "tessera/eval.h"
#include "view/report_page.h"

namespace tessera::cli {

namespace {

using eval::Comparison;
using eval::MethodMeasurement;
using OrderedJson = nlohmann::ordered_json;

struct Options {
  std::string methods = "streaming,xattention,flexprefill,oracle-topk,oracle-topk:unit=token";
  std::string lengths = "8192";
  std::string data = "heads-llm";
  std::string densities = "0.5,0.2,0.1,0.05";
  std::string errors = "0.05,0.1,0.2";
  std::string qkv;
  bool causal = false;
  std::int64_t heads = 8;
  std::int64_t kv_heads = 2;
  std::int64_t dim = 128;
  std::string dtype = "bf16";
  std::int64_t seeds = 1;
  int repeats = 3;
  bool cpu_time = false;
  std::int64_t query_blocks = 8;
  std::string csv;
  std::string html;
  RunFlags run;
  bool json = false;
};

/// What the measurements of one attention call are called in the report.
struct CaseName {
  std::string data;
  std::int64_t tokens = 0;
  std::int64_t seed = 0;
};

OrderedJson to_json(const OutputError& error) {
  return {{"rel_l1", error.rel_l1},
          {"rel_l2", error.rel_l2},
          {"nmse", error.nmse},
          {"cosine", error.cosine},
          {"row_cosine_mean", error.row_cosine_mean},
          {"row_cosine_p1", error.row_cosine_p1},
          {"max_abs", error.max_abs},
          {"max_rel", error.max_rel},
          {"psnr", error.psnr},
          {"softmax_mass", error.softmax_mass},
          {"softmax_mass_p5", error.softmax_mass_p5},
          {"value_gap_mean", error.value_gap_mean},
          {"value_gap_p95", error.value_gap_p95}};
}

OrderedJson to_json(const eval::SelectionQuality& quality) {
  return {{"mass", quality.mass},
          {"mass_p5", quality.mass_p5},
          {"sink_free_mass", quality.sink_free_mass},
          {"value_weighted_mass", quality.value_weighted_mass},
          {"chance_corrected", quality.chance_corrected()},
          {"tile_recall", quality.tile_recall},
          {"mass_efficiency", quality.mass_efficiency},
          {"oracle_tile_mass", quality.oracle_tile_mass},
          {"oracle_token_mass", quality.oracle_token_mass},
          {"random_mass", quality.random_mass},
          {"budget_loss", quality.budget_loss()},
          {"granularity_loss", quality.granularity_loss()},
          {"estimator_loss", quality.estimator_loss()}};
}

/// The prediction of the neighbourhood simulator beside what was measured; null without one.
OrderedJson simulation_of(const MethodMeasurement& row) {
  if (!row.simulated_density) return {};
  return {{"executed_density", *row.simulated_density},
          {"speed_up", 1 / *row.simulated_density},
          {"deviation", *row.simulated_density / row.executed_density - 1}};
}

OrderedJson to_json(const CaseName& name, const std::string& base, const MethodMeasurement& row) {
  return {{"data", name.data},
          {"len", name.tokens},
          {"seed", name.seed},
          {"method", base},
          {"spec", row.spec},
          {"params", OrderedJson::parse(row.parameters)},
          {"target_density", row.target_density ? OrderedJson(*row.target_density) : OrderedJson()},
          {"density", row.density},
          {"executed_density", row.executed_density},
          {"flops", row.flops},
          {"dense_flops", row.dense_flops},
          {"kv_bytes", row.kv_bytes},
          {"plan_ms", row.plan_ms},
          {"kernel_ms", row.kernel_ms},
          {"dense_ms", row.dense_ms},
          {"predicted_ms", row.predicted_ms},
          {"kinetics_ms", row.kinetics_ms},
          {"simulated", simulation_of(row)},
          {"selection_share", row.selection_share()},
          {"speed_up", row.speed_up()},
          {"error", to_json(row.error)},
          {"quality", row.quality ? to_json(*row.quality) : OrderedJson()}};
}

/// Everything measured so far, as the report has it.
class Measurements {
 public:
  Measurements(const Options& options, std::vector<std::string> specs)
      : options_(options),
        specs_(std::move(specs)),
        densities_(number_list("--densities", options.densities, 0, 1)),
        errors_(number_list("--errors", options.errors, 0, 1e6)) {
    comparison_options_.repeats = options.repeats;
    comparison_options_.cpu_time = options.cpu_time;
    comparison_options_.quality.query_blocks = options.query_blocks;
    comparison_options_.quality.threads = options.run.threads;
    comparison_options_.run = run_options_of(options.run);
    comparison_options_.seed = 1;
  }

  /// Peaks of the machine in the dtype of the tensors, before the first case.
  void measure_machine(DType dtype) {
    const int threads = thread_count(options_.run.threads);
    const Isa isa = comparison_options_.run.isa.value_or(default_isa());
    const DType compute = isa == Isa::avx512_bf16 && dtype == DType::bf16 ? DType::bf16 : DType::f32;
    comparison_options_.rates = {kernels::measure_peak_gflops(isa, compute, threads),
                                 kernels::measure_read_bandwidth(threads)};
    machine_ = {{"isa", name_of(isa)},
                {"threads", threads},
                {"dtype", name_of(dtype)},
                {"peak_gflops", comparison_options_.rates.gflops},
                {"peak_gbps", comparison_options_.rates.gbps}};
  }

  void add_case(const CaseName& name, const Problem& problem, const AttentionInputs& inputs, double first_share,
                double share) {
    const Comparison comparison(problem, inputs, comparison_options_);
    for (std::size_t i = 0; i < specs_.size() && !interrupted(); ++i) {
      const double begin = first_share + share * static_cast<double>(i) / static_cast<double>(specs_.size());
      add_method(name, comparison, specs_[i], begin, share / static_cast<double>(specs_.size()));
    }
  }

  OrderedJson report(const std::string& command) const {
    OrderedJson document{{"kind", "compare"}, {"command", command}, {"complete", !interrupted()}};
    document.update(machine_);
    document["rows"] = rows_;
    document["at_error"] = at_error_;
    document["skipped"] = skipped_;
    return document;
  }
  const OrderedJson& rows() const { return rows_; }
  const OrderedJson& skipped() const { return skipped_; }
  ProgressLine& progress() { return progress_; }

 private:
  void add_method(const CaseName& name, const Comparison& comparison, const std::string& spec, double begin,
                  double share) {
    const std::string phase = fmt::format("{} {} {}", name.data, name.tokens, spec);
    const double steps = static_cast<double>(densities_.size()) + 1;
    std::vector<MethodMeasurement> curve;
    try {
      progress_.show_share(phase.c_str(), begin);
      curve.push_back(comparison.measure(spec));
      rows_.push_back(to_json(name, spec, curve.back()));
      for (std::size_t i = 0; i < densities_.size() && !interrupted(); ++i) {
        progress_.show_share(phase.c_str(), begin + share * static_cast<double>(i + 1) / steps);
        const std::optional<std::string> at = comparison.at_density(spec, densities_[i]);
        if (!at) continue;
        curve.push_back(comparison.measure(*at));
        curve.back().target_density = densities_[i];
        rows_.push_back(to_json(name, spec, curve.back()));
      }
    } catch (const Error& error) {
      skipped_.push_back({{"data", name.data}, {"len", name.tokens}, {"method", spec}, {"reason", error.what()}});
      return;
    }
    for (const double error : errors_) {
      if (const std::optional<eval::AtError> at = eval::at_error(curve, error)) {
        at_error_.push_back({{"data", name.data},
                             {"len", name.tokens},
                             {"seed", name.seed},
                             {"method", spec},
                             {"rel_l2", error},
                             {"density", at->density},
                             {"speed_up", at->speed_up}});
      }
    }
  }

  const Options& options_;
  std::vector<std::string> specs_;
  std::vector<double> densities_;
  std::vector<double> errors_;
  eval::ComparisonOptions comparison_options_;
  OrderedJson machine_;
  OrderedJson rows_ = OrderedJson::array();
  OrderedJson at_error_ = OrderedJson::array();
  OrderedJson skipped_ = OrderedJson::array();
  ProgressLine progress_;
};

void measure_generated(const Options& options, Measurements& measurements) {
  std::vector<std::string> kinds = eval::split_specs(options.data);
  const std::vector<std::string> known = head_kinds();
  for (const std::string& kind : kinds) {
    require(std::find(known.begin(), known.end(), kind) != known.end(), "--data: unknown kind '{}'; did you mean '{}'?",
            kind, nearest_name(kind, known));
  }
  const std::vector<double> lengths = number_list("--lengths", options.lengths, 0, 1 << 24);
  const double cases = static_cast<double>(kinds.size() * lengths.size()) * static_cast<double>(options.seeds);
  double done = 0;
  for (const std::string& kind : kinds) {
    for (const double length : lengths) {
      for (std::int64_t seed = 1; seed <= options.seeds && !interrupted(); ++seed, ++done) {
        HeadOptions heads;
        heads.kind = kind;
        heads.tokens = static_cast<std::int64_t>(length);
        heads.q_heads = options.heads;
        heads.kv_heads = options.kv_heads;
        heads.head_dim = options.dim;
        heads.dtype = dtype_from_name(options.dtype);
        heads.seed = static_cast<std::uint64_t>(seed);
        heads.threads = options.run.threads;
        const HeadData data = make_heads(heads);
        AttentionInputs inputs;
        inputs.q = data.q();
        inputs.k = data.k();
        inputs.v = data.v();
        measurements.add_case({kind, heads.tokens, seed}, data.problem, inputs, done / cases, 1 / cases);
      }
    }
  }
}

void print_table(const Measurements& measurements) {
  fmt::print("{:<18}{:>8} {:<40}{:>9}{:>9}{:>9}{:>9}{:>11}{:>10}\n", "data", "tokens", "method", "density", "rel L2",
             "mass", "recall", "selection", "speed-up");
  for (const OrderedJson& row : measurements.rows()) {
    const OrderedJson& quality = row["quality"];
    fmt::print("{:<18}{:>8} {:<40}{:>9.4f}{:>9.4f}{:>9.4f}{:>9}{:>10.1f}%{:>9.2f}x\n", row["data"].get<std::string>(),
               row["len"].get<std::int64_t>(), row["spec"].get<std::string>(), row["executed_density"].get<double>(),
               row["error"]["rel_l2"].get<double>(), row["error"]["softmax_mass"].get<double>(),
               quality.is_null() ? "" : fmt::format("{:.3f}", quality["tile_recall"].get<double>()),
               100 * row["selection_share"].get<double>(), row["speed_up"].get<double>());
  }
  for (const OrderedJson& skip : measurements.skipped()) {
    fmt::print("left out: {} on {}: {}\n", skip["method"].get<std::string>(), skip["data"].get<std::string>(),
               skip["reason"].get<std::string>());
  }
}

void run_compare(const Options& options, const std::string& command) {
  const std::vector<std::string> specs = eval::split_specs(options.methods);
  for (const std::string& spec : specs) make_method(spec);  // a mistake is found before the work starts
  require(options.repeats > 0 && options.repeats <= 1000, "--repeats is {}; expected 1 to 1000", options.repeats);
  require(options.seeds > 0 && options.seeds <= 1000, "--seeds is {}; expected 1 to 1000", options.seeds);
  require(options.query_blocks > 0, "--query-blocks is {}; expected 1 or more", options.query_blocks);
  require(is_attention_dtype(dtype_from_name(options.dtype)), "--dtype is {}; expected f32, bf16 or f16",
          options.dtype);
  // Made before the work: a place that cannot be written is found out at once.
  std::optional<AtomicFile> csv;
  std::optional<AtomicFile> html;
  if (!options.csv.empty()) csv.emplace(options.csv);
  if (!options.html.empty()) html.emplace(options.html);
  watch_interrupt();
  Measurements measurements(options, specs);
  if (options.qkv.empty()) {
    measurements.measure_machine(dtype_from_name(options.dtype));
    measure_generated(options, measurements);
  } else {
    const InputFile file(options.qkv);
    const AttentionInputs& inputs = file.inputs();
    const Problem problem = problem_of(inputs.q, inputs.k, inputs.v, options.causal);
    measurements.measure_machine(inputs.q.dtype);
    measurements.add_case({options.qkv, problem.kv_len, 0}, problem, inputs, 0, 1);
  }
  measurements.progress().finish();
  if (interrupted()) fmt::print(stderr, "interrupted: the report holds what was measured so far\n");
  const OrderedJson report = measurements.report(command);
  if (csv) {
    csv->write(csv_of(report["rows"]));
    csv->commit();
  }
  if (html) {
    html->write(report_page(report));
    html->commit();
  }
  if (options.json) {
    print_json(report);
  } else {
    print_table(measurements);
  }
}

}  // namespace

void add_compare(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, "compare", "Methods side by side on the same attention calls",
                                  "tessera compare --methods streaming,xattention,oracle-topk --lengths 8192,32768 "
                                  "--data vertical-slash,blocks --html compare.html");
  command->add_option("--methods", options->methods, "Method SPECs, separated by commas")->capture_default_str();
  command->add_option("--lengths", options->lengths, "Tokens of the generated calls")->capture_default_str();
  command->add_option("--data", options->data, fmt::format("Data: {}", fmt::join(head_kinds(), ", ")))
      ->capture_default_str();
  command
      ->add_option("--densities", options->densities,
                   "Shares of the pairs that budgets are searched for, besides each method's own setting")
      ->capture_default_str();
  command->add_option("--errors", options->errors, "Relative L2 errors at which density and speed-up are read off")
      ->capture_default_str();
  command->add_option("--qkv", options->qkv,
                      "Tensors q, k, v of a safetensors file instead of generated ones (tessera run --dump-qkv)");
  command->add_flag("--causal", options->causal, "With --qkv: queries see keys up to their own position");
  command->add_option("--heads", options->heads, "Query heads")->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads, "Key and value heads")->capture_default_str();
  command->add_option("--dim", options->dim, "Head dimension")->capture_default_str();
  command->add_option("--dtype", options->dtype, "f32, bf16 or f16")->capture_default_str();
  command->add_option("--seeds", options->seeds, "Draws of the data per case")->capture_default_str();
  command->add_option("--repeats", options->repeats, "Timings of each side, in turns")->capture_default_str();
  command->add_flag("--cpu-time", options->cpu_time,
                    "Count the time that threads compute, not the time that passes: for busy machines");
  command->add_option("--query-blocks", options->query_blocks, "Blocks of 64 queries that judge a selection")
      ->capture_default_str();
  command->add_option("--csv", options->csv, "Write the rows as a CSV file");
  command->add_option("--html", options->html, "Write a page with charts and a table");
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([options, command] { run_compare(*options, command_text(*command)); });
}

}  // namespace tessera::cli
