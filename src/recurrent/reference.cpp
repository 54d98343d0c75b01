#include "recurrent/reference.h"

#include <cmath>

namespace tessera::recurrent {

namespace {

/// What one token did to the state, kept for the way back.
struct Step {
  std::vector<double> decayed;    ///< diag(exp(g)) S
  std::vector<double> remainder;  ///< v - decayed^T k with the delta rule, else v
  std::vector<double> after;      ///< the new S
};

Step take_step(const ReferenceHead& head, std::int64_t t, const std::vector<double>& before) {
  const std::int64_t dims = head.head_dim;
  const std::int64_t width = head.value_dim;
  const double* k = head.k.data() + t * dims;
  Step step;
  step.decayed = before;
  for (std::int64_t d = 0; d < dims; ++d) {
    for (std::int64_t e = 0; e < width; ++e) step.decayed[d * width + e] *= std::exp(head.decay_of(t, d));
  }
  step.remainder.assign(head.v.begin() + t * width, head.v.begin() + (t + 1) * width);
  if (!head.beta.empty()) {
    for (std::int64_t e = 0; e < width; ++e) {
      for (std::int64_t d = 0; d < dims; ++d) step.remainder[e] -= step.decayed[d * width + e] * k[d];
    }
  }
  const double beta = head.beta.empty() ? 1.0 : head.beta[t];
  step.after = step.decayed;
  for (std::int64_t d = 0; d < dims; ++d) {
    for (std::int64_t e = 0; e < width; ++e) step.after[d * width + e] += beta * k[d] * step.remainder[e];
  }
  return step;
}

}  // namespace

ReferenceResult reference_forward(const ReferenceHead& head) {
  ReferenceResult result;
  result.o.assign(static_cast<std::size_t>(head.tokens * head.value_dim), 0.0);
  result.state = head.state;
  for (std::int64_t t = 0; t < head.tokens; ++t) {
    result.state = take_step(head, t, result.state).after;
    for (std::int64_t e = 0; e < head.value_dim; ++e) {
      for (std::int64_t d = 0; d < head.head_dim; ++d) {
        result.o[t * head.value_dim + e] +=
            head.scale * result.state[d * head.value_dim + e] * head.q[t * head.head_dim + d];
      }
    }
  }
  return result;
}

ReferenceGradients reference_backward(const ReferenceHead& head, const std::vector<double>& d_o,
                                      const std::vector<double>& d_final_state) {
  const std::int64_t dims = head.head_dim;
  const std::int64_t width = head.value_dim;
  std::vector<Step> steps;
  for (std::int64_t t = 0; t < head.tokens; ++t) {
    steps.push_back(take_step(head, t, t == 0 ? head.state : steps.back().after));
  }
  ReferenceGradients gradients;
  gradients.q.assign(head.q.size(), 0.0);
  gradients.k.assign(head.k.size(), 0.0);
  gradients.v.assign(head.v.size(), 0.0);
  gradients.decay.assign(head.decay.size(), 0.0);
  gradients.beta.assign(head.beta.size(), 0.0);
  std::vector<double> d_state = d_final_state;
  const bool delta = !head.beta.empty();
  const bool scalar = static_cast<std::int64_t>(head.decay.size()) == head.tokens;
  for (std::int64_t t = head.tokens - 1; t >= 0; --t) {
    const Step& step = steps[t];
    const double beta = delta ? head.beta[t] : 1.0;
    const double* k = head.k.data() + t * dims;
    double* d_k = gradients.k.data() + t * dims;
    std::vector<double> d_remainder(static_cast<std::size_t>(width), 0.0);
    for (std::int64_t d = 0; d < dims; ++d) {
      for (std::int64_t e = 0; e < width; ++e) {
        // o = scale * after^T q
        gradients.q[t * dims + d] += head.scale * step.after[d * width + e] * d_o[t * width + e];
        double& grad = d_state[d * width + e];
        grad += head.scale * head.q[t * dims + d] * d_o[t * width + e];
        // after = decayed + beta k remainder^T
        d_k[d] += beta * grad * step.remainder[e];
        d_remainder[e] += beta * grad * k[d];
        if (delta) gradients.beta[t] += grad * k[d] * step.remainder[e];
      }
    }
    for (std::int64_t e = 0; e < width; ++e) gradients.v[t * width + e] = d_remainder[e];
    for (std::int64_t d = 0; d < dims; ++d) {
      for (std::int64_t e = 0; e < width; ++e) {
        double& grad = d_state[d * width + e];
        if (delta) {  // remainder = v - decayed^T k
          d_k[d] -= step.decayed[d * width + e] * d_remainder[e];
          grad -= k[d] * d_remainder[e];
        }
        // decayed = exp(g) before
        if (!head.decay.empty()) {
          gradients.decay[scalar ? t : t * dims + d] += grad * step.decayed[d * width + e];
        }
        grad *= std::exp(head.decay_of(t, d));
      }
    }
  }
  gradients.state = d_state;
  return gradients;
}

}  // namespace tessera::recurrent
