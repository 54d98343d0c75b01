#include "eval/selectors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "eval/matrix.h"
#include "eval/sparsity_dial.h"

namespace tessera::eval {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kRowStep = 4;  // per-row statistics look at every fourth row of a sampled tile

std::vector<float> rows_as_float(const TensorView& view, std::int64_t head, std::int64_t rows) {
  std::vector<float> out(rows * view.dim());
  for (std::int64_t r = 0; r < rows; ++r) {
    to_float(view.row(0, head, r), view.dtype, view.dim(), out.data() + r * view.dim());
  }
  return out;
}

/// Indices of the `count` largest scores; equal scores by index.
std::vector<std::int64_t> top_indices(std::span<const float> scores, std::int64_t count) {
  std::vector<std::int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto better = [&](std::int64_t a, std::int64_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  };
  count = std::min<std::int64_t>(count, std::ssize(order));
  std::nth_element(order.begin(), order.begin() + count, order.end(), better);
  order.resize(count);
  return order;
}

std::int64_t share_of(std::int64_t count, double share) {
  return std::max<std::int64_t>(1, std::llround(share * static_cast<double>(count)));
}

/// Everything about the head that all sampled tiles read.
class Evaluation {
 public:
  Evaluation(const Problem& problem, const TensorView& q, const TensorView& k, const TensorView& v, std::int64_t q_head,
             const SelectorOptions& options);
  SelectorReport tile_report(std::int64_t query_tile) const;
  std::int64_t tiles() const { return n_ / t_; }

 private:
  /// Logits of query rows [first, first + t) against keys [0, columns): [t, columns].
  std::vector<float> logits(std::int64_t first, std::int64_t columns) const;
  /// Softmax of the rows in place, keys after the query's position at 0.
  void softmax(std::span<float> rows, std::int64_t first, std::int64_t columns) const;
  void transpose_keys();
  void bound_pages();
  void probe_lines();
  std::vector<float> pooled_scores(std::int64_t query_tile, std::int64_t tiles) const;
  std::vector<float> antidiagonal_scores(std::span<const float> logits, std::int64_t first, std::int64_t columns) const;
  double line_mass(std::span<const float> probabilities, std::int64_t first, std::int64_t columns) const;
  double page_mass(std::span<const float> probabilities, std::int64_t first, std::int64_t columns) const;
  double output_rel_l1(std::span<const float> probabilities, std::int64_t columns,
                       std::span<const std::int64_t> chosen) const;

