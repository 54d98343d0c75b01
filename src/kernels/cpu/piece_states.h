// Softmax states of the pieces that compressed tokens are cut into, and their merge in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tessera::kernels {

/// Maximum in powers of 2, sum, and output not divided by it, for each row of each piece.
class PieceStates {
 public:
  PieceStates(std::int64_t pieces, std::int64_t rows, std::int64_t columns);

  float* maximum(std::int64_t piece) { return maximum_.data() + piece * rows_; }
  float* sum(std::int64_t piece) { return sum_.data() + piece * rows_; }
  float* output(std::int64_t piece) { return output_.data() + piece * rows_ * columns_; }
  /// o [rows][value_dim] and natural-log LSE [rows] over pieces [first, last); 0 and -inf without any.
  void merge(std::int64_t first, std::int64_t last, std::int64_t value_dim, float* o, float* lse) const;

 private:
  std::int64_t rows_;
  std::int64_t columns_;
  std::vector<float> maximum_;
  std::vector<float> sum_;
  std::vector<float> output_;
};

/// Merges the pieces of every head, which lie together and say their `head`: o [heads][rows][value_dim], LSE alike.
template <class Piece>
void merge_heads(const PieceStates& states, const std::vector<Piece>& pieces, std::int64_t heads, std::int64_t rows,
                 std::int64_t value_dim, float* o, float* lse) {
  std::int64_t first = 0;
  for (std::int64_t head = 0; head < heads; ++head) {
    std::int64_t last = first;
    while (last < std::ssize(pieces) && pieces[static_cast<std::size_t>(last)].head == static_cast<std::size_t>(head)) {
      ++last;
    }
    states.merge(first, last, value_dim, o + head * rows * value_dim, lse + head * rows);
    first = last;
  }
}

/// Columns of an output row: kernels of compressed tokens write 64 at a time.
constexpr std::int64_t output_columns(std::int64_t value_dim) {
  return (value_dim + 63) / 64 * 64;
}
/// Floats from one query row of the quantised kernel to the next: zeros behind head_dim.
constexpr std::int64_t quantized_query_stride(std::int64_t head_dim) {
  return (head_dim + 63) / 64 * 64;
}
/// What a thread of that kernel needs: three floats and twelve digits per channel.
constexpr std::size_t quantized_scratch_bytes(std::int64_t head_dim) {
  return static_cast<std::size_t>(quantized_query_stride(head_dim)) * (3 * sizeof(float) + 12);
}
/// Queries in powers of 2, so that the kernels' exponentials need no factor; each row filled up with zeros to `stride`.
std::vector<float> scaled_queries(const float* queries, std::int64_t rows, std::int64_t head_dim, std::int64_t stride,
                                  float scale);

}  // namespace tessera::kernels
