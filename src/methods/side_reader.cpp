#include "methods/side_reader.h"

#include "core/error.h"

namespace tessera {

namespace {

/// "4 or 2", or "4" when both are.
std::string either(std::int64_t a, std::int64_t b) {
  return a == b ? fmt::format("{}", a) : fmt::format("{} or {}", a, b);
}

}  // namespace

SideReader::SideReader(std::string_view method, const Problem& problem, const AttentionInputs& inputs,
                       std::int64_t first, std::int64_t tokens)
    : method_(method),
      problem_(problem),
      inputs_(inputs),
      first_(first),
      tokens_(tokens),
      batch_(problem.variable_length() ? 1 : problem.batch) {}

/// Files leave out leading axes: [B, heads, N] arrives as [1, B, heads, N].
template <class View>
View SideReader::with_all_axes(View view, std::int64_t width) const {
  if (width == 1 && view.shape[0] == 1 && view.shape[3] != 1 && view.shape[1] == batch_) {
    view.shape = {view.shape[1], view.shape[2], view.shape[3], 1};
    view.strides = {view.strides[1], view.strides[2], view.strides[3], 1};
  } else if (width == 1 && view.shape == std::array<std::int64_t, 4>{1, batch_, problem_.q_heads, 1}) {
    view.shape = {batch_, problem_.q_heads, 1, 1};
    view.strides = {view.strides[1], view.strides[2], view.strides[3], 1};
  }
  return view;
}

const TensorView* SideReader::optional_rows(std::string_view name, std::int64_t width) {
  const TensorView* given = inputs_.find_side(name);
  if (given == nullptr) return nullptr;
  TensorView view = with_all_axes(*given, width);
  const bool heads = view.heads() == problem_.q_heads || view.heads() == problem_.kv_heads;
  const bool length = view.tokens() == first_ + tokens_ || view.tokens() == tokens_;
  require(is_attention_dtype(view.dtype), "{}: side input '{}' has dtype {}; expected f32, bf16 or f16", method_, name,
          name_of(view.dtype));
  require(view.data != nullptr && view.batch() == batch_ && heads && length && view.dim() == width &&
              (view.strides[3] == 1 || width == 1),
          "{}: side input '{}' has shape [{}]; expected [{}, {}, {}, {}] (batch, heads, tokens, dim)", method_, name,
          fmt::join(given->shape, ", "), batch_, either(problem_.q_heads, problem_.kv_heads),
          either(first_ + tokens_, tokens_), width);
  if (view.tokens() != tokens_) {
    view.data = view.row(0, 0, first_);
    view.shape[2] -= first_;
  }
  return &views_.insert_or_assign(std::string(name), view).first->second;
}

const TensorView& SideReader::rows(std::string_view name, std::int64_t width) {
  const TensorView* view = optional_rows(name, width);
  require(view != nullptr,
          "{}: side input '{}' is missing; expected a tensor [{}, {}, {}, {}] (batch, heads, tokens, dim)", method_,
          name, batch_, problem_.q_heads, tokens_, width);
  return *view;
}

MutableTensorView SideReader::gradient_rows(const Gradients& gradients, std::string_view name,
                                            std::int64_t width) const {
  const MutableTensorView* wanted = gradients.find_side(name);
  return wanted == nullptr ? MutableTensorView{} : with_all_axes(*wanted, width);
}

std::vector<float> SideReader::numbers(std::string_view name, const std::array<std::int64_t, 4>& shape) const {
  const TensorView* view = inputs_.find_side(name);
  require(view != nullptr, "{}: side input '{}' is missing", method_, name);
  require(is_attention_dtype(view->dtype), "{}: side input '{}' has dtype {}; expected f32, bf16 or f16", method_, name,
          name_of(view->dtype));
  require(view->shape == shape && (view->strides[3] == 1 || shape[3] == 1),
          "{}: side input '{}' has shape [{}]; expected [{}]", method_, name, fmt::join(view->shape, ", "),
          fmt::join(shape, ", "));
  std::vector<float> values;
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    for (std::int64_t h = 0; h < shape[1]; ++h) {
      for (std::int64_t n = 0; n < shape[2]; ++n) {
        for (std::int64_t d = 0; d < shape[3]; ++d) {
          values.push_back(load_as_float(view->row(b, h, n), view->dtype, d));
        }
      }
    }
  }
  return values;
}

