// `tessera eval`: a model's answers to generated tasks with different methods, and its perplexity on a text.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "core/parallel.h"
#include "eval/comparison.h"
#include "eval/model_evaluation.h"
#include "io/atomic_file.h"
#include "io/file_bytes.h"
#include "kernels/peak.h"
#include "support/csv.h"
#include "support/number_list.h"
#include "support/progress.h"
#include "support/result_log.h"
#include "support/run_options.h"
#include "tessera/method.h"
#include "view/report_page.h"

namespace tessera::cli {

namespace {

using eval::EvaluationPhase;
using eval::EvaluationPoint;
using eval::EvaluationResult;
using eval::EvaluationSummary;
using OrderedJson = nlohmann::ordered_json;

/// Of the cache; 8-bit codes without the steps beside them.
double bytes_per_number(CacheType type) {
  if (type == CacheType::i8) return 1;
  return type == CacheType::f32 ? 4 : 2;
}

constexpr std::string_view kPerplexity = "perplexity";

struct Options {
  std::string model;
  std::string tasks = "passkey,niah-single-2,vt,mqar,copy";
  std::string lengths = "2048";
  std::string methods = "dense,streaming,xattention";
  std::string phase = "prefill";
  std::int64_t samples = 10;
  std::int64_t seed = 0;
  bool question_first = false;
  std::string text;
  std::string state;
  std::string csv;
  std::string html;
  std::string kv_dtype = "f32";
  LoadFlags load;
  RunFlags run;
  bool json = false;
};

OrderedJson to_json(const eval::Estimate& estimate) {
  return {{"mean", estimate.mean}, {"low", estimate.low}, {"high", estimate.high}};
}

OrderedJson to_json(const EvaluationSummary& summary, const std::optional<eval::PredictedTimes>& predicted) {
  const auto optional = [](const auto& value, const auto& convert) { return value ? convert(*value) : OrderedJson(); };
  return {{"task", summary.task},
          {"len", summary.length},
          {"method", summary.method},
          {"samples", summary.samples},
          {"score", to_json(summary.score)},
          {"difference", optional(summary.difference, [](const eval::Estimate& x) { return to_json(x); })},
          {"gold_bits", optional(summary.gold_bits, [](double x) { return OrderedJson(x); })},
          {"density", summary.density},
          {"decode_density", summary.decode_density},
          {"prefill_ms", summary.prefill_ms},
          {"decode_ms", summary.decode_ms},
          {"cache_mb", summary.cache_mb},
          {"prompt_tokens", summary.prompt_tokens},
          {"decode_tokens", summary.decode_tokens},
          {"kept_tokens", summary.kept_tokens},
          {"predicted_prefill_ms", predicted ? OrderedJson(predicted->prefill_ms) : OrderedJson()},
          {"predicted_decode_ms", predicted ? OrderedJson(predicted->decode_ms) : OrderedJson()}};
}

/// The tasks, "perplexity" among them where asked for.
std::vector<std::string> tasks_of(const Options& options) {
  std::vector<std::string> names = eval::split_specs(options.tasks);
  for (const std::string& name : names) {
    if (name != kPerplexity) eval::find_task(name);
  }
  const bool perplexity = std::find(names.begin(), names.end(), kPerplexity) != names.end();
  require(perplexity == !options.text.empty(), "--text names the text of the task perplexity: give both or none");
  return names;
}

/// What a log of results belongs to: another model, text or way of asking must not be mixed in.
OrderedJson identity_of(const Options& options) {
  return {{"model", options.model}, {"phase", options.phase},
          {"seed", options.seed},   {"question_first", options.question_first},
          {"text", options.text},   {"kv_dtype", options.kv_dtype}};
}

class Evaluation {
 public:
  explicit Evaluation(const Options& options)
      : options_(options),
        tasks_(tasks_of(options)),
        lengths_(number_list("--lengths", options.lengths, 0, 1 << 24)),
        specs_(eval::split_specs(options.methods)),
        phase_(eval::phase_from_name(options.phase)),
        log_(options.state, identity_of(options)),
        isa_(run_options_of(options.run).isa.value_or(default_isa())) {
    for (const std::string& spec : specs_) session_options(spec);  // a mistake is found before the work starts
  }

