// `tessera tune razor`: the heads that retrieve, by echo and induction scores (head_probe.h).
#include "core/error.h"
#include "methods/head_table.h"
#include "tune/capture.h"
#include "tune/head_probe.h"
#include "tune/prompts.h"
#include "tune/tuner.h"

namespace tessera::tune {

namespace {

struct RazorTuner {
  struct Params {
    std::int64_t repeats = 4;
    double induction = 0.14;
    double echo = 0.01;
    std::int64_t sink = 4;
    double divisor = 5;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("repeats", repeats, 2, 64, "times that the random tokens of the probe occur");
      v("induction", induction, 0, 1, "share of all query heads that retrieve, by induction score; one at least");
      v("echo", echo, 0, 1, "share of all query heads that retrieve, by echo score");
      v("sink", sink, 0, kMostTokens, "N0 of the method: first tokens that other heads keep");
      v("divisor", divisor, 1, 1e9, "C of the method: other heads keep the prompt's length divided by this");
      v("seed", seed, 0, kMostTokens, "of the random tokens");
    }
  };
  static TunerEntry info() {
    return {.method = "razor",
            .summary = "retrieval heads by attention to earlier occurrences of random tokens that repeat",
            .paper = "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv:2407.15891",
            .parameters = {},
            .tune = {}};
  }

  static TuningResult tune(const TuningTask& task, const Params& params) {
    const ModelConfig& config = task.model->config();
    const std::int64_t length = task.length > 0 ? task.length : std::min<std::int64_t>(10000, config.max_positions);
    const std::int64_t first = config.bos_token ? 1 : 0;
    const std::int64_t period = (length - first) / params.repeats;
    require(period >= 2, "length is {}; {} repeats need at least {} tokens", length, params.repeats,
            2 * params.repeats + first);
    std::vector<std::int32_t> tokens = repeated_tokens(*task.model, period, params.repeats, params.seed);
    if (config.bos_token) tokens.insert(tokens.begin(), *config.bos_token);
    std::vector<RepeatScores> layers;
    for_each_layer(task, tokens, "probe", [&](std::int64_t, const LayerTensors& tensors) {
      layers.push_back(
          score_repeats(tensors.problem, tensors.inputs(), first, period, params.repeats, task.run.threads));
    });
    HeadTable table;
    Json scores = Json::array();
    for (const auto& heads : retrieval_heads(layers, config.kv_heads, params.induction, params.echo)) {
      scores.push_back({{"induction", layers[table.size()].induction}, {"echo", layers[table.size()].echo}});
      auto& row = table.emplace_back();
      for (const bool whole : heads) {
        // What another head keeps grows with the prompt: N0 + N / C.
        HeadEntry entry{.whole = whole, .gate = whole ? 1 : 0};
        if (!whole) {
          entry.sink = params.sink;
          entry.alpha = static_cast<double>(params.sink);
          entry.beta = 1 / params.divisor;
        }
        row.push_back(entry);
      }
    }
    return {.parameters = {{"heads", head_table_json(table)}, {"sink", params.sink}, {"divisor", params.divisor}},
            .report = {{"length", std::ssize(tokens)}, {"period", period}, {"scores", scores}}};
  }
};

}  // namespace

TunerEntry razor_tuner() {
  return tuner_entry<RazorTuner>();
}

}  // namespace tessera::tune
