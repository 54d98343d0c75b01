// What the drivers and the kernel text of the recurrence share: one (sequence, state head), and the buffers of a chunk.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "recurrent/tile_states.h"
#include "tessera/recurrent.h"

namespace tessera::recurrent {

/// Tokens whose decays are referred to one row: within a sub-chunk products of decays run row by row.
inline constexpr std::int64_t kSubChunk = 16;

/// Added to squared lengths of queries and keys before the root.
inline constexpr double kLengthEpsilon = 1e-6;

/// Rows of a tensor, one per token.
struct Rows {
  const std::byte* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride = 0;  ///< in bytes

  const std::byte* row(std::int64_t t) const { return data + t * stride; }
};

/// Writable rows; without data nothing is written.
struct OutputRows {
  std::byte* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride = 0;

  std::byte* row(std::int64_t t) const { return data + t * stride; }
};

/// One (sequence, state head). Row 0 is the first token that is read; row 0 of q and o the first query.
struct HeadJob {
  Rows q;
  Rows k;
  Rows v;
  Rows decay;
  Rows beta;
  std::int64_t decay_width = 0;  ///< 1 or head_dim
  OutputRows o;
  std::int64_t tokens = 0;
  std::int64_t queries = 0;  ///< of the last tokens
  float* state = nullptr;    ///< [head_dim][value_dim]; null: starts as 0 and is dropped
  std::int64_t first_query() const { return tokens - queries; }
};

/// Gradients of one (sequence, state head), beside its HeadJob.
struct HeadGradients {
  Rows o;                                   ///< of the outputs
  const float* final_state = nullptr;       ///< of the final state; null: 0
  const float* initial_state_of = nullptr;  ///< the initial state itself; null: 0
  OutputRows q;
  OutputRows k;
  OutputRows v;
  OutputRows decay;
  OutputRows beta;
  float* initial_state = nullptr;  ///< written; null: not wanted
};

enum class DecayKind : std::uint8_t { none, scalar, channel };

/// What a chunk is prepared for.
enum class Purpose : std::uint8_t {
  outputs,   ///< outputs and exit state
  states,    ///< exit state alone
  gradient,  ///< gradients, after `states`
};

/// What holds for every chunk of a call. Matrices have rows of a whole number of 16 floats; an odd number, so that
/// walking down a column does not fall into few cache sets.
struct ChunkShape {
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t key_columns = 0;    ///< head_dim rounded up to 16
  std::int64_t value_columns = 0;  ///< value_dim rounded up to 16
  std::int64_t key_stride = 0;
  std::int64_t value_stride = 0;
  std::int64_t pair_stride = 0;
  std::int64_t chunk = 0;
  float scale = 1;
  DecayKind decay = DecayKind::none;
  bool delta = false;
  bool normalise = false;
  bool product_on_diagonal = true;
};

/// A prepared chunk: everything that does not depend on the state, as far as the purpose needs it. G is the sum of log
/// decays from the chunk's start to a row, itself included; G_C that of the whole chunk.
struct Chunk {
  std::int64_t first = 0;        ///< token
  std::int64_t rows = 0;         ///< tokens
  std::int64_t first_query = 0;  ///< row; equal to rows: the chunk has none
  float* q;                      ///< [chunk][key_stride] scale * q; not for states
  float* k;                      ///< [chunk][key_stride]
  float* q_start;                ///< q * exp(G); not for states
  float* k_start;                ///< k * exp(G); delta only
  float* k_end;                  ///< k * exp(G_C - G); not for gradients through scalar decays
  float* total;                  ///< [key_columns] exp(G_C)
  float* scores;                 ///< A [chunk][pair_stride]: q_i . k_j decayed, j <= i, else 0; not for states
  float* overlap;                ///< P: k_i . k_j decayed, j < i, else 0; delta only, not for gradients
  float* inverse;                ///< (I + diag(beta) P)^-1; delta only, not for gradients
  float* beta;                   ///< [chunk]
  float* q_length;               ///< [chunk] what queries were multiplied by to have length 1; with normalise
  float* k_length;
  float* factor;      ///< exp(g): [chunk][key_stride], or [chunk] for scalar decays
  float* pair_decay;  ///< scalar decays: exp(G_i - G_j), [chunk][pair_stride]
  float* start;       ///< exp(G), shaped as `factor`; for gradients only
  float* end;         ///< exp(G_C - G), likewise
};

/// What the pass over the states leaves for the gradient of a chunk.
struct KeptChunk {
  float* entry;       ///< state [head_dim][value_stride]
  float* inverse;     ///< of the chunk; delta only
  float* corrected;   ///< VN [chunk][value_stride]; delta only
  float* unweighted;  ///< V - KG S - P VN, of which VN is diag(beta) times; null: no gradient of beta is wanted
};

/// Memory that is wanted soon: products ask for a few lines of it with every tile, so that it is in L2 when its turn
/// comes.
class Ahead {
 public:
  void clear() { count_ = at_ = 0; }
  /// `rows` rows of `bytes`; what does not fit the list is left out.
  void add(const void* data, std::int64_t stride, std::int64_t bytes, std::int64_t rows) {
    if (data == nullptr || rows <= 0 || bytes <= 0 || count_ == max_ranges) return;
    ranges_[count_++] = {static_cast<const std::byte*>(data), stride, bytes, rows};
  }
  void add(const float* data, std::int64_t floats) {
    add(data, 0, floats * static_cast<std::int64_t>(sizeof(float)), 1);
  }
  void step() {
    for (int line = 0; line < lines_per_step && at_ < count_; ++line) {
      Range& range = ranges_[at_];
      __builtin_prefetch(range.data + range.offset, 0, 2);
      range.offset += 64;
      if (range.offset < range.bytes) continue;
      range.offset = 0;
      range.data += range.stride;
      if (--range.rows == 0) ++at_;
    }
  }

