#include "eval/cost_model.h"

#include <algorithm>

namespace tessera::eval {

namespace {

/// What the heads of all layers do for one pair of a query and a key, and read of one token.
double pair_flops(const ModelConfig& config) {
  return 4.0 * static_cast<double>(config.layers * config.q_heads * config.head_dim);
}
double token_elements(const ModelConfig& config) {
  return 2.0 * static_cast<double>(config.layers * config.kv_heads * config.head_dim);
}

/// The matrices, for all generated tokens of all trials.
Cost weights_cost(const ModelConfig& config, const Decoding& run) {
  const double weights = weights_per_token(config) + head_weights(config);
  return {2 * weights * run.generated * run.trials, run.weight_bytes * run.generated};
}

}  // namespace

double weights_per_token(const ModelConfig& config) {
  const auto hidden = static_cast<double>(config.hidden_size);
  const auto dim = static_cast<double>(config.head_dim);
  const double projections = hidden * static_cast<double>(config.q_heads + 2 * config.kv_heads) * dim +
                             static_cast<double>(config.q_heads) * dim * hidden;
  const double plain = 3 * hidden * static_cast<double>(config.intermediate_size);
  const ExpertsConfig& experts = config.experts;
  const double mixed = hidden * static_cast<double>(experts.count + 3 * experts.chosen * experts.intermediate_size);
  double weights = 0;
  for (std::int64_t layer = 0; layer < config.layers; ++layer)
    weights += projections + (config.layer(layer).experts ? mixed : plain);
  return weights;
}

double head_weights(const ModelConfig& config) {
  return static_cast<double>(config.hidden_size) * static_cast<double>(config.vocab_size);
}

Cost prefill_cost(const ModelConfig& config, double tokens, double density, double bytes_per_element) {
  const double pairs = density * tokens * (tokens + 1) / 2;
  return {2 * weights_per_token(config) * tokens + 2 * head_weights(config) + pair_flops(config) * pairs,
          token_elements(config) * tokens * bytes_per_element};
}

Cost decode_cost(const ModelConfig& config, const Decoding& run) {
  Cost cost = weights_cost(config, run);
  const double own = run.generated * run.generated / 2;
  cost.flops += run.trials * pair_flops(config) * (run.context * run.generated + own);
  cost.bytes += token_elements(config) * run.bytes_per_element * (run.context * run.generated + run.trials * own);
  return cost;
}

double dense_tokens(const Decoding& run) {
  return (2 * run.context + run.generated) * run.generated / 2;
}

// The sum over the steps t of min(budget, C + t), as an integral.
double top_k_tokens(const Decoding& run, double budget) {
  if (run.context + run.generated <= budget) return dense_tokens(run);
  const double room = std::max(0.0, budget - run.context);
  return budget * run.generated - room * room / 2;
}

Cost decode_cost_selected(const ModelConfig& config, const Decoding& run, double tokens, double block) {
  Cost cost = weights_cost(config, run);
  const double read = run.trials * tokens;
  cost.flops += pair_flops(config) * read;
  cost.bytes += token_elements(config) * run.bytes_per_element * read;
  if (block > 0) {
    const double own = run.generated * run.generated / 2;
    // One key per block and no value: half of what a token costs.
    cost.flops += run.trials * pair_flops(config) / 2 * (run.context * run.generated + own) / block;
    cost.bytes +=
        token_elements(config) / 2 * run.bytes_per_element * (run.context * run.generated + run.trials * own) / block;
  }
  return cost;
}

}  // namespace tessera::eval
