#include "score/row_probe.h"

#include <algorithm>
#include <limits>

#include "score/exponential.h"
#include "score/product.h"
#include "score/query_tiles.h"
#include "score/row_access.h"

namespace tessera::score {

namespace {

constexpr std::int64_t kPanelKeys = 1024;

/// Without known LSEs the exponentials of all rows are kept, relative to the maximum so far, up to this many.
constexpr std::int64_t kMostKept = std::int64_t{1} << 24;

/// Folds one panel of scores into a row's running maximum and sum.
void accumulate(float* row, std::int64_t count, float& maximum, float& sum) {
  const float panel_maximum = row_maximum(row, count);
  const float raised = panel_maximum > maximum ? panel_maximum : maximum;
  exponentiate(row, count, raised);
  const bool first = maximum == -std::numeric_limits<float>::infinity() && sum == 0;
  sum = (first ? 0.0F : sum * exponential(maximum - raised)) + row_sum(row, count);
  maximum = raised;
}

/// take(begin, r, probabilities, count) for the keys from `begin` on that row r sees, panel by panel; row r sees
/// visible(r) of the first `keys` keys.
template <class Visible, class Take>
void visit_probabilities(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                         std::int64_t q_head, std::int64_t first, std::int64_t rows, std::int64_t keys,
                         const Visible& visible, std::span<const float> lse, ProbeBuffers& buffers, const Take& take) {
  const std::int64_t dim = problem.head_dim;
  const std::int64_t panels = (keys + kPanelKeys - 1) / kPanelKeys;
  const bool keep = lse.empty() && rows * panels * kPanelKeys <= kMostKept;
  buffers.queries.resize(static_cast<std::size_t>(rows * dim));
  load_queries(problem, inputs, sequence, q_head, first, rows, buffers.queries.data());
  buffers.scores.resize(static_cast<std::size_t>(rows * kPanelKeys * (keep ? panels : 1)));
  buffers.maximum.assign(static_cast<std::size_t>(rows), -std::numeric_limits<float>::infinity());
  buffers.sum.assign(static_cast<std::size_t>(rows), 0.0F);
  buffers.panel_maximum.resize(static_cast<std::size_t>(keep ? rows * panels : 0));
  for (const bool second_pass : {false, true}) {
    if (!second_pass && !lse.empty()) continue;
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const std::int64_t begin = panel * kPanelKeys;
      const std::int64_t count = std::min(kPanelKeys, keys - begin);
      float* scores = buffers.scores.data() + (keep ? panel * rows * kPanelKeys : 0);
      if (!second_pass || !keep) {
        const float* key_panel =
            key_rows(problem, inputs, sequence, q_head / problem.group(), begin, count, count, buffers.keys);
        multiply_transposed(buffers.queries.data(), rows, dim, key_panel, count, dim, dim, problem.softmax_scale(),
                            scores, kPanelKeys);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t seen = std::min(count, visible(r) - begin);
        if (seen <= 0) continue;
        float* row = scores + r * kPanelKeys;
        if (!second_pass) {
          accumulate(row, seen, buffers.maximum[r], buffers.sum[r]);
          if (keep) buffers.panel_maximum[panel * rows + r] = buffers.maximum[r];
          continue;
        }
        if (!keep) exponentiate(row, seen, lse.empty() ? buffers.maximum[r] : lse[r]);
        if (lse.empty()) {
          const float raised = keep ? exponential(buffers.panel_maximum[panel * rows + r] - buffers.maximum[r]) : 1.0F;
          const float factor = raised / buffers.sum[r];
          for (std::int64_t j = 0; j < seen; ++j) row[j] *= factor;
        }
        take(begin, r, row, seen);
      }
    }
  }
}

}  // namespace

void probe_rows(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
                std::int64_t first, std::int64_t rows, bool want_offsets, LineScores& out, ProbeBuffers& buffers,
                const ProbedKeys& seen) {
  QueryTiles geometry(problem, sequence, std::max<std::int64_t>(1, rows), kPanelKeys);
  geometry.causal = geometry.causal && seen.causal;
  geometry.keys = std::min(geometry.keys, seen.limit);
  const std::int64_t first_position = geometry.offset + first;
  const std::int64_t keys = rows == 0 ? 0 : geometry.keys_visible_from(first_position + rows - 1);

  out.columns.assign(static_cast<std::size_t>(geometry.keys), 0.0F);
  out.offsets.assign(static_cast<std::size_t>(want_offsets ? std::max<std::int64_t>(0, first_position + rows) : 0),
                     0.0F);
  if (keys == 0) return;

  // Pair (r, j) lies on diagonal j - r + rows - 1: ascending in j for each row, so the inner loop is contiguous.
  buffers.diagonals.assign(static_cast<std::size_t>(want_offsets ? keys + rows : 0), 0.0F);

  const auto visible = [&](std::int64_t r) { return geometry.keys_visible_from(first_position + r); };
  visit_probabilities(problem, inputs, sequence, q_head, first, rows, keys, visible, {}, buffers,
                      [&](std::int64_t begin, std::int64_t r, const float* row, std::int64_t count) {
                        float* columns = out.columns.data() + begin;
                        for (std::int64_t j = 0; j < count; ++j) columns[j] += row[j];
                        if (!want_offsets) return;
                        float* diagonals = buffers.diagonals.data() + begin - r + rows - 1;
                        for (std::int64_t j = 0; j < count; ++j) diagonals[j] += row[j];
                      });
  // Distance o = p_r - j = first_position + r - j.
  for (std::int64_t o = 0; o < static_cast<std::int64_t>(out.offsets.size()); ++o) {
    const std::int64_t diagonal = first_position + rows - 1 - o;
    if (diagonal >= 0 && diagonal < keys + rows) out.offsets[o] = buffers.diagonals[diagonal];
  }
}

void probe_columns(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence, std::int64_t q_head,
                   std::span<const std::int64_t> visible, std::span<const float> lse, std::span<float> columns,
                   ProbeBuffers& buffers) {
  constexpr std::int64_t rows_at_once = 128;  // bounds the scores held
  const std::int64_t count = std::ssize(visible);
  for (std::int64_t first = 0; first < count; first += rows_at_once) {
    const std::int64_t rows = std::min(rows_at_once, count - first);
    const auto own = visible.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows));
    const auto own_lse =
        lse.empty() ? lse : lse.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows));
    visit_probabilities(
        problem, inputs, sequence, q_head, first, rows, *std::max_element(own.begin(), own.end()),
        [&](std::int64_t r) { return own[static_cast<std::size_t>(r)]; }, own_lse, buffers,
        [&](std::int64_t begin, std::int64_t, const float* row, std::int64_t seen) {
          float* to = columns.data() + begin;
          for (std::int64_t j = 0; j < seen; ++j) to[j] += row[j];
        });
  }
}

}  // namespace tessera::score
