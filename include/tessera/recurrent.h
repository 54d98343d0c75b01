// Linear attention by recurrence: S <- decay(S), optionally corrected by the delta rule, plus what a token writes;
// o = scale * S^T q. One engine serves Lightning Attention, (Gated) DeltaNet and Kimi Delta Attention.
//
// Per token, with a state S [head_dim, value_dim] of float32 per sequence and head, in this order:
//   S <- diag(exp(g)) S
//   without beta:  S <- S + k v^T
//   with beta:     S <- S + beta k (v - S^T k)^T        (delta rule: what the decayed state predicts is replaced)
//   o  = scale * S^T q                                   (the token sees itself)
// Sources: Lightning Attention-2 (arXiv:2401.04658), DeltaNet (2406.06484), Gated DeltaNet (2412.06464), Kimi Linear
// (2510.26692).
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <vector>

#include "tessera/attention.h"
#include "tessera/core.h"

namespace tessera {

/// Shapes of one call. Every state head h of `heads` reads query head h * q_heads / heads, key head
/// h * k_heads / heads and value head h * v_heads / heads: grouped values (q_heads = k_heads < heads) and shared keys
/// and values (k_heads = v_heads < heads) are both spelled this way. Decays and betas are per state head, or shared
/// likewise.
struct RecurrentProblem {
  std::int64_t batch = 1;  ///< sequences
  std::int64_t heads = 1;  ///< states per sequence, and heads of the output
  std::int64_t q_heads = 1;
  std::int64_t k_heads = 1;
  std::int64_t v_heads = 1;
  std::int64_t head_dim = 0;        ///< 1 to 1024
  std::int64_t value_dim = 0;       ///< 1 to 1024
  std::int64_t kv_len = 0;          ///< tokens per sequence, or of all sequences of a variable-length batch
  std::int64_t q_len = 0;           ///< queries per sequence (all), which belong to its last tokens
  std::optional<float> scale = {};  ///< absent: 1 / sqrt(head_dim)
  /// Queries and keys are divided by sqrt(their squared length + 1e-6) as they are read.
  bool normalise = false;
  /// Variable-length batches: sequences + 1 offsets into the token axes, as in Problem; empty for uniform batches.
  std::vector<std::int64_t> cu_seqlens_q = {};
  std::vector<std::int64_t> cu_seqlens_k = {};
  /// Tokens at the start of each sequence that its state has seen already and that are not read; empty: none.
  std::vector<std::int64_t> skip = {};