std::vector<float> SideReader::states(std::string_view name) const {
  return numbers(name, {problem_.batch, problem_.q_heads, problem_.head_dim, problem_.value_dim});
}

std::vector<float> SideReader::vector(std::string_view name, std::int64_t size) const {
  return numbers(name, {1, 1, 1, size});
}

std::vector<float> SideReader::per_head(std::string_view name, std::int64_t width, float fallback) const {
  if (!has(name)) return std::vector<float>(static_cast<std::size_t>(problem_.q_heads * width), fallback);
  return width == 1 ? vector(name, problem_.q_heads) : numbers(name, {1, 1, problem_.q_heads, width});
}

std::vector<float> SideReader::convolution(std::string_view name, std::int64_t heads, std::int64_t dim,
                                           std::int64_t& width) const {
  const TensorView* view = inputs_.find_side(name);
  require(view != nullptr, "{}: side input '{}' is missing", method_, name);
  width = view->tokens();
  require(width >= 1 && width <= 64, "{}: side input '{}' has shape [{}]; expected [{}, width, {}] with width 1 to 64",
          method_, name, fmt::join(view->shape, ", "), heads, dim);
  return numbers(name, {1, heads, width, dim});
}

void clear_side_gradients(std::string_view method, const AttentionInputs& inputs, const Gradients& gradients) {
  for (const SideGradient& side : gradients.side) {
    const TensorView* input = inputs.find_side(side.name);
    const MutableTensorView& view = side.view;
    require(input != nullptr, "{}: gradient of side input '{}' is wanted, which is not given", method, side.name);
    require(view.data != nullptr && is_attention_dtype(view.dtype) && view.shape == input->shape &&
                (view.strides[3] == 1 || view.shape[3] == 1),
            "{}: gradient of side input '{}' is {} [{}]; expected f32, bf16 or f16 [{}]", method, side.name,
            name_of(view.dtype), fmt::join(view.shape, ", "), fmt::join(input->shape, ", "));
    write_side_gradient(gradients, side.name, {});
  }
}

void write_side_gradient(const Gradients& gradients, std::string_view name, const std::vector<double>& values) {
  const MutableTensorView* view = gradients.find_side(name);
  if (view == nullptr || view->data == nullptr) return;
  std::size_t next = 0;
  for (std::int64_t b = 0; b < view->shape[0]; ++b) {
    for (std::int64_t h = 0; h < view->shape[1]; ++h) {
      for (std::int64_t n = 0; n < view->shape[2]; ++n) {
        for (std::int64_t d = 0; d < view->shape[3]; ++d, ++next) {
          store_from_float(view->row(b, h, n), view->dtype, d,
                           values.empty() ? 0.0F : static_cast<float>(values[next]));
        }
      }
    }
  }
}

void copy_rows(const TensorView& from, const MutableTensorView& to) {
  if (to.data == nullptr) return;
  for (std::int64_t b = 0; b < from.shape[0]; ++b) {
    for (std::int64_t h = 0; h < from.shape[1]; ++h) {
      for (std::int64_t n = 0; n < from.shape[2]; ++n) {
        for (std::int64_t d = 0; d < from.shape[3]; ++d) {
          store_from_float(to.row(b, h, n), to.dtype, d, load_as_float(from.row(b, h, n), from.dtype, d));
        }
      }
    }
  }
}

bool wants_side_gradient(const Gradients& gradients, std::string_view name) {
  const MutableTensorView* view = gradients.find_side(name);
  return view != nullptr && view->data != nullptr;
}

}  // namespace tessera