 private:
  struct Range {
    const std::byte* data = nullptr;
    std::int64_t stride = 0;
    std::int64_t bytes = 0;
    std::int64_t rows = 0;
    std::int64_t offset = 0;
  };
  static constexpr int max_ranges = 12;
  static constexpr int lines_per_step = 24;
  std::array<Range, max_ranges> ranges_;
  std::size_t count_ = 0;
  std::size_t at_ = 0;
};

/// Scratch of one thread.
struct Scratch {
  float* panels;     ///< transposed matrices: panels of 16 columns
  float* left;       ///< [2 * kSubChunk][key_stride]
  float* keys;       ///< [chunk][key_stride]
  float* values;     ///< [chunk][value_stride]
  float* corrected;  ///< [chunk][value_stride]: VN
  float* output;     ///< [chunk][value_stride]
  float* state;      ///< [head_dim][value_stride]
  float bad_decay;   ///< not 0: a decay was positive or NaN
  Ahead ahead;       ///< filled by the driver
};

/// Further scratch of the backward pass.
struct GradientScratch {
  float* state;        ///< gradient of the chunk's exit state [head_dim][value_stride]; becomes that of its entry state
  float* d_output;     ///< [chunk][value_stride]
  float* d_corrected;  ///< [chunk][value_stride]
  float* d_values;     ///< [chunk][value_stride]
  float* d_scores;     ///< [chunk][pair_stride]
  float* d_overlap;    ///< [chunk][pair_stride]
  float* d_q;          ///< [chunk][key_stride], of the scaled queries
  float* d_k_plus;     ///< the part of dK in which G of the row enters with a plus
  float* d_k_minus;
  float* d_k_end;
  float* reach;    ///< [chunk][key_stride]
  float* product;  ///< [chunk][key_stride]
  float* d_beta;   ///< [chunk]
};

/// The kernel text of one instruction set. Every function runs on one thread.
struct LevelKernels {
  /// Fills `chunk` (first, rows, first_query are set) from the job.
  void (*prepare)(const ChunkShape& shape, const HeadJob& job, Purpose purpose, Chunk& chunk, Scratch& scratch);
  /// Outputs of the chunk, for value columns [first, last), multiples of 16. `state` [head_dim][value_stride] goes from
  /// that of the chunk's entry to that of its exit.
  void (*advance)(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, float* state,
                  std::int64_t first_column, std::int64_t last_column, Scratch& scratch);
  /// The exit state alone, and what `kept` has room for beside its entry state; null: nothing. `entry` and `exit` may
  /// be the same; without exit that state is not computed.
  void (*pass)(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, const float* entry, float* exit,
               const KeptChunk* kept, Scratch& scratch);
  /// What the chunk adds to the state, [head_dim][value_stride]; without delta rule.
  void (*write)(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, float* added, Scratch& scratch);
  /// Outputs of the chunk alone; without delta rule.
  void (*read)(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, const float* entry, Scratch& scratch);
  /// All tokens one by one, for value columns [first, last); `state` is [head_dim][value_dim].
  void (*step)(const ChunkShape& shape, const HeadJob& job, float* state, std::int64_t first_column,
               std::int64_t last_column, Scratch& scratch);
  /// Gradients of the chunk's inputs, and from the gradient of its exit state that of its entry state.
  void (*backward)(const ChunkShape& shape, const HeadJob& job, const HeadGradients& gradients, const Chunk& chunk,
                   const KeptChunk& kept, Scratch& scratch, GradientScratch& gradient);
  TileStateKernels tiles;
};

const LevelKernels& level_portable();
const LevelKernels& level_avx2();
const LevelKernels& level_avx512();
const LevelKernels& level_neon();
/// The table for an instruction set; bf16 dot products are not used, because states and decays are float32.
const LevelKernels& level_of(Isa isa);

}  // namespace tessera::recurrent
