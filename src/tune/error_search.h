// Searches for the parameters of one head under a bound on its output error, as SALE (arXiv:2505.24179) and SpargeAttn
// (arXiv:2502.18137) calibrate: halving and bisection of what makes a method sparser.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "io/json.h"
#include "tessera/attention.h"
#include "tune/capture.h"

namespace tessera::tune {

/// What a method did to one head.
struct HeadOutcome {
  double l1 = 0;        ///< sum|O - O of dense| over tokens and value channels
  double rel_l1 = 0;    ///< the same over sum|O of dense|
  double sparsity = 0;  ///< share of the allowed pairs that were not computed, skipped ones included
};

/// One query head of a layer with its dense output.
class HeadTrial {
 public:
  HeadTrial(const LayerTensors& tensors, std::int64_t q_head, const RunOptions& options);

  std::int64_t tokens() const { return problem_.q_len; }
  /// Runs a method of these parameters on the head.
  HeadOutcome run(std::string_view method, const Json& parameters) const;

 private:
  Problem problem_;
  AttentionInputs inputs_;
  RunOptions options_;
  std::vector<float> dense_;
};

/// The smallest value in [low, high] that is accepted, within `tolerance`, where accepted values have only accepted
/// ones above them: bisection that looks at `start` first. `high` is taken to be accepted.
double least_accepted(double low, double high, double start, double tolerance,
                      const std::function<bool(double)>& accept);

/// SALE: `start`, halved until it is accepted; 0 when it falls below `least` first.
double halve_until(double start, double least, const std::function<bool(double)>& accept);

/// Parameters of one head of SpargeAttn that met its bounds.
struct SpargePoint {
  double theta = 1;
  double cdf = 1;
  double lambda = 50;
  double sparsity = 0;
};

/// One point of the points found for a head over several inputs: thetas are put in bins of `width` from -1 on, the bin
/// with the largest sum of sparsities wins (ties: the lower one) and gives its maxima. Points whose mean sparsity is at
/// most `least_sparsity`, or none, make the head dense: theta and cdf 1.
SpargePoint merge_points(std::span<const SpargePoint> points, double width, double least_sparsity);

}  // namespace tessera::tune
