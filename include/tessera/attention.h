// Running a plan: O and LSE from Q, K, V.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/core.h"
#include "tessera/plan.h"

namespace tessera {

/// How the scores of a row become weights. The output is the weighted sum of the values divided by the sum of the
/// weights, and LSE the natural logarithm of that sum.
enum class RowWeights : std::uint8_t {
  softmax,    ///< exp(s)
  softplus,   ///< log(1 + exp(s)): LSSA (arXiv:2501.13428)
  reweighted  ///< max(0, factor of the row * log(1 + exp(s)) - offset)^power: the second pass of LSSAR (same paper)
};
std::string_view name_of(RowWeights weights);

/// Changes to scores and softmax. Defaults change nothing. The order is: s = scale * q.k; * query scale; softcap;
/// + ALiBi; + key bias; + log-weight of the key source; weights of the row, the sink logit in their sum.
struct Modifiers {
  std::span<const float> query_scale = {};   ///< [Nq as tokens]: s *= scale of the query, of either sign; empty = off
  float softcap = 0;                         ///< s <- softcap * tanh(s / softcap); 0 = off
  std::span<const float> alibi_slopes = {};  ///< [q_heads]: s += slope * (key position - query position); empty = off
  std::span<const float> sink_logits = {};   ///< [q_heads]: exp(sink) joins the denominator and the LSE; empty = off
  TensorView key_bias = {};                  ///< f32 [B or 1, q_heads, kv_heads or 1, Nk as tokens, 1]; data null = off

  RowWeights weights = RowWeights::softmax;    ///< others allow neither sink logits nor log-weights
  std::span<const float> weight_factors = {};  ///< for RowWeights::reweighted, one per row in the order of the LSE
  float weight_offset = 0;
  std::int32_t weight_power = 1;  ///< 1..64

  bool changes_scores() const {
    return softcap != 0 || !alibi_slopes.empty() || key_bias.data != nullptr || !query_scale.empty() ||
           weights != RowWeights::softmax;
  }
};

/// Table of fixed-size pages for keys and values: token t of sequence b lies in page table[b * pages_per_sequence +
/// t / page_size]. The k and v views then have shape [pages, kv_heads, page_size, dim].
struct PageTable {
  std::span<const std::int32_t> table;  ///< [batch, pages_per_sequence]
  std::int64_t pages_per_sequence = 0;
  std::int64_t page_size = 0;  ///< tokens; a multiple of 16
  bool used() const { return page_size != 0; }
};

/// Keys and values of a derived source (Plan::sources[i], i >= 1) with one log-weight per key.
struct KeySource {
  TensorView k;                       ///< [batch, kv_heads, keys, head_dim]
  TensorView v;                       ///< [batch, kv_heads, keys, value_dim]
  std::span<const float> log_weight;  ///< [batch, kv_heads, keys]; empty = all 0
};

/// A further tensor that a method reads beside q, k, v: gates, decays, learned weights. The method documents the names
/// it knows, their shapes and which of them it needs.
struct SideTensor {
  std::string name;
  TensorView view;
};

/// What one attention call reads.
struct AttentionInputs {
  TensorView q;  ///< [B, Hq, Nq, D]
  TensorView k;  ///< [B, Hkv, Nk, D], or pages
  TensorView v;  ///< [B, Hkv, Nk, Dv], or pages
  PageTable pages;
  std::vector<KeySource> sources;  ///< sources[i] belongs to Plan::sources[i + 1]
  Modifiers modifiers;
  std::vector<SideTensor> side;

