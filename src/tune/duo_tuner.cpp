// `tessera tune duo`: gates of retrieval heads by optimisation (retrieval_gates.h).
#include "core/error.h"
#include "eval/random.h"
#include "methods/head_classes.h"
#include "methods/head_table.h"
#include "tune/prompts.h"
#include "tune/retrieval_gates.h"
#include "tune/tuner.h"

namespace tessera::tune {

namespace {

struct DuoTuner {
  struct Params {
    std::int64_t steps = 200;
    double learning_rate = 0.02;
    double penalty = 0.05;
    std::int64_t sink = 128;
    std::int64_t recent = 256;
    std::int64_t passkeys = 10;
    std::int64_t words = 8;
    PasskeyStyle style = PasskeyStyle::words;
    std::int64_t least_length = 0;
    std::int64_t lengths = 50;
    double warm_up = 0.2;
    double floor = 0.1;
    double threshold = 0.5;
    double sparsity = -1;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("steps", steps, 1, 1000000, "steps of one prompt each; published: 2000");
      v("learning_rate", learning_rate, 1e-6, 1, "of AdamW");
      v("penalty", penalty, 0, 1e6, "lambda: weight of the mean of the gates");
      v("sink", sink, 0, kMostTokens, "first tokens that streaming heads see, in the search and afterwards");
      v("recent", recent, 1, kMostTokens, "last tokens that they see, itself included");
      v("passkeys", passkeys, 1, 1000, "passkeys in a prompt, fewer where they do not fit");
      v("words", words, 1, 1000, "words of a passkey; published: 32");
      v("style", style, {"words", "digits"}, "of passkeys: spelling words, or five digits behind PK#");
      v("least_length", least_length, 0, kMostTokens, "tokens of the shortest prompt; 0: half of --length");
      v("lengths", lengths, 1, 1000000, "different lengths between that and --length");
      v("warm_up", warm_up, 0, 0.5, "share of the steps in which the learning rate grows, and at the end falls");
      v("floor", floor, 0, 1, "least share of the learning rate");
      v("threshold", threshold, 0, 1, "least gate of a retrieval head");
      v("sparsity", sparsity, -1, 1, "share of all heads that stream, those of the lowest gates; -1: by threshold");
      v("seed", seed, 0, kMostTokens, "of the prompts");
    }
  };
  static TunerEntry info() {
    return {.method = "duo",
            .summary = "retrieval heads by gates learned on passkey prompts, gradients through the whole model",
            .paper =
                "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, "
                "arXiv:2410.10819",
            .parameters = {},
            .tune = {}};
  }

  static TuningResult tune(const TuningTask& task, const Params& params) {
    const ModelConfig& config = task.model->config();
    const std::int64_t length = task.length > 0 ? task.length : std::min<std::int64_t>(2048, config.max_positions);
    const std::int64_t least = params.least_length > 0 ? params.least_length : (length + 1) / 2;
    require(least <= length, "tune duo: least_length={} is longer than the length {}", least, length);
    require(params.sparsity >= 0 || params.sparsity == -1, "tune duo: sparsity={} is neither -1 nor in [0, 1]",
            params.sparsity);
    const GateSearch search{.sink = params.sink,
                            .recent = params.recent,
                            .steps = params.steps,
                            .learning_rate = params.learning_rate,
                            .penalty = params.penalty,
                            .warm_up = params.warm_up,
                            .floor = params.floor};
    eval::Random random(static_cast<std::uint64_t>(params.seed), {0});
    const auto prompt_of = [&](std::int64_t step) {
      const std::int64_t grid = params.lengths == 1 ? 0 : random.below(params.lengths);
      const std::int64_t tokens = params.lengths == 1 ? length : least + (length - least) * grid / (params.lengths - 1);
      const PasskeyOptions options{
          .length = tokens, .passkeys = params.passkeys, .words = params.words, .style = params.style};
      return passkey_prompt(*task.model, task.text, options, static_cast<std::uint64_t>(params.seed + step));
    };
    task.step("gates", 0, static_cast<double>(params.steps));
    model::DifferentiableDecoder decoder(*task.model, task.run.threads);
    const LearnedGates learned = learn_gates(
        decoder, search, prompt_of,
        [&](std::int64_t step) {
          task.step("gates", static_cast<double>(step + 1), static_cast<double>(params.steps));
        },
        task.run);

    const HeadClasses classes{params.sink, params.recent, learned.gates};
    const auto retrieval = classes.retrieval(params.threshold, params.sparsity);
    HeadTable table;
    std::int64_t whole_heads = 0;
    for (std::size_t layer = 0; layer < learned.gates.size(); ++layer) {
      auto& row = table.emplace_back();
      for (std::size_t head = 0; head < learned.gates[layer].size(); ++head) {
        HeadEntry entry{.whole = retrieval[layer][head], .gate = learned.gates[layer][head]};
        whole_heads += entry.whole ? 1 : 0;
        if (!entry.whole) {
          entry.sink = params.sink;
          entry.alpha = static_cast<double>(params.sink + params.recent);
          entry.beta = 0;
        }
        row.push_back(entry);
      }
    }
    double last = 0;
    const std::size_t tail = std::min<std::size_t>(20, learned.deviations.size());
    for (std::size_t i = learned.deviations.size() - tail; i < learned.deviations.size(); ++i) {
      last += learned.deviations[i] / static_cast<double>(tail);
    }
    return {.parameters = {{"heads", head_table_json(table)},
                           {"sink", params.sink},
                           {"recent", params.recent},
                           {"threshold", params.threshold},
                           {"sparsity", params.sparsity}},
            .report = {{"length", length},
                       {"least_length", least},
                       {"gates", learned.gates},
                       {"retrieval_heads", whole_heads},
                       {"deviation", last}}};
  }
};

}  // namespace

TunerEntry duo_tuner() {
  return tuner_entry<DuoTuner>();
}

}  // namespace tessera::tune
