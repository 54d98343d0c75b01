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
  return {2 * weights * run.generated * run.trials, weights * run.bytes_per_weight * run.generated};
}

/// Sum over the steps t of min(budget, C + t), as an integral.
double tokens_read(const Decoding& run, double budget) {
  const double all = (2 * run.context + run.generated) * run.generated / 2;
  if (run.context + run.generated <= budget) return all;
  const double room = std::max(0.0, budget - run.context);
  return budget * run.generated - room * room / 2;
}

}  // namespace

double weights_per_token(const ModelConfig& config) {
  const auto hidden = static_cast<double>(config.hidden_size);
  const auto dim = static_cast<double>(config.head_dim);
  const double projections = hidden * static_cast<double>(config.q_heads + 2 * config.kv_heads) * dim +
                             static_cast<double>(config.q_heads) * dim * hidden;
  return static_cast<double>(config.layers) *
         (projections + 3 * hidden * static_cast<double>(config.intermediate_size));
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

Cost decode_cost_top_k(const ModelConfig& config, const Decoding& run, double budget) {
  Cost cost = weights_cost(config, run);
  const double tokens = run.trials * tokens_read(run, budget);
  cost.flops += pair_flops(config) * tokens;
  cost.bytes += token_elements(config) * run.bytes_per_element * tokens;
  return cost;
}

Cost decode_cost_blocks(const ModelConfig& config, const Decoding& run, double budget, double block) {
  Cost cost = decode_cost_top_k(config, run, budget);
  const double own = run.generated * run.generated / 2;
  // One key per block and no value: half of what a token costs.
  cost.flops += run.trials * pair_flops(config) / 2 * (run.context * run.generated + own) / block;
  cost.bytes +=
      token_elements(config) / 2 * run.bytes_per_element * (run.context * run.generated + run.trials * own) / block;
  return cost;
}

}  // namespace tessera::eval
