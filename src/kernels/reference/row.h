// One row of attention, pair by pair, in float64: what the reference forward and backward passes are made of.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/key_rows.h"
#include "kernels/softmax_state.h"

namespace tessera::kernels {

/// Keys and values of one source for one (sequence, kv head).
struct ReferenceSource {
  KeyRows k;
  KeyRows v;
  const float* log_weight = nullptr;  ///< [keys]
};

/// A row of the attention matrix by its place among the queries of its plan block.
struct ReferenceRow {
  std::int64_t sequence;
  std::int64_t q_head;
  std::int64_t block;
  std::int64_t place;
  const std::vector<std::uint8_t>* skipped = nullptr;  ///< per key tile: 1 where the online skip leaves it out
};

/// One pair that the plan computes.
struct ReferencePair {
  std::uint16_t source;
  std::int64_t key;
  double score;
  double slope;  ///< derivative of the score by the product q . k
};

/// A finished row.
struct ReferenceOutput {
  std::vector<double> output;  ///< [value_dim]
  double lse;
  double maximum;  ///< of the scores, -inf without keys
};

/// Weight of a score before the division by the row's sum, and its derivatives by the score and by the row's factor.
struct ReferenceWeight {
  double weight;
  double slope;
  double by_factor;  ///< RowWeights::reweighted; else 0
};

/// For rows that are no softmax.
ReferenceWeight weight_of(const Call& call, const ReferenceRow& row, double score);

std::vector<ReferenceSource> reference_sources(const Call& call, std::int64_t sequence, std::int64_t kv_head);

/// Original index of the row's query.
std::int64_t query_of(const Call& call, const ReferenceRow& row);

/// All pairs of the row, in the order of its plan entries.
std::vector<ReferencePair> pairs_of(const Call& call, const ReferenceRow& row,
                                    const std::vector<ReferenceSource>& sources);

ReferenceOutput attend_row(const Call& call, const ReferenceRow& row, const std::vector<ReferenceSource>& sources);

}  // namespace tessera::kernels
