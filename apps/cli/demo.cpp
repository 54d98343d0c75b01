// `tessera demo`: a long document with a pass key in it, through a model, dense and sparse.
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "core/parallel.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "support/run_options.h"
#include "tessera/model.h"
#include "view/comparison_page.h"

namespace tessera::cli {

namespace {

constexpr std::string_view kKey = "48213";
constexpr std::int64_t kPicturedHeads = 5;

struct Options {
  std::string model = "models/tessera-bytes";
  std::string document = "examples/documents/hacker-jargon.txt";
  // Dense first: the others are compared with it.
  std::vector<std::string> methods = {"dense",      "streaming:n_init=128,n_local=2048", "window:left=2047",
                                      "xattention", "minference:v=500,sl=700",           "oracle-topk:k=16"};
  std::string html;
  double depth = 0.5;
  bool json = false;
  LoadFlags load;
  RunFlags run;
};

/// The document with the sentence in it and the question after it, in the words the embedded model was trained with
/// (its card says why the mark PK# is there).
struct Prompt {
  std::string text;
  std::size_t key_begin = 0;  ///< byte of the sentence
};

Prompt plant_key(const std::string& document, double depth) {
  const auto wanted = static_cast<std::size_t>(depth * static_cast<double>(document.size()));
  std::size_t place = document.find('\n', wanted);
  if (place == std::string::npos) place = document.size();
  Prompt prompt;
  prompt.key_begin = place;
  prompt.text = fmt::format(
      "{0}\nThe pass key is PK#{1}. Remember it. PK#{1} is the pass key.\n{2}\nWhat is the pass key? The pass key is "
      "PK#",
      document.substr(0, place), kKey, document.substr(place));
  return prompt;
}

/// One line on standard error that is rewritten on a terminal; elsewhere only its first state is written.
class ProgressLine {
 public:
  explicit ProgressLine(std::string label) : label_(std::move(label)) {
    if (!terminal_) fmt::print(stderr, "{} ...\n", label_);
  }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ~ProgressLine() {
    if (terminal_) std::fputs("\r\033[K", stderr);
  }
  void show(double share) {
    const int percent = static_cast<int>(100 * share);
    if (!terminal_ || percent == shown_) return;
    shown_ = percent;
    fmt::print(stderr, "\r{} {:3d} %", label_, percent);
    std::fflush(stderr);
  }

 private:
  std::string label_;
  bool terminal_ = isatty(STDERR_FILENO) == 1;
  int shown_ = -1;
};

/// A few heads, spread over the layers and over the heads of a layer.
std::vector<std::pair<std::int64_t, std::int64_t>> heads_to_picture(const ModelConfig& config) {
  const std::int64_t count = std::min(kPicturedHeads, config.layers * config.q_heads);
  std::vector<std::pair<std::int64_t, std::int64_t>> heads;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t place = count == 1 ? 0 : i * (config.layers * config.q_heads - 1) / (count - 1);
    heads.emplace_back(place / config.q_heads, place % config.q_heads);
  }
  return heads;
}

MethodResult measure(const Model& model, std::span<const std::int32_t> prompt, const std::string& spec,
                     const RunOptions& run) {
  const auto heads = heads_to_picture(model.config());
  std::vector<std::pair<std::int64_t, Plan>> plans;  // drawn after the clock has stopped
  SessionOptions session_options;
  session_options.prefill = make_method(spec);
  session_options.run = run;
  session_options.capacity = static_cast<std::int64_t>(prompt.size() + kKey.size());
  session_options.on_plan = [&](std::int64_t layer, const Plan& plan) {
    for (const auto& head : heads) {
      if (head.first != layer) continue;
      plans.emplace_back(layer, plan);
      return;
    }
  };
  Session session(model, session_options);

  std::optional<ProgressLine> progress(std::in_place, spec);
  GenerateOptions options;
  options.max_tokens = static_cast<std::int64_t>(kKey.size());
  options.bits_per_byte = true;
  options.prefill.on_progress = [&](double done, std::int64_t total) {
    progress->show(done / static_cast<double>(total));
  };
  double attention_ms = 0;
  options.on_text = [&](std::string_view) {
    if (attention_ms == 0) attention_ms = session.statistics().attention_ms;  // of the prefill alone
  };
  const Generation generation = generate(session, prompt, options);
  progress.reset();

  const SessionStatistics& statistics = session.statistics();
  MethodResult result{.method = spec,
                      .parameters = session_options.prefill->parameters(),
                      .density = statistics.density(),
                      .prefill_ms = statistics.prefill_ms,
                      .attention_ms = attention_ms,
                      .bits_per_byte = generation.bits_per_byte,
                      .answer = generation.text,
                      .found = generation.text.starts_with(kKey),
                      .maps = {}};
  for (const auto& [layer, q_head] : heads) {
    const auto tokens = static_cast<std::int64_t>(prompt.size());
    PlanMap map(tokens, tokens);
    for (const auto& [plan_layer, plan] : plans) {
      if (plan_layer == layer) map.add(plan, 0, q_head);
    }
    result.maps.push_back({layer, q_head, std::move(map)});
  }
  return result;
}

constexpr std::string_view kRowFormat = "{:<36}{:>9}{:>11}{:>10}{:>12}{:>10}{:>10}  {}\n";

void print_row(const MethodResult& result, const MethodResult& dense) {
  fmt::print(kRowFormat, result.method, fmt::format("{:.1f} %", 100 * result.density),
             fmt::format("{:.2f} s", result.prefill_ms / 1000),
             fmt::format("{:.2f} x", dense.prefill_ms / result.prefill_ms),
             fmt::format("{:.2f} s", result.attention_ms / 1000),
             fmt::format("{:.2f} x", dense.attention_ms / result.attention_ms),
             fmt::format("{:.3f}", result.bits_per_byte.value_or(0)),
             result.found ? fmt::format("found ({})", kKey) : fmt::format("lost ({})", printable(result.answer)));
  std::fflush(stdout);
}

void print_results(const ComparisonPage& page) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const MethodResult& result : page.results) {
    const MethodResult& dense = page.results.front();
    rows.push_back({{"method", result.method},
                    {"density", result.density},
                    {"prefill_ms", result.prefill_ms},
                    {"attention_ms", result.attention_ms},
                    {"prefill_speedup", dense.prefill_ms / result.prefill_ms},
                    {"attention_speedup", dense.attention_ms / result.attention_ms},
                    {"bits_per_byte", result.bits_per_byte.value_or(0)},
                    {"passkey_found", result.found},
                    {"answer", printable(result.answer)}});
  }
  print_json({{"model", page.model},
              {"document", page.document},
              {"tokens", page.tokens},
              {"passkey", page.key},
              {"passkey_position", page.key_position},
              {"results", rows}});
}

