// Which layers may drop tokens: those whose output stays close to their input (Token Sparse Attention,
// arXiv:2602.03216). Writes the `layers` parameter of token-sparse.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace tessera::eval {

/// Mean over tokens of |out - in| / |in|, Euclidean norms of the rows of hidden states [tokens][width]. A row that is
/// zero before the layer counts 0 if it stays so, else 1. Throws Error unless both hold the same whole number of rows.
double layer_drift(std::span<const float> in, std::span<const float> out, std::int64_t width);

/// Layers whose drift is at or below the given quantile (0 to 1) of all layers, ascending: the ceil(quantile * layers)
/// stablest ones, ties included. Throws Error for a quantile out of range and a drift that is negative or not finite.
std::vector<std::int64_t> stable_layers(std::span<const double> drift, double quantile);

/// "14-15+20": what parameters that list layers read. Layers ascend.
std::string layer_list_text(std::span<const std::int64_t> layers);

}  // namespace tessera::eval
