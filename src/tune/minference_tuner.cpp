// `tessera tune minference`: a pattern per layer and query head (pattern_search.h).
#include <cmath>

#include "core/error.h"
#include "methods/configuration.h"
#include "tune/capture.h"
#include "tune/pattern_search.h"
#include "tune/prompts.h"
#include "tune/tuner.h"

namespace tessera::tune {

namespace {

using Kind = HeadPattern::Kind;

/// The candidates of the authors' code; the two that only its search by output has come last.
std::vector<HeadPattern> published_candidates(PatternForm form) {
  std::vector<HeadPattern> candidates{{Kind::stream_llm, 100, 800},          {Kind::vertical_and_slash, 30, 800},
                                      {Kind::vertical_and_slash, 100, 750},  {Kind::vertical_and_slash, 500, 700},
                                      {Kind::vertical_and_slash, 3500, 100}, {Kind::block_sparse, 0, 0}};
  if (form == PatternForm::output) {
    candidates.push_back({Kind::vertical_and_slash, 100, 800});
    candidates.push_back({Kind::vertical_and_slash, 1000, 4096});
  }
  return candidates;
}

struct MInferenceTuner {
  struct Params {
    PatternForm form = PatternForm::recall;
    Configuration candidates;
    double scale = 1;
    bool equal_cost = true;
    std::int64_t first_row = 2500;
    double tolerance = 5e-3;
    std::int64_t k = 100;
    std::int64_t last_q = 64;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("form", form, {"recall", "output"}, "judge by the softmax mass that is kept, or by the output");
      v("candidates", candidates,
        "JSON [[pattern, size, size], ...] as in the method's config; none: the published ones");
      v("scale", scale, 1e-3, 1e3, "factor of the candidates' sizes, for prompts that are short");
      v("equal_cost", equal_cost,
        "change the larger size of every candidate until all cost what the first A-shape costs");
      v("first_row", first_row, -1, kMostTokens, "recall counts rows from here on; -1: the last half");
      v("tolerance", tolerance, 0, 1e6, "form output: difference of an output element that counts as none");
      v("k", k, 1, kMostTokens, "key tiles of block-sparse heads, where equal_cost does not set them");
      v("last_q", last_q, 1, 1024, "query rows of the method's probe");
      v("seed", seed, 0, kMostTokens, "of the prompt");
    }
  };
  static TunerEntry info() {
    return {.method = "minference",
            .summary = "a pattern per head, the one that loses least among candidates of equal cost",
            .paper =
                "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, "
                "arXiv:2407.02490",
            .parameters = {},
            .tune = {}};
  }

  static PatternSearch search_of(const Params& params, std::int64_t length) {
    PatternSearch search;
    search.form = params.form;
    search.first_row = params.first_row < 0 ? length / 2 : params.first_row;
    search.tolerance = params.tolerance;
    search.block_tiles = params.k;
    search.last_q = params.last_q;
    search.candidates = published_candidates(params.form);
    if (!params.candidates.empty()) {
      const Json list = read_configuration(params.candidates);
      require(list.is_array() && !list.empty(), "tune minference: candidates is not a list of patterns");
      search.candidates.clear();
      for (const Json& item : list) {
        search.candidates.push_back(
            head_pattern_of(item, fmt::format("tune minference: candidates[{}]", search.candidates.size())));
      }
    }
    for (HeadPattern& pattern : search.candidates) {
      pattern.first = std::llround(static_cast<double>(pattern.first) * params.scale);
      pattern.second = std::llround(static_cast<double>(pattern.second) * params.scale);
      if (pattern.kind != Kind::stream_llm || !params.equal_cost || search.pairs > 0) continue;
      search.pairs = pairs_of_a_shape(length, pattern.first, pattern.second);
      search.block_tiles = block_tiles_for(length, search.pairs);
    }
    require(!params.equal_cost || search.pairs > 0,
            "tune minference: candidates holds no stream_llm, whose cost the others are brought to; add one or set "
            "equal_cost=false");
    return search;
  }

  static TuningResult tune(const TuningTask& task, const Params& params) {
    const ModelConfig& config = task.model->config();
    const std::int64_t length = task.length > 0 ? task.length : std::min<std::int64_t>(30000, config.max_positions);
    const PatternSearch search = search_of(params, length);
    require(search.first_row < length, "tune minference: first_row={} lies beyond the prompt of {} tokens; give -1",
            search.first_row, length);
    const auto tokens = calibration_prompts(*task.model, task.text, length, 1, params.seed)[0];
    Json layers = Json::array();
    double score = 0;
    double pairs = 0;
    for_each_layer(task, tokens, "patterns", [&](std::int64_t, const LayerTensors& tensors) {
      Json layer = Json::object();
      for (const PatternChoice& choice : search_patterns(tensors.problem, tensors.inputs(), search, task.run)) {
        layer[std::to_string(layer.size())] = head_pattern_json(choice.pattern, choice.score);
        score += choice.score;
        pairs += choice.pairs;
      }
      layers.push_back(std::move(layer));
    });
    const auto heads = static_cast<double>(config.layers * config.q_heads);
    const double causal = static_cast<double>(length) * static_cast<double>(length + 1) / 2;
    return {
        .parameters = {{"config", layers}, {"k", search.block_tiles}, {"last_q", params.last_q}},
        .report = {{"length", length}, {"mean_score", score / heads}, {"executed_density", pairs / heads / causal}}};
  }
};

}  // namespace

TunerEntry minference_tuner() {
  return tuner_entry<MInferenceTuner>();
}

}  // namespace tessera::tune
