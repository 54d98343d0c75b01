// `tessera tune sale`: a threshold per layer and query head, halved until the output error is small enough.
#include <algorithm>

#include "core/error.h"
#include "tune/error_search.h"
#include "tune/prompts.h"
#include "tune/tuner.h"

namespace tessera::tune {

namespace {

struct SaleTuner {
  struct Params {
    double threshold = 0.008;
    double least = 1e-4;
    double error = 0.4;
    std::string form = "two_pass";
    std::int64_t dense_below = 1025;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("threshold", threshold, 1e-5, 1, "threshold that is tried first, then halved");
      v("least", least, 1e-6, 1, "below it the head runs dense");
      v("error", error, 0, 1e9, "sum of the differences of a head's outputs per token that is too much");
      v("form", form, "of the method: two_pass or one_pass");
      v("dense_below", dense_below, 0, kMostTokens, "of the method");
      v("seed", seed, 0, kMostTokens, "of the prompt");
    }
  };
  static TunerEntry info() {
    return {.method = "sale",
            .summary = "a threshold per head, halved until the output error is small enough",
            .paper =
                "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling, "
                "arXiv:2505.24179",
            .parameters = {},
            .tune = {}};
  }

  static TuningResult tune(const TuningTask& task, const Params& params) {
    const ModelConfig& config = task.model->config();
    const std::int64_t length = task.length > 0 ? task.length : std::min<std::int64_t>(8192, config.max_positions);
    require(length >= params.dense_below,
            "tune sale: prompts of {} tokens run dense below dense_below={}; give a larger --length", length,
            params.dense_below);
    const auto prompt = calibration_prompts(*task.model, task.text, length, 1, params.seed)[0];
    Json layers = Json::array();
    double sparsity = 0;
    std::int64_t dense = 0;
    for_each_layer(task, prompt, "thresholds", [&](std::int64_t layer, const LayerTensors& tensors) {
      Json heads = Json::array();
      for (std::int64_t head = 0; head < config.q_heads; ++head) {
        task.step("heads", static_cast<double>(layer * config.q_heads + head),
                  static_cast<double>(config.layers * config.q_heads));
        const HeadTrial trial(tensors, head, task.run);
        double own = 0;
        const double threshold = halve_until(params.threshold, params.least, [&](double value) {
          const HeadOutcome outcome =
              trial.run("sale", {{"threshold", value}, {"form", params.form}, {"dense_below", params.dense_below}});
          own = outcome.sparsity;
          return outcome.l1 < params.error * static_cast<double>(trial.tokens());
        });
        if (threshold == 0) own = 0;
        sparsity += own;
        dense += threshold == 0 ? 1 : 0;
        heads.push_back(threshold);
      }
      layers.push_back(std::move(heads));
    });
    return {.parameters = {{"thresholds", layers}, {"form", params.form}, {"dense_below", params.dense_below}},
            .report = {{"length", length},
                       {"mean_density", 1 - sparsity / static_cast<double>(config.layers * config.q_heads)},
                       {"dense_heads", dense}}};
  }
};

}  // namespace

TunerEntry sale_tuner() {
  return tuner_entry<SaleTuner>();
}

}  // namespace tessera::tune