  const SelectorOptions& options_;
  bool causal_;
  std::int64_t t_;
  std::int64_t d_;
  std::int64_t dv_;
  std::int64_t n_;
  float scale_;
  std::vector<float> q_, k_, v_;
  std::vector<float> key_columns_;   // [tiles, d, t], scaled
  std::vector<float> page_bounds_;   // [2 d, pages]: maxima, then minima, scaled
  std::vector<float> column_score_;  // [n], from the probe rows
  std::vector<float> offset_score_;  // [2 n - 1]: query - key + n - 1
};

Evaluation::Evaluation(const Problem& problem, const TensorView& q, const TensorView& k, const TensorView& v,
                       std::int64_t q_head, const SelectorOptions& options)
    : options_(options),
      causal_(problem.causal),
      t_(options.tile),
      d_(problem.head_dim),
      dv_(problem.value_dim),
      n_(problem.kv_len - problem.kv_len % options.tile),
      scale_(problem.softmax_scale()) {
  const std::int64_t kv_head = q_head / problem.group();
  q_ = rows_as_float(q, q_head, n_);
  k_ = rows_as_float(k, kv_head, n_);
  v_ = rows_as_float(v, kv_head, n_);
  transpose_keys();
  bound_pages();
  probe_lines();
}

void Evaluation::transpose_keys() {
  key_columns_.resize(n_ * d_);
  for (std::int64_t j = 0; j < n_; ++j) {
    float* tile = key_columns_.data() + j / t_ * t_ * d_;
    for (std::int64_t c = 0; c < d_; ++c) tile[c * t_ + j % t_] = k_[j * d_ + c] * scale_;
  }
}

void Evaluation::bound_pages() {
  const std::int64_t pages = n_ / options_.page;
  page_bounds_.resize(2 * d_ * pages);
  for (std::int64_t page = 0; page < pages; ++page) {
    for (std::int64_t c = 0; c < d_; ++c) {
      float high = kNever;
      float low = -kNever;
      for (std::int64_t j = page * options_.page; j < (page + 1) * options_.page; ++j) {
        high = std::max(high, k_[j * d_ + c] * scale_);
        low = std::min(low, k_[j * d_ + c] * scale_);
      }
      page_bounds_[c * pages + page] = high;
      page_bounds_[(d_ + c) * pages + page] = low;
    }
  }
}

std::vector<float> Evaluation::logits(std::int64_t first, std::int64_t columns) const {
  std::vector<float> out(t_ * columns);
  for (std::int64_t j = 0; j < columns; j += t_) {
    multiply_rows(q_.data() + first * d_, t_, d_, key_columns_.data() + j * d_, t_, out.data() + j, columns);
  }
  return out;
}

void Evaluation::softmax(std::span<float> rows, std::int64_t first, std::int64_t columns) const {
  for (std::int64_t r = 0; r < t_; ++r) {
    const std::span<float> row = rows.subspan(r * columns, columns);
    const std::int64_t visible = causal_ ? first + r + 1 : columns;
    const float top = *std::max_element(row.begin(), row.begin() + visible);
    double sum = 0;
    for (std::int64_t j = 0; j < visible; ++j) sum += row[j] = std::exp(row[j] - top);
    const auto factor = static_cast<float>(1 / sum);
    for (std::int64_t j = 0; j < visible; ++j) row[j] *= factor;
    std::fill(row.begin() + visible, row.end(), 0.0F);
  }
}

void Evaluation::probe_lines() {
  column_score_.assign(n_, 0.0F);
  offset_score_.assign(2 * n_ - 1, 0.0F);
  const std::int64_t probe_tiles = std::max<std::int64_t>(1, options_.probe_rows / t_);
  for (std::int64_t tile = tiles() - probe_tiles; tile < tiles(); ++tile) {
    std::vector<float> rows = logits(tile * t_, n_);
    softmax(rows, tile * t_, n_);
    for (std::int64_t r = 0; r < t_; ++r) {
      for (std::int64_t j = 0; j < n_; ++j) {
        column_score_[j] += rows[r * n_ + j];
        offset_score_[tile * t_ + r - j + n_ - 1] += rows[r * n_ + j];
      }
    }
  }
}

std::vector<float> Evaluation::pooled_scores(std::int64_t query_tile, std::int64_t tiles) const {
  std::vector<double> mean_query(d_, 0.0);
  for (std::int64_t r = 0; r < t_; ++r) {
    for (std::int64_t c = 0; c < d_; ++c) mean_query[c] += q_[(query_tile * t_ + r) * d_ + c];
  }
  std::vector<float> scores(tiles);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    double sum = 0;
    for (std::int64_t j = tile * t_; j < (tile + 1) * t_; ++j) {
      for (std::int64_t c = 0; c < d_; ++c) sum += mean_query[c] * k_[j * d_ + c];
    }
    scores[tile] = static_cast<float>(sum * scale_ / static_cast<double>(t_ * t_));
  }
  return scores;
}

std::vector<float> Evaluation::antidiagonal_scores(std::span<const float> logits, std::int64_t first,
                                                   std::int64_t columns) const {
  const std::int64_t s = options_.antidiagonal_stride;
  const std::int64_t groups = columns / s;
  std::vector<float> scores(columns / t_, 0.0F);
  std::vector<double> row(groups);
  for (std::int64_t g = 0; g < t_ / s; ++g) {
    const std::int64_t visible = causal_ ? first / s + g + 1 : groups;
    for (std::int64_t key_group = 0; key_group < visible; ++key_group) {
      double sum = 0;
      for (std::int64_t i = 0; i < s; ++i) sum += logits[(g * s + s - 1 - i) * columns + key_group * s + i];
      row[key_group] = sum / static_cast<double>(s);
    }
    const double top = *std::max_element(row.begin(), row.begin() + visible);
    double total = 0;
    for (std::int64_t key_group = 0; key_group < visible; ++key_group) total += std::exp(row[key_group] - top);
    for (std::int64_t key_group = 0; key_group < visible; ++key_group) {
      scores[key_group * s / t_] += static_cast<float>(std::exp(row[key_group] - top) / total);
    }
  }
  return scores;
}

double Evaluation::line_mass(std::span<const float> probabilities, std::int64_t first, std::int64_t columns) const {
  const std::int64_t half = share_of(columns, options_.budget / 2);
  std::vector<char> column_kept(n_, 0);
  for (const std::int64_t j : top_indices({column_score_.data(), static_cast<std::size_t>(columns)}, half)) {
    column_kept[j] = 1;
  }
  // Causal rows only meet offsets 0 .. columns - 1; the others meet all.
  const std::int64_t from = causal_ ? n_ - 1 : 0;
  const std::int64_t offsets = causal_ ? columns : 2 * n_ - 1;
  std::vector<char> offset_kept(2 * n_ - 1, 0);
  for (const std::int64_t o : top_indices({offset_score_.data() + from, static_cast<std::size_t>(offsets)}, half)) {
    offset_kept[from + o] = 1;
  }
  double mass = 0;
  for (std::int64_t r = 0; r < t_; ++r) {
    for (std::int64_t j = 0; j < columns; ++j) {
      if (column_kept[j] || offset_kept[first + r - j + n_ - 1]) mass += probabilities[r * columns + j];
    }
  }
  return mass / static_cast<double>(t_);
}