  void run() {
    const Model model = Model::load(options_.model, load_options_of(options_.load, options_.run.threads));
    config_ = model.config();
    costs_.bytes_per_element = bytes_per_number(kv_dtype_of(options_.kv_dtype));
    costs_.weight_bytes = model.decoded_weight_bytes();
    const int threads = thread_count(options_.run.threads);
    costs_.rates = {kernels::measure_peak_gflops(isa_, DType::f32, threads), kernels::measure_read_bandwidth(threads)};
    if (!options_.text.empty()) text_.emplace(options_.text);
    const double total =
        static_cast<double>(tasks_.size() * lengths_.size() * specs_.size()) * static_cast<double>(options_.samples);
    double done = 0;
    for (const std::string& task : tasks_) {
      for (const double length : lengths_) {
        for (std::int64_t sample = 0; sample < options_.samples; ++sample) {
          for (const std::string& spec : specs_) {
            const EvaluationPoint point{task, static_cast<std::int64_t>(length), spec, sample};
            progress_.show_share(fmt::format("{} {}", task, length).c_str(), done / total);
            if (interrupted()) return;
            measure(model, point);
            ++done;
          }
        }
      }
    }
  }

  OrderedJson report(const std::string& command) {
    progress_.finish();
    OrderedJson document{{"kind", "eval"},
                         {"command", command},
                         {"model", options_.model},
                         {"phase", options_.phase},
                         {"complete", !interrupted()}};
    document["isa"] = name_of(isa_);
    document["threads"] = thread_count(options_.run.threads);
    document["peak_gflops"] = costs_.rates.gflops;
    document["peak_gbps"] = costs_.rates.gbps;
    document["results"] = OrderedJson::array();
    for (const EvaluationSummary& summary : eval::summarise(results_)) {
      document["results"].push_back(to_json(summary, eval::predicted_times(summary, config_, costs_, phase_)));
    }
    return document;
  }

 private:
  SessionOptions session_options(const std::string& spec) const {
    SessionOptions options = eval::session_options_of(spec, phase_);
    options.kv_dtype = kv_dtype_of(options_.kv_dtype);
    options.run = run_options_of(options_.run);
    options.count_decoding = phase_ != EvaluationPhase::prefill;
    options.cancelled = [] { return interrupted(); };
    return options;
  }

  void measure(const Model& model, const EvaluationPoint& point) {
    if (const std::optional<EvaluationResult> known = log_.find(point)) {
      results_.push_back(*known);
      return;
    }
    SessionOptions options = session_options(point.method);
    options.capacity = point.length + 1;
    Session session(model, options);
    EvaluationResult result;
    try {
      result = point.task == kPerplexity ? measure_text(session, point) : ask(session, model, point);
    } catch (const Cancelled&) {
      return;
    }
    result.point = point;
    log_.add(result);
    results_.push_back(std::move(result));
  }

  EvaluationResult measure_text(Session& session, const EvaluationPoint& point) const {
    const std::span<const std::byte> bytes = text_->bytes();
    return eval::measure_perplexity(session, {reinterpret_cast<const char*>(bytes.data()), bytes.size()}, point.length,
                                    eval::decoded_tokens(phase_, point.length), point.sample);
  }

  EvaluationResult ask(Session& session, const Model& model, const EvaluationPoint& point) const {
    const eval::TaskInfo& task = eval::find_task(point.task);
    eval::SampleOptions sample;
    sample.length = point.length;
    sample.seed = static_cast<std::uint64_t>(options_.seed + point.sample);
    sample.question_first = options_.question_first;
    sample.count_tokens = [&](std::string_view text) { return static_cast<std::int64_t>(model.encode(text).size()); };
    return eval::ask(session, task, eval::make_sample(task, sample));
  }

