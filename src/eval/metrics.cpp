#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "tessera/eval.h"

namespace tessera {
namespace {

/// Sums over elements: of one head, then of all.
struct Sums {
  double abs_difference = 0;
  double abs_reference = 0;
  double difference2 = 0;
  double reference2 = 0;
  double output2 = 0;
  double product = 0;
  double max_difference = 0;
  double max_reference = 0;
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void add(double output, double reference) {
    const double difference = std::abs(output - reference);
    abs_difference += difference;
    abs_reference += std::abs(reference);
    difference2 += difference * difference;
    reference2 += reference * reference;
    output2 += output * output;
    product += output * reference;
    // A NaN must not hide behind a maximum; std::max keeps one in its first argument.
    max_difference = std::isnan(difference) ? difference : std::max(max_difference, difference);
    max_reference = std::max(max_reference, std::abs(reference));
    low = std::min(low, reference);
    high = std::max(high, reference);
  }
  void add(const Sums& other) {
    abs_difference += other.abs_difference;
    abs_reference += other.abs_reference;
    difference2 += other.difference2;
    reference2 += other.reference2;
    output2 += other.output2;
    product += other.product;
    max_difference = std::isnan(max_difference) || std::isnan(other.max_difference)
                         ? std::numeric_limits<double>::quiet_NaN()
                         : std::max(max_difference, other.max_difference);
    max_reference = std::max(max_reference, other.max_reference);
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }
  double rel_l1() const { return ratio(abs_difference, abs_reference); }
  double rel_l2() const { return std::sqrt(ratio(difference2, reference2)); }
  double cosine() const {
    if (output2 == 0 && reference2 == 0) return 1;
    return output2 == 0 || reference2 == 0 ? 0 : product / std::sqrt(output2 * reference2);
  }
  /// 0 / 0 counts as no error.
  static double ratio(double error, double size) { return error == 0 ? 0 : error / size; }
};

/// Value below which a share p of the samples lies (nearest rank); `samples` is reordered.
double quantile(std::vector<double>& samples, double p) {
  const auto rank = static_cast<std::size_t>(p * static_cast<double>(samples.size() - 1));
  std::nth_element(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(rank), samples.end());
  return samples[rank];
}

std::string text_of(const std::array<std::int64_t, 4>& shape) {
  return fmt::format("[{}, {}, {}, {}]", shape[0], shape[1], shape[2], shape[3]);
}

double mean(std::span<const double> samples) {
  return std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size());
}

/// exp(lse - reference): 1 where the reference has nothing to recover, at most 1 (rounding may exceed it).
double recovered_mass(double lse, double reference) {
  const bool nothing = std::isinf(reference) && reference < 0;
  return nothing ? 1 : std::min(1.0, std::exp(lse - reference));
}

}  // namespace

OutputError compare_outputs(const TensorView& o, std::span<const float> lse, const TensorView& reference_o,
                            std::span<const float> reference_lse) {
  require(o.shape == reference_o.shape, "output has shape {}; the reference has {}", text_of(o.shape),
          text_of(reference_o.shape));
  require(is_attention_dtype(o.dtype) && is_attention_dtype(reference_o.dtype),
          "outputs are {} and {}; expected f32, bf16 or f16", name_of(o.dtype), name_of(reference_o.dtype));
  const std::int64_t heads = o.heads();
  const std::int64_t tokens = o.tokens();
  const std::size_t rows = o.batch() * heads * tokens;
  const bool masses = !lse.empty() || !reference_lse.empty();
  require(!masses || (lse.size() == rows && reference_lse.size() == rows), "lse has {} and {} values; expected {}",
          lse.size(), reference_lse.size(), rows);
  OutputError error;
  Sums all;
  std::vector<double> row_cosines;
  std::vector<double> row_masses;
  std::vector<double> gaps;
  for (std::int64_t h = 0; h < heads; ++h) {
    Sums head;
    double head_mass = 0;
    for (std::int64_t b = 0; b < o.batch(); ++b) {
      for (std::int64_t n = 0; n < tokens; ++n) {
        Sums row;
        for (std::int64_t c = 0; c < o.dim(); ++c) {
          row.add(load_as_float(o.row(b, h, n), o.dtype, c),
                  load_as_float(reference_o.row(b, h, n), reference_o.dtype, c));
        }
        if (row.reference2 > 0) row_cosines.push_back(row.cosine());
        if (masses) {
          const std::size_t at = (b * heads + h) * tokens + n;
          row_masses.push_back(recovered_mass(lse[at], reference_lse[at]));
          head_mass += row_masses.back();
          // O - O~ = (1 - rho) (D - O~), so the gap follows from the outputs. Near rho = 1 it would be rounding noise.
          const double lost = 1 - row_masses.back();
          if (lost > 1e-4 && row.reference2 > 0) gaps.push_back(row.rel_l2() / lost);
        }
        head.add(row);
      }
    }
    error.head_rel_l1.push_back(head.rel_l1());
    error.head_rel_l2.push_back(head.rel_l2());
    if (masses) error.head_softmax_mass.push_back(head_mass / static_cast<double>(o.batch() * tokens));
    all.add(head);
  }
  if (rows == 0 || o.dim() == 0) return error;
  const double mse = all.difference2 / static_cast<double>(rows * o.dim());
  const double range = all.high - all.low;
  error.rel_l1 = all.rel_l1();
  error.rel_l2 = all.rel_l2();
  error.nmse = error.rel_l2 * error.rel_l2;
  error.rmse = std::sqrt(mse);
  error.cosine = all.cosine();
  error.max_abs = all.max_difference;
  error.max_rel = Sums::ratio(all.max_difference, all.max_reference);
  error.psnr = 10 * std::log10(range * range / mse);
  if (mse == 0) error.psnr = std::numeric_limits<double>::infinity();
  if (!row_cosines.empty()) {
    error.row_cosine_mean = mean(row_cosines);
    error.row_cosine_p1 = quantile(row_cosines, 0.01);
  }
  if (!row_masses.empty()) {
    error.softmax_mass = mean(row_masses);
    error.softmax_mass_min = *std::min_element(row_masses.begin(), row_masses.end());
    error.softmax_mass_p5 = quantile(row_masses, 0.05);
  }
  if (!gaps.empty()) {
    error.value_gap_mean = mean(gaps);
    error.value_gap_p95 = quantile(gaps, 0.95);
  }
  return error;
}

}  // namespace tessera