void run_demo(const Options& options) {
  require(options.depth >= 0 && options.depth <= 1, "--depth is {}; expected 0 to 1", options.depth);
  const RunOptions run = run_options_of(options.run);
  for (const std::string& spec : options.methods)
    make_method(spec);  // refuse a wrong name before the first hour of work
  const std::string document = read_text_file(options.document);
  const Prompt prompt = plant_key(document, options.depth);
  const Model model = Model::load(options.model, load_options_of(options.load, run.threads));
  const std::vector<std::int32_t> tokens = model.encode(prompt.text);

  ComparisonPage page;
  page.model = options.model;
  page.document = options.document;
  page.tokens = static_cast<std::int64_t>(tokens.size());
  page.key = kKey;
  page.key_position = static_cast<std::int64_t>(model.encode(prompt.text.substr(0, prompt.key_begin)).size());
  page.machine = fmt::format("{} threads, {}", thread_count(run.threads), name_of(run.isa.value_or(default_isa())));

  if (!options.json) {
    fmt::print("{}: {} bytes, {} tokens with the planted pass key; model {} on {}\n\n", page.document, document.size(),
               page.tokens, page.model, page.machine);
    fmt::print(kRowFormat, "method", "density", "prefill", "speed-up", "attention", "speed-up", "bits/byte",
               "pass key");
    std::fflush(stdout);
  }
  {  // The first pass through a model builds its matrix products; none of the methods should pay for that.
    SessionOptions warm_up_options;
    warm_up_options.run = run;
    Session warm_up(model, warm_up_options);
    warm_up.prefill(std::span(tokens).first(std::min<std::size_t>(tokens.size(), 1024)));
  }
  for (const std::string& spec : options.methods) {
    page.results.push_back(measure(model, tokens, spec, run));
    if (!options.json) print_row(page.results.back(), page.results.front());
  }
  if (options.json) print_results(page);
  if (!options.html.empty()) {
    AtomicFile file(options.html);
    file.write(html_of(page));
    file.commit();
    if (!options.json) fmt::print("\nthe same with pictures of the plans: {}\n", options.html);
  }
}

}  // namespace

void add_demo(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, "demo", "A long document with a pass key in it, dense and sparse",
                                  "tessera demo --html demo.html");
  command->add_option("--model", options->model, "Folder of the model")->capture_default_str();
  command->add_option("--document", options->document, "Text file")->capture_default_str();
  command->add_option("--methods", options->methods, "Methods; the first is what the others are compared with")
      ->capture_default_str();
  command->add_option("--depth", options->depth, "Where the pass key is planted: 0 = at the start, 1 = at the end")
      ->capture_default_str();
  command->add_option("--html", options->html, "Write a page with the table and pictures of the plans");
  add_load_options(*command, options->load);
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([options] { run_demo(*options); });
}

}  // namespace tessera::cli
