// Dense probabilities of a few query rows, summed along columns and diagonals.
//
// MInference (arXiv 2407.02490) probes the last 64 rows for vertical and slash lines, FlexPrefill (2502.20766) the last
// 128; the token oracle takes the rows of one query tile.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "tessera/attention.h"

namespace tessera::score {

/// Sums of P = softmax(scale * q.k) over the probed rows, causal where the problem is.
struct LineScores {
  std::vector<float> columns;  ///< [keys]: sum over rows of P[r][j]
  /// [o]: sum over rows of P[r][p_r - o], the mass at distance o before the query. Distances run from 0 to
  /// `offsets.size() - 1` = position of the last probed row; keys after the query (non-causal) are not counted.
  std::vector<float> offsets;
};

/// Which keys the probed rows see.
struct ProbedKeys {
  std::int64_t limit = std::numeric_limits<std::int64_t>::max();  ///< first keys of the sequence
  bool causal = true;  ///< false: all of them, also where the problem is causal (PBS-Attn, 2510.21270)
};

/// Working memory of one thread; reused between calls.
struct ProbeBuffers {
  std::vector<float> queries;
  std::vector<float> keys;
  std::vector<float> scores;
  std::vector<float> maximum;
  std::vector<float> sum;
  std::vector<float> panel_maximum;
  std::vector<float> diagonals;
};

/// Probes query rows [first, first + rows) of (sequence, query head). Two passes over the keys (maximum and sum, then
/// probabilities); the second one reads what the first one kept while that is 64 MiB or less. NaN scores make the
/// columns and offsets of their rows NaN.
void probe_rows(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
                std::int64_t first, std::int64_t rows, bool want_offsets, LineScores& out, ProbeBuffers& buffers,
                const ProbedKeys& seen = {});

/// Adds the same sums of columns for queries [0, visible.size()) of inputs.q, of which number r sees the first
/// visible[r] keys, whatever the problem says. `lse`: their natural log-sum-exps over those keys and perhaps others,
/// which saves a pass; empty: over those keys. `columns` has one number per key.
void probe_columns(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
                   std::span<const std::int64_t> visible, std::span<const float> lse, std::span<float> columns,
                   ProbeBuffers& buffers);

}  // namespace tessera::score
