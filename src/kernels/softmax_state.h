// The state of an online softmax and its one merge rule. Everything that splits a row of attention reuses it.
#pragma once

#include <cmath>
#include <limits>

namespace tessera::kernels {

/// Row maximum and sum of exp(score - maximum), natural base. The output that goes with it is not divided by the sum.
template <class Real>
struct SoftmaxState {
  Real maximum = -std::numeric_limits<Real>::infinity();
  Real sum = 0;

  /// Factor by which sums and outputs gathered under `maximum` shrink when the maximum becomes `raised`. An empty
  /// state has maximum -inf: its factor is 0, not exp(-inf + inf) = NaN.
  static Real rescale(Real maximum, Real raised) {
    return maximum == -std::numeric_limits<Real>::infinity() ? Real{0} : std::exp(maximum - raised);
  }

  /// Adds one score; returns the factor for what was gathered before, and sets `weight` to the score's own weight.
  Real add(Real score, Real& weight) {
    Real factor = 1;
    if (score > maximum) {
      factor = rescale(maximum, score);
      sum *= factor;
      maximum = score;
    }
    weight =
        maximum == -std::numeric_limits<Real>::infinity() && !std::isnan(score) ? Real{0} : std::exp(score - maximum);
    sum += weight;
    return factor;
  }

  /// Joins another state. Outputs combine as mine * own_factor + other's * other_factor.
  void merge(const SoftmaxState& other, Real& own_factor, Real& other_factor) {
    const Real raised = maximum > other.maximum ? maximum : other.maximum;
    own_factor = rescale(maximum, raised);
    other_factor = rescale(other.maximum, raised);
    sum = sum * own_factor + other.sum * other_factor;
    maximum = raised;
  }

  /// Natural-log log-sum-exp; -inf for an empty state.
  Real log_sum_exp() const { return sum == 0 ? -std::numeric_limits<Real>::infinity() : maximum + std::log(sum); }
};

}  // namespace tessera::kernels
