// Vocabulary types shared by everything: number types, strided tensor views, errors, the attention problem.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace tessera {

/// The one exception of the library: bad input, with the argument, its value and what was expected in the message.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Element types of tensors.
enum class DType : std::uint8_t { f32, bf16, f16, f64, u8, i32, i64 };

/// Bytes of one element.
std::size_t size_of(DType dtype);
/// "f32", "bf16", ...
std::string_view name_of(DType dtype);
/// Inverse of name_of; throws Error that lists the known names.
DType dtype_from_name(std::string_view name);
/// True for f32, bf16 and f16: the types attention reads and writes.
bool is_attention_dtype(DType dtype);

/// Number conversions (round to nearest even; NaN stays NaN).
float bf16_to_float(std::uint16_t bits);
std::uint16_t float_to_bf16(float value);
float f16_to_float(std::uint16_t bits);
std::uint16_t float_to_f16(float value);

/// Order of the axes of a contiguous attention tensor: [batch, heads, tokens, dim] or [batch, tokens, heads, dim].
enum class Layout : std::uint8_t { bhnd, bnhd };

/// A read-only strided view of a [batch, heads, tokens, dim] tensor. It owns nothing.
/// Strides count elements; the last one must be 1. A [B,N,H,D] buffer is viewed by exchanging two strides.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::array<std::int64_t, 4> shape{};    ///< batch, heads, tokens, dim
  std::array<std::int64_t, 4> strides{};  ///< in elements

  std::int64_t batch() const { return shape[0]; }
  std::int64_t heads() const { return shape[1]; }
  std::int64_t tokens() const { return shape[2]; }
  std::int64_t dim() const { return shape[3]; }
  /// Address of the first element of one row.
  const std::byte* row(std::int64_t b, std::int64_t h, std::int64_t n) const {
    return static_cast<const std::byte*>(data) +
           (b * strides[0] + h * strides[1] + n * strides[2]) * static_cast<std::int64_t>(size_of(dtype));
  }
};

/// The writable counterpart of TensorView.
struct MutableTensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> strides{};

  std::byte* row(std::int64_t b, std::int64_t h, std::int64_t n) const {
    return static_cast<std::byte*>(data) +
           (b * strides[0] + h * strides[1] + n * strides[2]) * static_cast<std::int64_t>(size_of(dtype));
  }
  operator TensorView() const { return {data, dtype, shape, strides}; }  // NOLINT(google-explicit-constructor)
};

/// Views of contiguous buffers. `shape` is always given as batch, heads, tokens, dim, whatever the layout in memory.
TensorView view_of(const void* data, DType dtype, std::array<std::int64_t, 4> shape, Layout layout = Layout::bhnd);
MutableTensorView mutable_view_of(void* data, DType dtype, std::array<std::int64_t, 4> shape,
                                  Layout layout = Layout::bhnd);

/// Reads element i of a row of any attention dtype as float. For tests and slow paths.
float load_as_float(const std::byte* row, DType dtype, std::int64_t i);
/// Writes element i of a row in any attention dtype.
void store_from_float(std::byte* row, DType dtype, std::int64_t i, float value);

/// Which keys a query may see relative to its own position p: keys j with p - left <= j <= p + right.
/// -1 means unlimited on that side (FlashAttention's window semantics; causal is {-1, 0}).
struct Window {
  std::int64_t left = -1;
  std::int64_t right = -1;
  friend bool operator==(const Window&, const Window&) = default;
};

/// Tokens that lie on a grid of frames x rows x columns (T x H x W, in raster order: columns vary fastest), with text
/// tokens before and after it. Images have one frame, plain sequences one frame and one row.
struct TokenGrid {
  std::array<std::int64_t, 3> extent{1, 1, 1};  ///< frames, rows, columns
  std::int64_t prefix = 0;                      ///< text tokens before the grid
  std::int64_t suffix = 0;                      ///< text tokens after it

  /// Tokens on the grid, text left out.
  std::int64_t cells() const { return extent[0] * extent[1] * extent[2]; }
  /// All tokens: what kv_len of a sequence must be.
  std::int64_t tokens() const { return prefix + cells() + suffix; }
  friend bool operator==(const TokenGrid&, const TokenGrid&) = default;
};
/// Grid of "W", "HxW" or "TxHxW"; throws Error for anything else.
TokenGrid grid_from_text(std::string_view text);

/// Shapes and semantics of one attention call.
///
/// Uniform batches leave cu_seqlens empty. Variable-length batches pass tensors with batch 1 whose token axis holds
/// all sequences back to back; cu_seqlens_q and cu_seqlens_k (size sequences + 1, first 0, not decreasing) delimit
/// them, and `batch` is the number of sequences.
struct Problem {
  std::int64_t batch = 1;
  std::int64_t q_heads = 1;
  std::int64_t kv_heads = 1;  ///< divides q_heads; query head h reads kv head h / (q_heads / kv_heads)
  std::int64_t q_len = 0;     ///< tokens per sequence, or all query tokens of a variable-length batch
  std::int64_t kv_len = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::optional<float> scale;  ///< absent: 1 / sqrt(head_dim)
  bool causal = false;         ///< query at position p sees keys j <= p
  /// Position of the first query among the keys of its sequence. Absent: kv_len - q_len of the sequence, so that the
  /// last query sits on the last key (bottom-right alignment).
  std::optional<std::int64_t> q_offset;
  std::vector<std::int64_t> cu_seqlens_q;
  std::vector<std::int64_t> cu_seqlens_k;
  /// Where the keys of every sequence lie; queries are those tokens too (q_offset says which). Absent: a plain
  /// sequence.
  std::optional<TokenGrid> grid;

  bool variable_length() const { return !cu_seqlens_q.empty(); }
  std::int64_t group() const { return q_heads / kv_heads; }
  float softmax_scale() const;
  std::int64_t q_len_of(std::int64_t sequence) const;
  std::int64_t kv_len_of(std::int64_t sequence) const;
  /// First token of the sequence on the token axis of the tensors (0 in uniform batches).
  std::int64_t q_begin_of(std::int64_t sequence) const;
  std::int64_t kv_begin_of(std::int64_t sequence) const;
  /// Index on the batch axis of the tensors (0 in variable-length batches).
  std::int64_t tensor_batch_of(std::int64_t sequence) const { return variable_length() ? 0 : sequence; }
  /// Position of query 0 of the sequence among its keys.
  std::int64_t q_offset_of(std::int64_t sequence) const;
  /// Pairs (query, key) that the hard mask allows in one head, summed over the sequences.
  std::int64_t allowed_pairs() const;
  /// The grid, or the plain sequence as a grid of one frame and one row.
  TokenGrid grid_of(std::int64_t sequence) const;
  /// Throws Error unless sizes are positive and consistent, the scale is finite, cu_seqlens are well formed, and the
  /// grid has as many tokens as every sequence has keys.
  void validate() const;
};

/// Problem that fits these tensors (uniform batch). Throws Error where their shapes disagree.
Problem problem_of(const TensorView& q, const TensorView& k, const TensorView& v, bool causal);

}  // namespace tessera