  const Options& options_;
  std::vector<std::string> tasks_;
  std::vector<double> lengths_;
  std::vector<std::string> specs_;
  EvaluationPhase phase_;
  ResultLog log_;
  Isa isa_;
  ModelConfig config_;
  eval::EvaluationCosts costs_;  ///< rates of float32 products
  std::optional<FileBytes> text_;
  std::vector<EvaluationResult> results_;
  ProgressLine progress_;
};

void print_table(const OrderedJson& report) {
  fmt::print("{:<18}{:>8} {:<36}{:>9}{:>18}{:>20}{:>9}{:>12}\n", "task", "tokens", "method", "score", "95 %",
             "to dense, 95 %", "density", "prefill");
  for (const OrderedJson& row : report["results"]) {
    const auto interval = [](const OrderedJson& x) {
      return fmt::format("{:.3f} to {:.3f}", x["low"].get<double>(), x["high"].get<double>());
    };
    fmt::print("{:<18}{:>8} {:<36}{:>9.3f}{:>18}{:>20}{:>9.3f}{:>9.0f} ms\n", row["task"].get<std::string>(),
               row["len"].get<std::int64_t>(), row["method"].get<std::string>(), row["score"]["mean"].get<double>(),
               interval(row["score"]), row["difference"].is_null() ? "" : interval(row["difference"]),
               row["density"].get<double>(), row["prefill_ms"].get<double>());
  }
}

void run_eval(const Options& options, const std::string& command) {
  require(options.samples > 0 && options.samples <= 100'000, "--samples is {}; expected 1 to 100000", options.samples);
  require(options.seed >= 0, "--seed is {}; expected 0 or more", options.seed);
  Evaluation evaluation(options);
  // Made before the work: a place that cannot be written is found out at once.
  std::optional<AtomicFile> csv;
  std::optional<AtomicFile> html;
  if (!options.csv.empty()) csv.emplace(options.csv);
  if (!options.html.empty()) html.emplace(options.html);
  watch_interrupt();
  evaluation.run();
  const OrderedJson report = evaluation.report(command);
  if (interrupted()) {
    fmt::print(stderr, "interrupted: the report holds what was measured so far{}\n",
               options.state.empty() ? "" : fmt::format("; the same command goes on with {}", options.state));
  }
  if (csv) {
    csv->write(csv_of(report["results"]));
    csv->commit();
  }
  if (html) {
    html->write(report_page(report));
    html->commit();
  }
  if (options.json) {
    print_json(report);
  } else {
    print_table(report);
  }
}

}  // namespace

void add_eval(CLI::App& app) {
  auto options = std::make_shared<Options>();
  std::vector<std::string> names;
  for (const eval::TaskInfo& task : eval::tasks()) names.push_back(task.name);
  CLI::App* command =
      add_command(app, "eval", "A model's answers to generated tasks, with methods side by side",
                  "tessera eval --model models/tessera-bytes --tasks passkey,copy --lengths 1024,4096 "
                  "--methods dense,streaming,xattention --samples 20 --state eval.jsonl --html eval.html");
  command->add_option("--model", options->model, "Folder with config.json, *.safetensors and tokenizer.json")
      ->required();
  command->add_option("--tasks", options->tasks, fmt::format("Tasks: {}, perplexity", fmt::join(names, ", ")))
      ->capture_default_str();
  command->add_option("--lengths", options->lengths, "Tokens of question and answer together")->capture_default_str();
  command->add_option("--methods", options->methods, "Method SPECs, separated by commas")->capture_default_str();
  command->add_option("--phase", options->phase, "Where they replace dense attention: prefill, decode or both")
      ->capture_default_str();
  command->add_option("--samples", options->samples, "Samples per task and length")->capture_default_str();
  command->add_option("--seed", options->seed, "Seed of the first sample; the next ones follow")->capture_default_str();
  command->add_flag("--question-first", options->question_first, "The question stands before the text too");
  command->add_option(
      "--text", options->text,
      "Text of the task perplexity: bits per byte of stretches of it, with a decoding phase of their ends");
  command->add_option("--state", options->state,
                      "File that keeps every result as it comes; a run that was ended goes on from it");
  command->add_option("--kv-dtype", options->kv_dtype, "f32, bf16, f16 or i8")->capture_default_str();
  command->add_option("--csv", options->csv, "Write the results as comma-separated values");
  command->add_option("--html", options->html, "Write a page with curves, Pareto fronts and a table");
  add_load_options(*command, options->load);
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([options, command] { run_eval(*options, command_text(*command)); });
}

}  // namespace tessera::cli
