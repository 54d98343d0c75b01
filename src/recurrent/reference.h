// The recurrence and its gradients in float64, token by token: the oracle of every test, and form `reference`.
#pragma once

#include <cstdint>
#include <vector>

namespace tessera::recurrent {

/// One (sequence, head). Every token has a query; rows lie back to back.
struct ReferenceHead {
  std::int64_t tokens = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  double scale = 1;
  std::vector<double> q = {};      ///< [tokens][head_dim]
  std::vector<double> k = {};      ///< [tokens][head_dim]
  std::vector<double> v = {};      ///< [tokens][value_dim]
  std::vector<double> decay = {};  ///< [tokens] or [tokens][head_dim], log; empty: none
  std::vector<double> beta = {};   ///< [tokens]; empty: no delta rule
  std::vector<double> state = {};  ///< [head_dim][value_dim]; initial

  /// Log decay of one token and key channel.
  double decay_of(std::int64_t t, std::int64_t d) const {
    if (decay.empty()) return 0;
    return static_cast<std::int64_t>(decay.size()) == tokens ? decay[t] : decay[t * head_dim + d];
  }
};

struct ReferenceResult {
  std::vector<double> o;           ///< [tokens][value_dim]
  std::vector<double> state = {};  ///< final
};
ReferenceResult reference_forward(const ReferenceHead& head);

/// Gradients, in the shapes of the head's members.
struct ReferenceGradients {
  std::vector<double> q, k, v, decay, beta, state;
};
ReferenceGradients reference_backward(const ReferenceHead& head, const std::vector<double>& d_o,
                                      const std::vector<double>& d_final_state);

}  // namespace tessera::recurrent
