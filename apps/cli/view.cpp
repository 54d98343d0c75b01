// `tessera view`: what heads attend to and what methods compute of it, as a page to look around in.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "eval/comparison.h"
#include "io/atomic_file.h"
#include "methods/layer_list.h"
#include "support/input_file.h"
#include "support/progress.h"
#include "support/prompt.h"
#include "support/run_options.h"
#include "tessera/model.h"
#include "tune/capture.h"
#include "view/attention_view.h"
#include "view/report_page.h"

namespace tessera::cli {

namespace {

using OrderedJson = nlohmann::ordered_json;

/// Heads on a page when none are named: more make it slow to write and large.
constexpr std::int64_t kMostHeads = 16;

struct Options {
  std::string model;
  std::string prompt;
  std::string qkv;
  std::string methods = "streaming,xattention";
  std::string html;
  std::string layers;
  std::string heads;
  std::int64_t length = 0;
  std::int64_t cells = 512;
  bool causal = false;
  GridFlags grid;
  LoadFlags load;
  RunFlags run;
  bool json = false;
};

/// The heads to draw, by place of the layer among those there are.
class HeadChoice {
 public:
  HeadChoice(const Options& options, const std::vector<std::int64_t>& layers, std::int64_t heads)
      : chosen_(layers.size()) {
    std::vector<std::int64_t> wanted_layers = layers;
    if (!options.layers.empty()) wanted_layers = read_layer_list("--layers", options.layers);
    std::vector<std::int64_t> wanted_heads(static_cast<std::size_t>(heads));
    std::iota(wanted_heads.begin(), wanted_heads.end(), 0);
    if (!options.heads.empty()) wanted_heads = read_layer_list("--heads", options.heads);
    require(wanted_heads.back() < heads, "--heads={}: there are heads 0-{}", options.heads, heads - 1);
    std::vector<std::pair<std::size_t, std::int64_t>> all;
    for (const std::int64_t layer : wanted_layers) {
      const auto found = std::find(layers.begin(), layers.end(), layer);
      require(found != layers.end(), "--layers={}: layer {} is not there; expected {} to {}", options.layers, layer,
              layers.front(), layers.back());
      for (const std::int64_t head : wanted_heads)
        all.emplace_back(static_cast<std::size_t>(found - layers.begin()), head);
    }
    // Named ones are all drawn; else a few, spread over the layers and over the heads of a layer.
    const auto count = std::ssize(all);
    const bool named = !options.layers.empty() || !options.heads.empty();
    const std::int64_t drawn = named ? count : std::min(count, kMostHeads);
    for (std::int64_t i = 0; i < drawn; ++i) {
      const auto& [place, head] = all[static_cast<std::size_t>(drawn == 1 ? 0 : i * (count - 1) / (drawn - 1))];
      chosen_[place].push_back(head);
    }
  }

  const std::vector<std::int64_t>& of(std::size_t place) const { return chosen_[place]; }
  /// Layers behind the last one with a head do not matter.
  bool needed(std::size_t place) const {
    return std::any_of(chosen_.begin() + static_cast<std::ptrdiff_t>(place), chosen_.end(),
                       [](const auto& heads) { return !heads.empty(); });
  }

