// `tessera price`: what answers of a model cost in operations and reads, as Kinetics counts test-time compute.
#include <fmt/format.h>

#include <cmath>
#include <filesystem>
#include <memory>
#include <string>

#include "command.h"
#include "core/error.h"
#include "core/parallel.h"
#include "eval/cost_model.h"
#include "io/json.h"
#include "kernels/peak.h"
#include "model/config.h"
#include "support/number_list.h"
#include "support/run_options.h"

namespace tessera::cli {

namespace {

using OrderedJson = nlohmann::ordered_json;

struct Options {
  std::string model;
  std::string contexts = "4096,32768";
  std::string budgets = "1024";
  double generated = 1024;
  double trials = 1;
  double block = 16;
  double bytes_per_element = 2;
  double bytes_per_weight = 0;
  double gflops = 0;
  double gbps = 0;
  RunFlags run;
  bool json = false;
};

/// Only the shape is read, so that models without weights at hand can be priced.
ModelConfig config_of(const std::string& path) {
  if (!std::filesystem::is_directory(path) && std::filesystem::path(path).extension() != ".json")
    return Model::load(path, {.weights = WeightMemory::mapped}).config();
  const std::filesystem::path file =
      std::filesystem::is_directory(path) ? std::filesystem::path(path) / "config.json" : std::filesystem::path(path);
  return model::read_config(parse_json_file(file), file.string());
}

void check(const Options& options) {
  const auto positive = [](const char* name, double value) {
    require(std::isfinite(value) && value > 0, "{} is {}; expected a positive number", name, value);
  };
  positive("--generated", options.generated);
  positive("--trials", options.trials);
  positive("--block", options.block);
  positive("--bytes-per-element", options.bytes_per_element);
  for (const auto& [name, value] : {std::pair{"--bytes-per-weight", options.bytes_per_weight},
                                    std::pair{"--gflops", options.gflops}, std::pair{"--gbps", options.gbps}}) {
    require(std::isfinite(value) && value >= 0, "{} is {}; expected 0 or a positive number", name, value);
  }
}

eval::MachineRates rates_of(const Options& options) {
  const RunOptions run = run_options_of(options.run);
  const int threads = thread_count(run.threads);
  const Isa isa = run.isa.value_or(default_isa());
  const DType compute = options.bytes_per_element > 2 ? DType::f32 : DType::bf16;
  return {options.gflops > 0 ? options.gflops : kernels::measure_peak_gflops(isa, compute, threads),
          options.gbps > 0 ? options.gbps : kernels::measure_read_bandwidth(threads)};
}

OrderedJson priced(const std::string& reading, double context, double tokens, const eval::Cost& cost,
                   const eval::Cost& dense, const eval::MachineRates& rates) {
  return {{"context", context},
          {"reads", reading},
          {"tokens_read", tokens},
          {"gflop", cost.flops / 1e9},
          {"gb", cost.bytes / 1e9},
          {"effective_gflop", cost.effective_flops(rates) / 1e9},
          {"ms", cost.milliseconds(rates)},
          {"to_dense", cost.effective_flops(rates) / dense.effective_flops(rates)}};
}

OrderedJson prices(const Options& options, const ModelConfig& config, const eval::MachineRates& rates) {
  OrderedJson rows = OrderedJson::array();
  const double weights = eval::weights_per_token(config) + eval::head_weights(config);
  for (const double context : number_list("--contexts", options.contexts, 0, 1e9)) {
    const eval::Decoding run{.context = context,
                             .generated = options.generated,
                             .trials = options.trials,
                             .bytes_per_element = options.bytes_per_element,
                             .weight_bytes = options.bytes_per_weight * weights};
    const eval::Cost dense = eval::decode_cost(config, run);
    rows.push_back(priced("every token", context, eval::dense_tokens(run), dense, dense, rates));
    for (const double budget : number_list("--budgets", options.budgets, 0, 1e9)) {
      const double tokens = eval::top_k_tokens(run, budget);
      rows.push_back(priced(fmt::format("best {} tokens", budget), context, tokens,
                            eval::decode_cost_selected(config, run, tokens), dense, rates));
      rows.push_back(priced(fmt::format("best {} by blocks of {}", budget, options.block), context, tokens,
                            eval::decode_cost_selected(config, run, tokens, options.block), dense, rates));
    }
  }
  return rows;
}

void run_price(const Options& options) {
  check(options);
  const ModelConfig config = config_of(options.model);
  const eval::MachineRates rates = rates_of(options);
  OrderedJson document{{"model", options.model},   {"generated", options.generated},
                       {"trials", options.trials}, {"peak_gflops", rates.gflops},
                       {"peak_gbps", rates.gbps},  {"results", prices(options, config, rates)}};
  if (options.json) {
    print_json(document);
    return;
  }
  fmt::print("{} answers of {} tokens at {:.0f} GFLOP/s and {:.1f} GB/s; a byte costs as much as {:.1f} operations\n\n",
             options.trials, options.generated, rates.gflops, rates.gbps, rates.intensity());
  fmt::print("{:>10}  {:<28}{:>12}{:>12}{:>14}{:>14}{:>10}\n", "context", "each step reads", "GFLOP", "GB",
             "with reads", "ms", "to dense");
  for (const OrderedJson& row : document["results"]) {
    fmt::print("{:>10.0f}  {:<28}{:>12.1f}{:>12.2f}{:>14.1f}{:>14.1f}{:>10.3f}\n", row["context"].get<double>(),
               row["reads"].get<std::string>(), row["gflop"].get<double>(), row["gb"].get<double>(),
               row["effective_gflop"].get<double>(), row["ms"].get<double>(), row["to_dense"].get<double>());
  }
}

}  // namespace

void add_price(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      add_command(app, "price", "What answers of a model cost by arithmetic: operations, reads, time (Kinetics)",
                  "tessera price --model DIR --contexts 8192,131072 --generated 4096 --trials 8 --budgets 512,2048");
  command->add_option("--model", options->model, "Folder with config.json, that file, or a *.gguf file")->required();
  command->add_option("--contexts", options->contexts, "Tokens of the prompt that the answers share")
      ->capture_default_str();
  command->add_option("--generated", options->generated, "Tokens of each answer")->capture_default_str();
  command->add_option("--trials", options->trials, "Answers to the same prompt")->capture_default_str();
  command->add_option("--budgets", options->budgets, "Tokens that a step reads at most")->capture_default_str();
  command->add_option("--block", options->block, "Tokens per representative of a search for blocks")
      ->capture_default_str();
  command->add_option("--bytes-per-element", options->bytes_per_element, "Of the cache")->capture_default_str();
  command->add_option("--bytes-per-weight", options->bytes_per_weight, "0: many answers share the reading of weights")
      ->capture_default_str();
  command->add_option("--gflops", options->gflops, "Of the machine; 0: measured here")->capture_default_str();
  command->add_option("--gbps", options->gbps, "Reads of the machine; 0: measured here")->capture_default_str();
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([options] { run_price(*options); });
}

}  // namespace tessera::cli
