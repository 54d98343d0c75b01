// `tessera tune xattention`: a threshold per layer and query head (threshold_search.h).
//
// Differs from the paper: its dynamic program judges a choice by a task; here by the softmax mass that is kept, which
// adds up over heads, so that the program is exact. Its text gives D[h][m] from D[h - 1][m] and one more step of head
// h; ours takes any number of steps of head h, which includes that.
#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "tune/capture.h"
#include "tune/prompts.h"
#include "tune/threshold_search.h"
#include "tune/tuner.h"

namespace tessera::tune {

namespace {

enum class ThresholdForm : std::uint8_t { profile, program };

struct XAttentionTuner {
  struct Params {
    ThresholdForm form = ThresholdForm::program;
    double tau = 0.9;
    double factor = 0.9;
    std::int64_t steps = 1000;
    double quality = 0.98;
    double coverage = 0.9;
    std::int64_t stride = 16;
    std::int64_t block = 128;
    double norm = 1;
    std::int64_t prompts = 1;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("form", form, {"profile", "program"},
        "profile: as the code, what `coverage` of the exact mass needs; program: the paper's dynamic program");
      v("tau", tau, 1e-3, 1, "program: threshold of every head before the first step");
      v("factor", factor, 0.01, 0.99, "program: a step multiplies a threshold by this");
      v("steps", steps, 0, 1000000, "program: steps of all heads together at most");
      v("quality", quality, 0, 1, "program: least share of the softmax mass kept at tau that must still be kept");
      v("coverage", coverage, 0, 1, "profile: share of the exact mass of a row of tiles that is needed");
      v("stride", stride, 1, 64, "of the method");
      v("block", block, 16, 1024, "of the method");
      v("norm", norm, 1e-3, 1e3, "of the method");
      v("prompts", prompts, 1, 1024, "calibration prompts: profile takes the largest threshold, program the mean");
      v("seed", seed, 0, kMostTokens, "of the prompts");
    }
  };
  static TunerEntry info() {
    return {.method = "xattention",
            .summary = "a threshold per head, by the score mass that exact attention needs or by a dynamic program",
            .paper = "XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv:2503.16428",
            .parameters = {},
            .tune = {}};
  }

  /// tau, tau * factor, ... until nothing but the forced tiles is left to drop.
  static std::vector<double> levels_of(const Params& params) {
    std::vector<double> levels{params.tau};
    constexpr double least = 1e-3;
    while (levels.back() > least && std::ssize(levels) <= params.steps && levels.size() < 1000) {
      levels.push_back(levels.back() * params.factor);
    }
    return levels;
  }

  static TuningResult tune(const TuningTask& task, const Params& params) {
    const ModelConfig& config = task.model->config();
    const std::int64_t length = task.length > 0 ? task.length : std::min<std::int64_t>(8192, config.max_positions);
    require(params.block % params.stride == 0, "tune xattention: stride={} does not divide block={}", params.stride,
            params.block);
    const TileScoring scoring{params.stride, params.block, params.norm};
    const auto prompts = calibration_prompts(*task.model, task.text, length, params.prompts, params.seed);
    const auto heads = static_cast<std::size_t>(config.q_heads);
    const std::size_t all = static_cast<std::size_t>(config.layers) * heads;
    std::vector<double> thresholds(all);
    Json report{{"length", length}};
    if (params.form == ThresholdForm::profile) {
      for_each_layer(task, prompts, "thresholds", [&](std::size_t, std::int64_t layer, const LayerTensors& tensors) {
        const auto found =
            profiled_thresholds(tensors.problem, tensors.inputs(), scoring, params.coverage, task.run.threads);
        for (std::size_t head = 0; head < heads; ++head) {
          double& threshold = thresholds[static_cast<std::size_t>(layer) * heads + head];
          threshold = std::max(threshold, found[head]);
        }
      });
    } else {
      const std::vector<double> levels = levels_of(params);
      std::vector<std::vector<double>> mass(all, std::vector<double>(levels.size()));
      std::vector<std::vector<double>> density = mass;
      for_each_layer(task, prompts, "thresholds", [&](std::size_t, std::int64_t layer, const LayerTensors& tensors) {
        const ThresholdOutcome outcome =
            outcome_of_thresholds(tensors.problem, tensors.inputs(), scoring, levels, task.run.threads);
        for (std::size_t i = 0; i < heads * levels.size(); ++i) {
          const std::size_t head = static_cast<std::size_t>(layer) * heads + i / levels.size();
          mass[head][i % levels.size()] += outcome.mass[i] / static_cast<double>(prompts.size());
          density[head][i % levels.size()] += outcome.density[i] / static_cast<double>(prompts.size());
        }
      });
      const auto lowered = lower_thresholds(mass, params.steps, params.quality);
      double kept_mass = 0;
      double kept_tiles = 0;
      double tiles_before = 0;
      for (std::size_t head = 0; head < all; ++head) {
        const auto level = static_cast<std::size_t>(lowered[head]);
        thresholds[head] = levels[level];
        kept_mass += mass[head][level] / static_cast<double>(all);
        kept_tiles += density[head][level] / static_cast<double>(all);
        tiles_before += density[head][0] / static_cast<double>(all);
      }
      report["mean_mass"] = kept_mass;
      report["mean_density"] = kept_tiles;
      report["mean_density_before"] = tiles_before;
    }
    Json layers = Json::array();
    for (std::size_t first = 0; first < all; first += heads) {
      const auto begin = thresholds.begin() + static_cast<std::ptrdiff_t>(first);
      layers.push_back(std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(heads)));
    }
    return {.parameters = {{"thresholds", layers},
                           {"stride", params.stride},
                           {"block", params.block},
                           {"norm", params.norm}},
            .report = report};
  }
};

}  // namespace

TunerEntry xattention_tuner() {
  return tuner_entry<XAttentionTuner>();
}

}  // namespace tessera::tune
