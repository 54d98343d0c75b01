// Memory of the chunked form, and the jobs of a call.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/cpu/aligned_buffer.h"
#include "recurrent/chunk.h"
#include "recurrent/reference.h"

namespace tessera::recurrent {

/// Hands out pieces of one buffer; without a buffer it only counts.
class Arena {
 public:
  Arena() = default;
  explicit Arena(std::int64_t floats) : buffer_(static_cast<std::size_t>(floats) * sizeof(float)), counting_(false) {}
  float* take(std::int64_t floats) {
    float* place = counting_ ? nullptr : reinterpret_cast<float*>(buffer_.data()) + used_;
    used_ += (floats + 15) / 16 * 16;
    return place;
  }
  std::int64_t used() const { return used_; }

 private:
  kernels::AlignedBuffer buffer_;
  bool counting_ = true;
  std::int64_t used_ = 0;
};

ChunkShape chunk_shape(const RecurrentProblem& problem, const RecurrentInputs& inputs, const RecurrentOptions& options);

inline std::int64_t state_floats(const ChunkShape& shape) {
  return shape.key_columns * shape.value_stride;
}
void place(const ChunkShape& shape, bool for_gradient, Arena& arena, Chunk& chunk);
void place(const ChunkShape& shape, Arena& arena, Scratch& scratch);
void place(const ChunkShape& shape, Arena& arena, GradientScratch& scratch);
/// `beta`: its gradient is wanted.
void place(const ChunkShape& shape, bool beta, Arena& arena, KeptChunk& kept);

/// Row and query range of a chunk of a job.
void set_range(const ChunkShape& shape, const HeadJob& job, std::int64_t index, Chunk& chunk);
inline std::int64_t chunks_of(const ChunkShape& shape, const HeadJob& job) {
  return (job.tokens + shape.chunk - 1) / shape.chunk;
}

/// [head_dim][value_dim] to and from rows of value_stride; columns and rows beyond are 0. Null reads as 0.
void load_state(const ChunkShape& shape, const float* state, float* out);
void store_state(const ChunkShape& shape, const float* state, float* out);

/// Throws Error naming the tensor unless inputs fit the problem.
void check_tensors(const RecurrentProblem& problem, const RecurrentInputs& inputs);
void check_options(const RecurrentOptions& options);
/// The same for an output [B, heads, Nq, Dv].
void check_output(const RecurrentProblem& problem, const TensorView& o, std::string_view name);
/// Throws Error naming the first decay that is positive or NaN, if there is one.
void check_decays(const RecurrentProblem& problem, const TensorView& decay);

/// Tokens that a sequence's state meets in the call, the first of them on the token axis, and the queries.
struct SequenceRange {
  std::int64_t tensor_batch = 0;
  std::int64_t first_token = 0;
  std::int64_t tokens = 0;
  std::int64_t first_query = 0;
  std::int64_t queries = 0;
};
SequenceRange range_of(const RecurrentProblem& problem, std::int64_t sequence);

/// Rows of head `head` of the `heads` states, from token `first` on.
Rows rows_of(const TensorView& view, std::int64_t heads, std::int64_t head, std::int64_t batch, std::int64_t first);
OutputRows rows_of(const MutableTensorView& view, std::int64_t heads, std::int64_t head, std::int64_t batch,
                   std::int64_t first);

/// Sequence by sequence, head by head. `state` may be empty, `o` without data.
std::vector<HeadJob> jobs_of(const RecurrentProblem& problem, const RecurrentInputs& inputs, std::span<float> state,
                             const MutableTensorView& o);
/// Indices of the jobs, most tokens first.
std::vector<std::int64_t> longest_first(const std::vector<HeadJob>& jobs);

/// Divides each row by sqrt(squared length + kLengthEpsilon); returns the factors.
std::vector<double> normalise_rows(std::vector<double>& rows, std::int64_t width);
/// A job in float64; tokens without a query have zeros.
ReferenceHead reference_head(const RecurrentProblem& problem, const HeadJob& job, const float* initial_state);
/// Form `reference` of the two public functions.
void run_reference(const RecurrentProblem& problem, const std::vector<HeadJob>& jobs, int threads);
void run_reference_backward(const RecurrentProblem& problem, const std::vector<HeadJob>& jobs,
                            const std::vector<HeadGradients>& gradients, int threads);

}  // namespace tessera::recurrent