 private:
  std::vector<std::vector<std::int64_t>> chosen_;
};

AttentionViewOptions view_options(const Options& options, std::int64_t layers, bool follows_layers) {
  AttentionViewOptions result;
  result.most_cells = options.cells;
  result.layers = layers;
  result.follows_layers = follows_layers;
  result.run = run_options_of(options.run);
  result.cancelled = [] { return interrupted(); };
  return result;
}

/// Token by token; what has no bytes of its own is shown by its number.
std::vector<std::string> texts_of(const Model& model, std::span<const std::int32_t> tokens) {
  std::vector<std::string> texts;
  for (const std::int32_t token : tokens) {
    texts.push_back(model.decode(std::span(&token, 1)));
    if (texts.back().empty()) texts.back() = fmt::format("<{}>", token);
  }
  return texts;
}

OrderedJson view_model(const Options& options, const std::vector<std::string>& specs, ProgressLine& progress) {
  const Model model = Model::load(options.model, load_options_of(options.load, options.run.threads));
  const ModelConfig& config = model.config();
  std::vector<std::int32_t> tokens = model.encode(read_prompt(options.prompt));
  if (options.length > 0 && std::ssize(tokens) > options.length)
    tokens.resize(static_cast<std::size_t>(options.length));
  require(!tokens.empty(), "--prompt {}: the prompt is empty and the model has no token to start with", options.prompt);
  std::vector<std::int64_t> layers(static_cast<std::size_t>(config.layers));
  std::iota(layers.begin(), layers.end(), 0);
  const HeadChoice choice(options, layers, config.q_heads);
  for (const std::string& spec : specs) make_method(spec)->check_model(config.layers, config.q_heads, config.kv_heads);
  AttentionView view(specs, view_options(options, config.layers, true));
  view.set_tokens(texts_of(model, tokens));
  tune::TuningTask task;
  task.model = &model;
  task.run = run_options_of(options.run);
  task.cancelled = [] { return interrupted(); };
  task.on_progress = [&](std::string_view, double done, double total) { progress.show_share("layers", done / total); };
  tune::for_each_layer(task, tokens, "view", [&](std::int64_t layer, const tune::LayerTensors& tensors) {
    const auto place = static_cast<std::size_t>(layer);
    if (choice.needed(place)) view.add(layer, tensors.problem, tensors.inputs(), choice.of(place));
  });
  OrderedJson report = view.report();
  report["source"] = fmt::format("{}, {}", options.model, options.prompt);
  report["calls"] = "layer";
  return report;
}

/// The entry of a batch as a call of its own.
AttentionInputs call_of(const AttentionInputs& inputs, std::int64_t sequence) {
  const std::int64_t batch = inputs.q.batch();
  const auto slice = [&](TensorView view) {
    if (view.batch() != batch) return view;
    view.data = view.row(sequence, 0, 0);
    view.shape[0] = 1;
    return view;
  };
  AttentionInputs call = inputs;
  call.q = slice(inputs.q);
  call.k = slice(inputs.k);
  call.v = slice(inputs.v);
  for (SideTensor& side : call.side) side.view = slice(side.view);
  return call;
}

OrderedJson view_file(const Options& options, const std::vector<std::string>& specs, ProgressLine& progress) {
  const InputFile file(options.qkv);
  const AttentionInputs& inputs = file.inputs();
  problem_of(inputs.q, inputs.k, inputs.v, options.causal);  // the shapes fit
  // `tessera run --dump-qkv` notes which layers lie along the batch axis.
  const auto& metadata = file.file().metadata();
  const auto noted = metadata.find("layers");
  std::vector<std::int64_t> layers(static_cast<std::size_t>(inputs.q.batch()));
  std::iota(layers.begin(), layers.end(), 0);
  if (noted != metadata.end()) {
    layers = read_layer_list("layers of " + options.qkv, noted->second);
    require(std::ssize(layers) == inputs.q.batch(), "{}: layers '{}' for a batch of {}", options.qkv, noted->second,
            inputs.q.batch());
  }
  const HeadChoice choice(options, layers, inputs.q.heads());
  AttentionView view(specs, view_options(options, layers.back() + 1, noted != metadata.end()));
  for (std::size_t i = 0; i < layers.size() && choice.needed(i); ++i) {
    const AttentionInputs call = call_of(inputs, static_cast<std::int64_t>(i));
    Problem problem = problem_of(call.q, call.k, call.v, options.causal);
    problem.grid = grid_of(options.grid);
    problem.validate();
    view.add(layers[i], problem, call, choice.of(i));
    progress.show_share("calls", static_cast<double>(i + 1) / static_cast<double>(layers.size()));
  }
  OrderedJson report = view.report();
  report["source"] = options.qkv;
  report["calls"] = noted == metadata.end() ? "sequence" : "layer";
  return report;
}

/// The numbers of each head, without what is drawn.
OrderedJson summary_of(const OrderedJson& report, const std::string& html, std::size_t bytes) {
  OrderedJson summary{{"kind", "view"},         {"source", report["source"]}, {"queries", report["queries"]},
                      {"keys", report["keys"]}, {"cell", report["cell"]},     {"html", html},
                      {"html_bytes", bytes}};
  summary["heads"] = OrderedJson::array();
  for (const OrderedJson& head : report["heads"]) {
    for (std::size_t m = 0; m < head["methods"].size(); ++m) {
      const OrderedJson& method = head["methods"][m];
      summary["heads"].push_back({{"layer", head["layer"]},
                                  {"head", head["head"]},
                                  {"method", report["methods"][m]["spec"]},
                                  {"density", method["density"]},
                                  {"mass", method["mass"]},
                                  {"least_mass", method["least_mass"]},
                                  {"rel_l2", method["rel_l2"]}});
    }
  }
  return summary;
}

void print_summary(const OrderedJson& summary) {
  fmt::print("{:>6}{:>6}  {:<40}{:>9}{:>9}{:>12}{:>9}\n", "layer", "head", "method", "density", "mass", "least tile",
             "rel L2");
  for (const OrderedJson& row : summary["heads"]) {
    fmt::print("{:>6}{:>6}  {:<40}{:>9.4f}{:>9.4f}{:>12.4f}{:>9.4f}\n", row["layer"].get<std::int64_t>(),
               row["head"].get<std::int64_t>(), row["method"].get<std::string>(), row["density"].get<double>(),
               row["mass"].get<double>(), row["least_mass"].get<double>(), row["rel_l2"].get<double>());
  }
  fmt::print("{}: {:.1f} MB, cells of {} tokens\n", summary["html"].get<std::string>(),
             summary["html_bytes"].get<double>() / 1e6, summary["cell"].get<std::int64_t>());
}

void run_view(const Options& options, const std::string& command) {
  const bool from_model = !options.model.empty();
  require(from_model != !options.qkv.empty(), "expected either --model with --prompt, or --qkv");
  require(from_model == !options.prompt.empty(), "--prompt is the text that --model reads: give both or none");
  require(!from_model || !options.causal, "--causal belongs to --qkv; a model is causal");
  require(!from_model || options.grid.grid.empty(), "--grid belongs to --qkv; a model reads a plain sequence");
  require(options.length >= 0, "--length is {}; expected 0 (all) or more", options.length);
  require(options.cells >= 16 && options.cells <= 4096, "--cells is {}; expected 16 to 4096", options.cells);
  const std::vector<std::string> specs = eval::split_specs(options.methods);
  for (const std::string& spec : specs) make_method(spec);  // a mistake is found before the work starts
  AtomicFile file(options.html);
  watch_interrupt();
  ProgressLine progress;
  OrderedJson report = from_model ? view_model(options, specs, progress) : view_file(options, specs, progress);
  progress.finish();
  report["command"] = command;
  const std::string page = report_page(report);
  file.write(page);
  file.commit();
  const OrderedJson summary = summary_of(report, options.html, page.size());
  if (options.json) {
    print_json(summary);
  } else {
    print_summary(summary);
  }
}

}  // namespace

void add_view(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      add_command(app, "view", "Attention maps of heads with the plans of methods over them, as a page",
                  "tessera view --model models/tessera-bytes --prompt README.md --methods streaming,xattention "
                  "--html view.html");
  command->add_option("--model", options->model, "Folder with config.json, *.safetensors and tokenizer.json");
  command->add_option("--prompt,--prompt-file", options->prompt, "File with the text, or - for standard input");
  command->add_option("--length", options->length, "Tokens of the text at most (default: all)");
  command->add_option("--qkv", options->qkv,
                      "Tensors q, k, v instead of a model, as run --dump-qkv writes them: safetensors");
  command->add_flag("--causal", options->causal, "Queries of --qkv see no later keys");
  add_grid_options(*command, options->grid);
  command
      ->add_option("--methods", options->methods, "Method SPECs, separated by commas; the page compares two at a time")
      ->capture_default_str();
  command->add_option("--layers", options->layers, "Layers, as 0-2+14 (default: 16 heads spread over all)");
  command->add_option("--heads", options->heads, "Query heads of each layer, likewise");
  command->add_option("--cells", options->cells, "Cells a side at the finest level; each holds a power of 2 of tokens")
      ->capture_default_str();
  command->add_option("--html", options->html, "Page to write")->required();
  add_load_options(*command, options->load);
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([options, command] { run_view(*options, command_text(*command)); });
}

}  // namespace tessera::cli
