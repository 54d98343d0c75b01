// Side inputs of recurrent methods: checked, and cut to the tokens that a call adds.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/attention.h"
#include "tessera/gradient.h"

namespace tessera {

/// Reads the side inputs of one call for the tokens that it adds. Throws Error naming the method, the tensor and the
/// expected shape.
class SideReader {
 public:
  /// Tokens [first, first + tokens) of `all` on the axis of the keys.
  SideReader(std::string_view method, const Problem& problem, const AttentionInputs& inputs, std::int64_t first,
             std::int64_t tokens);

  std::int64_t batch() const { return batch_; }
  std::int64_t tokens() const { return tokens_; }
  /// [B, heads, N, width] with q_heads or kv_heads; for width 1 also [B, heads, N]. N is the keys of the call or the
  /// added ones. Null if absent.
  const TensorView* optional_rows(std::string_view name, std::int64_t width);
  const TensorView& rows(std::string_view name, std::int64_t width);
  /// Where the gradient of rows(name, width) goes, on the same axes: null data where it is not wanted. Only for calls
  /// that add all keys.
  MutableTensorView gradient_rows(const Gradients& gradients, std::string_view name, std::int64_t width) const;
  /// [q_heads, ...] numbers per head, e.g. [q_heads, head_dim]; with the shape as text. `fallback` where it is absent.
  std::vector<float> per_head(std::string_view name, std::int64_t width, float fallback) const;
  std::vector<float> vector(std::string_view name, std::int64_t size) const;
  /// [sequences, q_heads, head_dim, value_dim].
  std::vector<float> states(std::string_view name) const;
  bool has(std::string_view name) const { return inputs_.find_side(name) != nullptr; }
  /// Weights [heads, width, dim] of a convolution; the width is returned.
  std::vector<float> convolution(std::string_view name, std::int64_t heads, std::int64_t dim,
                                 std::int64_t& width) const;

 private:
  template <class View>
  View with_all_axes(View view, std::int64_t width) const;
  std::vector<float> numbers(std::string_view name, const std::array<std::int64_t, 4>& shape) const;

  std::string_view method_;
  const Problem& problem_;
  const AttentionInputs& inputs_;
  std::int64_t first_;
  std::int64_t tokens_;
  std::int64_t batch_;
  std::map<std::string, TensorView, std::less<>> views_;
};

/// Throws Error unless every gradient that is wanted of a side input fits one that is given; sets all of them to 0.
void clear_side_gradients(std::string_view method, const AttentionInputs& inputs, const Gradients& gradients);
/// Writes numbers in the order of the tensor's axes where they are wanted.
void write_side_gradient(const Gradients& gradients, std::string_view name, const std::vector<double>& values);
/// Rounds a tensor into one of the same shape; does nothing without data.
void copy_rows(const TensorView& from, const MutableTensorView& to);
/// Whether the gradient of that side input is wanted.
bool wants_side_gradient(const Gradients& gradients, std::string_view name);

}  // namespace tessera
