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

/// Weights of the matrices that every token passes: projections and feed-forward of all layers.
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
  /// Bytes of one weight; 0 leaves reading the weights out, as the paper does for large batches.
  double bytes_per_weight = 0;
};
Cost decode_cost(const ModelConfig& config, const Decoding& run);
/// Each step reads at most `budget` tokens. Selections differ between trials, so that nothing is shared.
Cost decode_cost_top_k(const ModelConfig& config, const Decoding& run, double budget);
/// The same with a search over one representative of every `block` tokens. The quadratic term of the paper's own
/// program for top-k is added where it must be subtracted; here it is subtracted.
Cost decode_cost_blocks(const ModelConfig& config, const Decoding& run, double budget, double block);

}  // namespace tessera::eval