double Evaluation::page_mass(std::span<const float> probabilities, std::int64_t first, std::int64_t columns) const {
  const std::int64_t p = options_.page;
  const std::int64_t pages = n_ / p;
  std::vector<float> split(t_ * 2 * d_);
  for (std::int64_t r = 0; r < t_; ++r) {
    for (std::int64_t c = 0; c < d_; ++c) {
      const float value = q_[(first + r) * d_ + c];
      split[r * 2 * d_ + c] = std::max(value, 0.0F);
      split[r * 2 * d_ + d_ + c] = std::min(value, 0.0F);
    }
  }
  std::vector<float> bounds(t_ * pages);
  multiply_rows(split.data(), t_, 2 * d_, page_bounds_.data(), pages, bounds.data(), pages);
  double mass = 0;
  for (std::int64_t r = 0; r < t_; ++r) {
    const std::int64_t own = (first + r) / p;
    const std::int64_t visible = causal_ ? own + 1 : pages;
    const std::span<float> row(bounds.data() + r * pages, visible);
    row[0] = row[own] = -kNever;
    for (const std::int64_t page : top_indices(row, share_of(visible, options_.budget))) {
      for (std::int64_t j = page * p; j < (page + 1) * p; ++j) mass += probabilities[r * columns + j];
    }
  }
  return mass / static_cast<double>(t_);
}

double Evaluation::output_rel_l1(std::span<const float> probabilities, std::int64_t columns,
                                 std::span<const std::int64_t> chosen) const {
  std::vector<char> tile_kept(columns / t_, 0);
  for (const std::int64_t tile : chosen) tile_kept[tile] = 1;
  const std::int64_t sampled = t_ / kRowStep;
  std::vector<float> weights(2 * sampled * columns, 0.0F);  // all of the sampled rows, then their kept part
  std::vector<double> kept_mass(sampled, 0.0);
  for (std::int64_t r = 0; r < sampled; ++r) {
    const float* row = probabilities.data() + r * kRowStep * columns;
    std::copy_n(row, columns, weights.data() + r * columns);
    for (std::int64_t j = 0; j < columns; ++j) {
      if (tile_kept[j / t_]) kept_mass[r] += weights[(sampled + r) * columns + j] = row[j];
    }
  }
  std::vector<float> o(2 * sampled * dv_);
  multiply_rows(weights.data(), 2 * sampled, columns, v_.data(), dv_, o.data(), dv_);
  double difference = 0;
  double size = 0;
  for (std::int64_t r = 0; r < sampled; ++r) {
    for (std::int64_t c = 0; c < dv_; ++c) {
      const double dense = o[r * dv_ + c];
      const double kept = kept_mass[r] > 0 ? o[(sampled + r) * dv_ + c] / kept_mass[r] : 0;
      difference += std::abs(kept - dense);
      size += std::abs(dense);
    }
  }
  return difference / size;
}