  /// The side tensor of that name, or null.
  const TensorView* find_side(std::string_view name) const {
    for (const SideTensor& tensor : side) {
      if (tensor.name == name) return &tensor.view;
    }
    return nullptr;
  }
};

/// Where it writes. Rows that select no key yield output 0 and LSE -inf.
struct AttentionOutputs {
  MutableTensorView o;  ///< [B, Hq, Nq, Dv] in f32, bf16 or f16
  /// Natural-log log-sum-exp: [B, Hq, Nq], in variable-length batches [Hq, total queries]; empty = not wanted.
  std::span<float> lse;
  /// By-product, f32 [B, Hq, Nq, Nk] of a uniform batch: what the softmax sees of each computed pair of source 0
  /// (scaled, after all modifiers, natural units). Pairs that the plan leaves out or masks are left as they are.
  /// Written by the split-key and the reference kernel; data null = not wanted.
  MutableTensorView scores = {};
  /// By-product, as many as lse: the largest score of each row (scaled, after all modifiers, natural units, without the
  /// sink logit; NaN scores do not count), so that exp(lse - row_maximum) is the sum of its online softmax. -inf where
  /// no key is computed. Softmax weights only. Written by the query-major and the reference kernel; empty = not wanted.
  std::span<float> row_maximum = {};
  /// By-product, f32 [B, Hq, query tiles, key tiles] of a uniform batch: the largest probability exp(score - lse) among
  /// the computed pairs of source 0 in a query tile of the plan x a key tile of Plan::tile_k; 0 where none is computed.
  /// Softmax weights and plans without query order only; same kernels; data null = not wanted.
  MutableTensorView tile_maximum = {};
};

/// Instruction sets with their own build of the kernel text.
enum class Isa : std::uint8_t { portable, avx2, avx512, avx512_bf16, neon };
std::string_view name_of(Isa isa);
/// Throws Error that lists the known names.
Isa isa_from_name(std::string_view name);
/// Sets this machine can run, ascending.
std::vector<Isa> supported_isas();
/// The best of them, or the one that the environment variable TESSERA_ISA names (Error if it cannot run here).
Isa default_isa();

/// Which kernel runs a plan. `automatic` chooses by the plan's shape.
enum class KernelKind : std::uint8_t { automatic, reference, query_major, key_major, split_key };
std::string_view name_of(KernelKind kind);

/// Memory that calls of run() use again: fresh memory costs a call as much as packing its keys does. Grows to what the
/// largest call needed and is freed with the object. One call at a time.
class Workspace {
 public:
  Workspace();
  ~Workspace();
  Workspace(Workspace&& other) noexcept;
  Workspace& operator=(Workspace&& other) noexcept;

  struct Memory;
  Memory& memory() { return *memory_; }

 private:
  std::unique_ptr<Memory> memory_;
};

/// Skips exponentials and P V of key tiles whose scores turn out too low, while the plan runs (SpargeAttn,
/// arXiv:2502.18137). Rows of a query tile are taken `rows` at a time; a key tile is left out for such a group, from
/// numerator and denominator, when none of its rows has a score there above its maximum over the tiles before minus
/// `distance`. Tiles under a mask and the tile of the sequence's last key are never left out, nor are NaN scores. The
/// result depends on the order of the plan's entries and on `rows`.
struct OnlineSkip {
  float distance = 0;     ///< lambda, in powers of 2 (scores times log2 e); 0 = off
  std::int64_t rows = 0;  ///< a power of 2, at most 128

  bool used() const { return distance > 0; }
};

struct RunOptions {
  KernelKind kernel = KernelKind::automatic;
  std::optional<Isa> isa;                               ///< absent: default_isa()
  int threads = 0;                                      ///< 0: OpenMP's default
  std::size_t workspace_bytes = std::size_t{48} << 20;  ///< bound on packed keys and values held at once
  Workspace* workspace = nullptr;                       ///< memory to use again; null: allocated and freed by the call
  /// Needs softmax weights and a plan of whole key tiles in natural order, 16 to 128 keys high by powers of 2. Run by
  /// the query-major and the reference kernel.
  OnlineSkip online_skip = {};
};

/// What happened, for reports.
struct RunReport {
  KernelKind kernel = KernelKind::automatic;
  Isa isa = Isa::portable;
  int threads = 0;
  std::size_t workspace_bytes = 0;  ///< packed keys and values plus the scratch of all threads
  double plan_ms = 0;               ///< wall time of choosing the plan; filled by Method::attend
  double kernel_ms = 0;             ///< wall time of running it; filled by run()
  double flops = 0;                 ///< arithmetic of a method without plan; 0: it follows from the plan
  std::int64_t skipped_pairs = 0;   ///< planned pairs that the online skip left out
};

/// Runs a plan. Throws Error when the tensors do not fit the plan's problem. Results do not depend on the number of
/// threads. float32 accumulation and softmax state; see docs/architecture.md for the kernels.
RunReport run(const Plan& plan, const AttentionInputs& inputs, const AttentionOutputs& outputs,
              const RunOptions& options = {});

/// Throws Error naming the argument unless tensors and modifiers fit the problem (shapes, dtypes, unit last stride).
void check_inputs(const Problem& problem, const AttentionInputs& inputs);

}  // namespace tessera