  bool variable_length() const { return !cu_seqlens_k.empty(); }
  std::int64_t state_size() const { return batch * heads * head_dim * value_dim; }
  /// Throws Error naming the field, its value and what was expected.
  void validate() const;
};

/// What a call reads; f32, bf16 or f16 each. The last stride is 1; a stride of 0 on another axis repeats.
struct RecurrentInputs {
  TensorView q = {};  ///< [B, q_heads, Nq, D]; B is 1 in variable-length batches
  TensorView k = {};  ///< [B, k_heads, N, D]; the delta rule wants rows of length 1
  TensorView v = {};  ///< [B, v_heads, N, Dv]
  TensorView decay =
      {};  ///< g, natural log, <= 0: [B, heads, N, 1] or, per key channel, [B, heads, N, D]; null: no decay
  TensorView beta = {};  ///< [B, heads, N, 1]; null: no delta rule
};

/// How the recurrence is computed. The results agree up to rounding.
enum class RecurrentForm : std::uint8_t {
  automatic,  ///< stepwise up to 8 tokens per sequence, else chunked
  chunked,    ///< matrix products over chunks of tokens (UT transform for the delta rule)
  stepwise,   ///< token by token
  reference   ///< token by token in float64
};

/// Order of the chunked form.
enum class RecurrentSchedule : std::uint8_t {
  loop,     ///< chunks in order; spare threads share the value columns
  parallel  ///< what each chunk writes first, then prefix sums of states, then all outputs; without delta rule only
};

struct RecurrentOptions {
  RecurrentForm form = RecurrentForm::automatic;
  RecurrentSchedule schedule = RecurrentSchedule::loop;
  std::int64_t chunk = 64;  ///< tokens per chunk: 16, 32, 48, ... 128
  /// Channel decays within 16 tokens: by one product around a middle row where the decays allow it in float32, else and
  /// with false always by running products.
  bool product_on_diagonal = true;
  int threads = 0;              ///< 0: OpenMP's default. Results do not depend on it
  std::optional<Isa> isa = {};  ///< absent: default_isa()
};

/// Runs the recurrence. `state` [batch, heads, D, Dv] holds the states before the first token and receives those after
/// the last; empty: they start as 0 and are dropped. `o` is [B, heads, Nq, Dv]. Throws Error when tensors do not fit,
/// or a decay is positive or NaN.
void run_recurrent(const RecurrentProblem& problem, const RecurrentInputs& inputs, std::span<float> state,
                   const MutableTensorView& o, const RecurrentOptions& options = {});

/// Floating-point operations of the products of the chunked form, triangles counted half.
double recurrent_flops(const RecurrentProblem& problem, bool delta, std::int64_t chunk);

/// Gradients to compute; a view without data is not wanted. Shapes are those of the inputs, f32, bf16 or f16.
struct RecurrentGradients {
  MutableTensorView q = {};
  MutableTensorView k = {};
  MutableTensorView v = {};
  MutableTensorView decay = {};         ///< with a decay; one place per token, also where the decay has stride 0
  MutableTensorView beta = {};          ///< with beta
  std::span<float> initial_state = {};  ///< [batch, heads, D, Dv]
};

/// Gradients of a loss from that of the outputs, `grad_o` [B, heads, Nq, Dv], and of the final states,
/// `grad_final_state` [batch, heads, D, Dv] (empty: 0). `initial_state` is what the forward call began with (empty: 0).
/// Chunked; states are computed again from checkpoints. options.form reference computes in float64, token by token.
void run_recurrent_backward(const RecurrentProblem& problem, const RecurrentInputs& inputs,
                            std::span<const float> initial_state, const TensorView& grad_o,
                            std::span<const float> grad_final_state, const RecurrentGradients& gradients,
                            const RecurrentOptions& options = {});

/// The states of sequences in a model: per layer, sequence and head a float32 matrix [head_dim, value_dim], key channel
/// first. A copy is a snapshot.
class RecurrentState {
 public:
  struct Shape {
    std::int64_t layers = 1;
    std::int64_t sequences = 1;
    std::int64_t heads = 1;
    std::int64_t head_dim = 0;
    std::int64_t value_dim = 0;
    friend bool operator==(const Shape&, const Shape&) = default;
  };

  RecurrentState() = default;
  /// All zero. Throws Error for sizes below 1 or above 2^31 elements in all.
  explicit RecurrentState(const Shape& shape);

  const Shape& shape() const { return shape_; }
  /// [sequences, heads, head_dim, value_dim] of a layer; what run_recurrent reads and writes.
  std::span<float> layer(std::int64_t layer);
  std::span<const float> layer(std::int64_t layer) const;
  /// Tokens that the states of a layer have seen, per sequence; kept by the caller.
  std::span<std::int64_t> tokens(std::int64_t layer);
  std::span<const std::int64_t> tokens(std::int64_t layer) const;
  void reset();

  /// A safetensors file with `state` f32 [layers, sequences, heads, head_dim, value_dim] and `tokens` i64 [layers,
  /// sequences].
  void save(const std::filesystem::path& path) const;
  /// Throws Error for a file that holds anything else, or values that are not finite.
  static RecurrentState load(const std::filesystem::path& path);

 private:
  Shape shape_;
  std::vector<float> values_;
  std::vector<std::int64_t> tokens_;
};

}  // namespace tessera
