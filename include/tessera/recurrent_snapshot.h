// Snapshots of what a recurrent method (lightning2, gated-deltanet, kda) keeps between calls: for prefixes that are
// shared, drafts that are rejected, and sequences that are continued another day.
#pragma once

#include <filesystem>
#include <memory>

#include "tessera/method.h"

namespace tessera {

/// A copy of a state that Method::new_state() of a recurrent method made: per layer the states of all sequences and
/// heads, the tokens they have seen, and the rows that convolutions read again. Throws Error for a state of another
/// kind.
std::unique_ptr<MethodState> copy_recurrent_state(const MethodState& state);

/// A safetensors file with, for every layer L that was called, `layer.L.state` f32 [sequences, heads, head_dim,
/// value_dim], `layer.L.tokens` i64 [sequences] and, for each convolution C, `layer.L.tail.C` f32, its last rows before
/// the convolution. It appears when it is complete.
void save_recurrent_state(const MethodState& state, const std::filesystem::path& path);
/// Throws Error for a file that holds anything else, or numbers that are not finite. Shapes must be those of the calls
/// to come; attend() checks them.
std::unique_ptr<MethodState> load_recurrent_state(const std::filesystem::path& path);

}  // namespace tessera
