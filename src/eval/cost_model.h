// What a model's prefill and decoding cost by arithmetic alone, as Kinetics counts test-time compute (arXiv
// 2506.05333): floating-point operations, and bytes of keys and values at the price in operations that the machine
// asks for them.
#pragma once

#include <cstdint>

#include "tessera/model.h"

namespace tessera::eval {

/// Rates of the machine that predict times; 0: no prediction.
struct MachineRates {
  double gflops = 0;  ///< of the products, in the dtype of the call
  double gbps = 0;    ///< reads from memory

  /// Operations in the time of reading one byte.
  double intensity() const { return gbps > 0 ? gflops / gbps : 0; }
};

struct Cost {
  double flops = 0;
  double bytes = 0;  ///< read from memory

  /// eFLOPs: operations plus what could be computed while the bytes are read.
  double effective_flops(const MachineRates& rates) const { return flops + rates.intensity() * bytes; }
  /// Of the effective operations at the peak; 0 without rates. Products and reads are taken one after the other, where
  /// a roofline takes the longer of the two.
  double milliseconds(const MachineRates& rates) const {
    return rates.gflops > 0 ? effective_flops(rates) / rates.gflops / 1e6 : 0;
  }
};

/// Weights of the matrices that every token passes: projections and feed-forward of all layers, of experts those
/// chosen.
double weights_per_token(const ModelConfig& config);
/// Weights of the output head.
double head_weights(const ModelConfig& config);

/// Prefill of so many tokens with attention of that density; the head once, for the last token. Every key and value is
/// read once.
Cost prefill_cost(const ModelConfig& config, double tokens, double density, double bytes_per_element);

/// A prompt that `trials` answers share.
struct Decoding {
  double context = 0;    ///< C: tokens of the prompt
  double generated = 0;  ///< G: tokens of each answer
  double trials = 1;
  double bytes_per_element = 2;
  /// Bytes of the weights that a step reads; 0 leaves them out, as the paper does for large batches.
  double weight_bytes = 0;
};
Cost decode_cost(const ModelConfig& config, const Decoding& run);
/// Tokens that one trial reads in all steps together, of those that dense attention reads.
double dense_tokens(const Decoding& run);
/// The same where each step reads at most `budget` tokens. The quadratic term of the paper's own program for top-k is
/// added where it must be subtracted; here it is subtracted.
double top_k_tokens(const Decoding& run, double budget);
/// Each trial reads so many tokens in all steps together; selections differ between trials, so that nothing is shared.
/// With `block` > 0 they are found by a search over one representative of every so many tokens.
Cost decode_cost_selected(const ModelConfig& config, const Decoding& run, double tokens, double block = 0);

}  // namespace tessera::eval