SelectorReport Evaluation::tile_report(std::int64_t query_tile) const {
  const std::int64_t first = query_tile * t_;
  const std::int64_t columns = causal_ ? first + t_ : n_;
  const std::int64_t tiles = columns / t_;
  std::vector<float> rows = logits(first, columns);
  const std::vector<float> antidiagonal = antidiagonal_scores(rows, first, columns);
  softmax(rows, first, columns);

  std::vector<float> mass(tiles, 0.0F);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    double sum = 0;
    for (std::int64_t r = 0; r < t_; ++r) {
      for (std::int64_t j = tile * t_; j < (tile + 1) * t_; ++j) sum += rows[r * columns + j];
    }
    mass[tile] = static_cast<float>(sum / static_cast<double>(t_));
  }
  const std::int64_t budget = share_of(tiles, options_.budget);
  const auto sum_of = [&](std::span<const std::int64_t> chosen) {
    double sum = 0;
    for (const std::int64_t tile : chosen) sum += mass[tile];
    return sum;
  };
  const auto choose = [&](std::vector<float> scores) {
    scores[0] = scores[query_tile] = -kNever;
    return top_indices(scores, budget);
  };

  SelectorReport report;
  report.oracle_tiles = sum_of(top_indices(mass, budget));
  std::vector<float> nearness(tiles);
  for (std::int64_t tile = 0; tile < tiles; ++tile) nearness[tile] = static_cast<float>(-std::abs(query_tile - tile));
  report.window = sum_of(choose(nearness));
  report.pooled = sum_of(choose(pooled_scores(query_tile, tiles)));
  const std::vector<std::int64_t> antidiagonal_tiles = choose(antidiagonal);
  report.antidiagonal = sum_of(antidiagonal_tiles);
  report.antidiagonal_rel_l1 = output_rel_l1(rows, columns, antidiagonal_tiles);
  const double forced = mass[0] + (query_tile == 0 ? 0 : mass[query_tile]);
  report.random_tiles = forced + (1 - forced) * static_cast<double>(std::max<std::int64_t>(budget - 2, 0)) /
                                     static_cast<double>(tiles - 2);
  report.vertical_slash = line_mass(rows, first, columns);
  report.page_bound = page_mass(rows, first, columns);

  std::sort(mass.begin(), mass.end(), std::greater<>());
  double sum = 0;
  std::int64_t needed = 0;
  while (needed < tiles && sum < 0.95) sum += mass[needed++];
  report.tiles_for_95 = static_cast<double>(needed) / static_cast<double>(tiles);
  double sampled = 0;
  for (std::int64_t r = 0; r < t_; r += kRowStep) {
    const std::int64_t visible = causal_ ? first + r + 1 : columns;
    const auto row = rows.begin() + r * columns;
    std::sort(row, row + visible, std::greater<>());
    double row_mass = 0;
    std::int64_t tokens = 0;
    while (tokens < visible && row_mass < 0.95) row_mass += row[tokens++];
    report.tokens_for_95 += static_cast<double>(tokens) / static_cast<double>(visible);
    report.oracle_tokens += std::accumulate(row, row + share_of(visible, options_.budget), 0.0);
    sampled += 1;
  }
  report.tokens_for_95 /= sampled;
  report.oracle_tokens /= sampled;
  return report;
}

}  // namespace

SelectorReport evaluate_selectors(const Problem& problem, const TensorView& q, const TensorView& k, const TensorView& v,
                                  std::int64_t q_head, const SelectorOptions& options) {
  require(options.tile > 0 && options.page > 0 && options.antidiagonal_stride > 0 && options.query_tiles > 0,
          "tile, page, antidiagonal_stride and query_tiles must be positive");
  require(options.budget > 0 && options.budget <= 1, "budget is {}; expected above 0, at most 1", options.budget);
  require(options.tile % options.page == 0 && options.tile % options.antidiagonal_stride == 0,
          "tile is {}; expected a multiple of page {} and antidiagonal_stride {}", options.tile, options.page,
          options.antidiagonal_stride);
  require(problem.q_len == problem.kv_len && problem.kv_len >= 4 * options.tile && !problem.variable_length(),
          "problem has {} queries and {} keys; expected as many of both, at least {}", problem.q_len, problem.kv_len,
          4 * options.tile);
  require(q_head >= 0 && q_head < problem.q_heads, "q_head is {}; expected 0 to {}", q_head, problem.q_heads - 1);
  const Evaluation evaluation(problem, q, k, v, q_head, options);
  // Early rows are dense by nature: begin where the budget holds the two tiles that are always kept.
  const auto two_tiles = static_cast<std::int64_t>(std::ceil(2 / options.budget));
  const std::int64_t begin = problem.causal ? std::clamp<std::int64_t>(two_tiles, 3, evaluation.tiles() - 1) : 0;
  const std::int64_t available = evaluation.tiles() - begin;
  const std::int64_t count = std::min(options.query_tiles, available);
  std::vector<SelectorReport> reports(count);
  parallel_for(count, options.threads, [&](std::int64_t i, int) {
    // Later tiles see more keys: they go first.
    const std::int64_t sample = count - 1 - i;
    reports[sample] = evaluation.tile_report(begin + (2 * sample + 1) * available / (2 * count));
  });
  SelectorReport total;
  for (const auto field :
       {&SelectorReport::tokens_for_95, &SelectorReport::tiles_for_95, &SelectorReport::oracle_tokens,
        &SelectorReport::oracle_tiles, &SelectorReport::window, &SelectorReport::vertical_slash,
        &SelectorReport::pooled, &SelectorReport::antidiagonal, &SelectorReport::random_tiles,
        &SelectorReport::page_bound, &SelectorReport::antidiagonal_rel_l1}) {
    for (const SelectorReport& report : reports) total.*field += report.*field / static_cast<double>(count);
  }
  return total;
}

}  // namespace tessera::eval
