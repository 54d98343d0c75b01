// `tessera tune sparge`: theta, cdf and lambda per layer and query head, the sparsest within two bounds on the error.
#include <algorithm>

#include "core/error.h"
#include "tune/error_search.h"
#include "tune/prompts.h"
#include "tune/tuner.h"

namespace tessera::tune {

namespace {

struct SpargeTuner {
  struct Params {
    double l1 = 0.07;
    double pv_l1 = 0.08;
    std::int64_t thetas = 16;
    double least_sparsity = 0.1;
    std::int64_t block_q = 128;
    std::int64_t block_k = 64;
    std::int64_t skip_rows = 32;
    std::int64_t prompts = 1;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("l1", l1, 0, 1, "relative L1 error of a head's output that choosing tiles may make");
      v("pv_l1", pv_l1, 0, 1, "the same with the online skip on top; above l1");
      v("thetas", thetas, 1, 1024, "thetas tried per unit, from -1 to below 1; the authors' 16");
      v("least_sparsity", least_sparsity, 0, 1,
        "a search ends at the first theta with less; heads with less run dense");
      v("block_q", block_q, 16, 1024, "of the method");
      v("block_k", block_k, 16, 128, "of the method");
      v("skip_rows", skip_rows, 1, 128, "of the method");
      v("prompts", prompts, 1, 1024, "calibration prompts, whose results are merged");
      v("seed", seed, 0, kMostTokens, "of the prompts");
    }
  };
  static TunerEntry info() {
    return {.method = "sparge",
            .summary = "theta, cdf and lambda per head, the sparsest within bounds on the output error",
            .paper =
                "SpargeAttn: Accurate and Training-free Sparse Attention Accelerating Any Model Inference, "
                "arXiv:2502.18137",
            .parameters = {},
            .tune = {}};
  }

  /// What one head allows on one prompt, theta by theta.
  static std::vector<SpargePoint> points_of(const TuningTask& task, const Params& params, const HeadTrial& trial,
                                            double done, double total) {
    constexpr double most_lambda = 50;
    std::vector<SpargePoint> points;
    Json parameters{{"block_q", params.block_q}, {"block_k", params.block_k}, {"skip_rows", params.skip_rows}};
    for (std::int64_t i = 0; i < 2 * params.thetas; ++i) {
      task.step("heads", done, total);
      SpargePoint point;
      point.theta = -1 + static_cast<double>(i) / static_cast<double>(params.thetas);
      parameters["theta"] = point.theta;
      parameters["online_skip"] = false;
      point.cdf = least_accepted(0, 1, 0.1, 1e-3, [&](double cdf) {
        parameters["cdf"] = cdf;
        return trial.run("sparge", parameters).rel_l1 < params.l1;
      });
      parameters["cdf"] = point.cdf;
      parameters["online_skip"] = true;
      point.lambda = least_accepted(0, most_lambda, 20, 0.1, [&](double lambda) {
        parameters["lambda"] = lambda;
        return trial.run("sparge", parameters).rel_l1 < params.pv_l1;
      });
      parameters["lambda"] = point.lambda;
      point.sparsity = trial.run("sparge", parameters).sparsity;
      points.push_back(point);
      if (point.sparsity < params.least_sparsity) break;
    }
    return points;
  }

  static TuningResult tune(const TuningTask& task, const Params& params) {
    require(params.pv_l1 > params.l1, "tune sparge: pv_l1={} is not above l1={}", params.pv_l1, params.l1);
    const ModelConfig& config = task.model->config();
    const std::int64_t length = task.length > 0 ? task.length : std::min<std::int64_t>(4096, config.max_positions);
    const auto prompts = calibration_prompts(*task.model, task.text, length, params.prompts, params.seed);
    const std::int64_t all = config.layers * config.q_heads;
    const auto trials = static_cast<double>(all * params.prompts);
    std::vector<std::vector<SpargePoint>> points(static_cast<std::size_t>(all));
    double done = 0;
    for_each_layer(task, prompts, "layers", [&](std::size_t, std::int64_t layer, const LayerTensors& tensors) {
      for (std::int64_t head = 0; head < config.q_heads; ++head) {
        const auto found = points_of(task, params, HeadTrial(tensors, head, task.run), done++, trials);
        auto& own = points[static_cast<std::size_t>(layer * config.q_heads + head)];
        own.insert(own.end(), found.begin(), found.end());
      }
    });
    constexpr double bin = 2.0 / 16;
    Json layers = Json::array();
    double sparsity = 0;
    std::int64_t dense = 0;
    for (std::int64_t i = 0; i < all; ++i) {
      if (i % config.q_heads == 0) layers.push_back(Json::array());
      const SpargePoint point = merge_points(points[static_cast<std::size_t>(i)], bin, params.least_sparsity);
      layers.back().push_back({{"theta", point.theta}, {"cdf", point.cdf}, {"lambda", point.lambda}});
      dense += point.theta >= 1 ? 1 : 0;
      sparsity += point.theta >= 1 ? 0 : point.sparsity;
    }
    return {
        .parameters = {{"heads", layers},
                       {"block_q", params.block_q},
                       {"block_k", params.block_k},
                       {"skip_rows", params.skip_rows}},
        .report = {{"length", length}, {"mean_sparsity", sparsity / static_cast<double>(all)}, {"dense_heads", dense}}};
  }
};

}  // namespace

TunerEntry sparge_tuner() {
  return tuner_entry<SpargeTuner>();
}

}  // namespace tessera::tune
