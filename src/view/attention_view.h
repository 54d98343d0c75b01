// What heads attend to and what methods compute of it, pooled into cells: the content of the page of `tessera view`.
//
// Everything lies on a grid of cells of so many tokens a side, at several levels: each halves the number of cells a
// side of the one before. Memory and the size of the page follow the cells, never queries times keys.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "tessera/method.h"

namespace tessera {

struct AttentionViewOptions {
  std::int64_t most_cells = 512;    ///< a side, at the finest level; cells are the smallest power of 2 that reaches it
  std::int64_t layers = 1;          ///< of the model, for methods that ask where they are
  bool follows_layers = true;       ///< calls are layers of one sequence: methods keep their state between them
  std::uint64_t seed = 1;           ///< of the side inputs that methods need and the call lacks
  RunOptions run;                   ///< threads and instruction set
  std::function<bool()> cancelled;  ///< asked between heads; true ends with Cancelled
};

/// Collects the layers of a model, or the sequences of a tensor file, one after the other.
class AttentionView {
 public:
  /// Throws Error for a wrong SPEC and for methods without a plan or without prefill.
  AttentionView(const std::vector<std::string>& specs, AttentionViewOptions options);
  ~AttentionView();

  /// Draws heads of a call of batch 1: dense attention once, then every method on the same tensors. `layer` is what the
  /// page calls it. Calls must come in order, of equal lengths; one without heads only lets methods with state follow.
  /// Throws Error for a problem outside of a method's domain and tensors that do not fit.
  void add(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs,
           std::span<const std::int64_t> heads);

  /// The bytes of each token, for people to read.
  void set_tokens(std::span<const std::string> tokens);

  /// {"kind": "view", "queries", "keys", "cell", "levels", "methods", "heads", ...}; docs/viewing.md describes the
  /// packed arrays.
  nlohmann::ordered_json report() const;

  /// Tokens a side of a cell of the finest level.
  static std::int64_t cell_of(std::int64_t queries, std::int64_t keys, std::int64_t most_cells);
  /// The byte that stands for a softmax mass: 0 no pair allowed, 1 at most 1e-6, then 20 steps per factor of 10.
  static std::uint8_t byte_of_mass(double mass);

 private:
  struct Runner;
  nlohmann::ordered_json attention_of(const Problem& problem, const AttentionInputs& inputs, std::int64_t head) const;
  nlohmann::ordered_json method_of(const Runner& runner, const Problem& problem, const Plan& plan, std::int64_t head,
                                   bool corrects_rest) const;

  AttentionViewOptions options_;
  std::vector<Runner> runners_;
  std::int64_t queries_ = 0;
  std::int64_t keys_ = 0;
  std::int64_t offset_ = 0;
  std::int64_t cell_ = 0;
  bool causal_ = false;
  nlohmann::ordered_json heads_ = nlohmann::ordered_json::array();
  nlohmann::ordered_json text_;
};

}  // namespace tessera
