// Data that behaves like attention heads, and the error of an attention output against a reference.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/core.h"

namespace tessera {

/// What make_heads() generates. docs/data.md describes the kinds.
struct HeadOptions {
  std::string kind = "heads-llm";  ///< an archetype, a suite or "randn"; see head_kinds()
  std::int64_t batch = 1;
  std::int64_t tokens = 16384;    ///< keys and values per sequence
  std::int64_t q_tokens = 0;      ///< queries: the last q_tokens positions; 0 = tokens
  std::int64_t q_heads = 8;       ///< a multiple of kv_heads
  std::int64_t kv_heads = 8;      ///< each has its own archetype draw, keys and values; its query heads share them
  std::int64_t head_dim = 128;    ///< at least 16; the sub-spaces of the features scale with it
  std::int64_t value_dim = 0;     ///< 0 = head_dim
  std::uint64_t seed = 0;         ///< equal options give equal bytes, whatever the number of threads
  DType dtype = DType::f32;       ///< f32, bf16 or f16
  std::optional<bool> causal;     ///< absent: false for the video kinds, else true
  bool rotate = true;             ///< false keeps every feature on its own axes (min/max bounds become tight)
  std::optional<double> scatter;  ///< share of topic labels exchanged, 0..1; absent: the archetype's
  std::optional<std::int64_t> coherence;  ///< neighbouring queries that share retrieval targets
  /// Sparsity dial: the mean share of its keys that a row needs for 95 % of its softmax mass, per head. Absent: the
  /// amplitudes of the archetype.
  std::optional<double> density;
  /// Frames, height, width of the video kinds; the tokens beyond the grid are text. Absent: the largest square
  /// power-of-two frame with at least 16 frames.
  std::optional<std::array<std::int64_t, 3>> grid;
  double group_correlation = 0.8;  ///< chance that a further query head of a group shares topic and targets
  int threads = 0;                 ///< 0: OpenMP's default
};

/// Q, K, V of one attention call, contiguous [batch, heads, tokens, dim]; owns its memory.
struct HeadData {
  Problem problem;
  DType dtype = DType::f32;
  std::vector<std::byte> q_bytes;
  std::vector<std::byte> k_bytes;
  std::vector<std::byte> v_bytes;
  std::vector<std::string> archetypes;  ///< [batch * kv_heads]
  std::vector<double> temperatures;     ///< [batch * q_heads]: what the dial multiplied Q by
  std::array<std::int64_t, 3> grid{};   ///< frames, height, width of the video kinds; else 0
  std::int64_t text_tokens = 0;         ///< at the end of the video kinds

  TensorView q() const;
  TensorView k() const;
  TensorView v() const;
};

/// Names that HeadOptions::kind accepts: archetypes, then suites, then "randn".
std::vector<std::string> head_kinds();
/// Throws Error for an unknown kind (with the nearest name) and sizes out of range.
HeadData make_heads(const HeadOptions& options);

/// Distance of an attention output from a reference, rows and heads pooled. A head is compared over its flattened
/// rows; the norms below are those of all heads together.
struct OutputError {
  double rel_l1 = 0;           ///< sum|o - ref| / sum|ref|
  double rel_l2 = 0;           ///< |o - ref| / |ref|, Frobenius
  double nmse = 0;             ///< rel_l2 squared
  double rmse = 0;             ///< root of the mean squared difference
  double cosine = 1;           ///< of the flattened tensors
  double row_cosine_mean = 1;  ///< mean over rows whose reference is not zero
  double row_cosine_p1 = 1;    ///< 1st percentile: finds a few broken rows that norms hide
  double max_abs = 0;          ///< max|o - ref|
  double max_rel = 0;          ///< max|o - ref| / max|ref|
  double psnr = 0;             ///< 10 log10((max ref - min ref)^2 / mse) in dB; infinite when equal
  double softmax_mass = 1;     ///< mean of rho = exp(lse - lse_ref): recovered softmax mass of a selection
  double softmax_mass_p5 = 1;
  double softmax_mass_min = 1;
  double value_gap_mean = 0;  ///< |D - o| / |ref|, D = mean value of what was dropped; rows with rho < 1 - 1e-4
  double value_gap_p95 = 0;
  std::vector<double> head_rel_l1;  ///< [heads]
  std::vector<double> head_rel_l2;
  std::vector<double> head_softmax_mass;
};

/// Compares o [B, H, N, Dv] and lse [B, H, N] with a reference of the same shape. Both lse empty: the mass and the gap
/// keep their defaults. Throws Error when the shapes differ.
OutputError compare_outputs(const TensorView& o, std::span<const float> lse, const TensorView& reference_o,
                            std::span<const float> reference_lse);

}  // namespace tessera
