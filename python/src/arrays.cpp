#include "arrays.h"

#include <array>

#include "core/error.h"

namespace tessera::python {

namespace {

DType dtype_of(nb::dlpack::dtype dtype, std::string_view name) {
  using Code = nb::dlpack::dtype_code;
  const auto code = static_cast<Code>(dtype.code);
  const int bits = dtype.lanes == 1 ? dtype.bits : 0;
  if (code == Code::Float && bits == 32) return DType::f32;
  if (code == Code::Float && bits == 16) return DType::f16;
  if (code == Code::Float && bits == 64) return DType::f64;
  if (code == Code::Bfloat && bits == 16) return DType::bf16;
  if (code == Code::UInt && bits == 16) return DType::bf16;
  if (code == Code::UInt && bits == 8) return DType::u8;
  if (code == Code::Int && bits == 32) return DType::i32;
  if (code == Code::Int && bits == 64) return DType::i64;
  fail("{} has a dtype of code {} and {} bits; expected f32, bf16 or f16", name, dtype.code, dtype.bits);
}

template <class View, class Source>
View view_as(const Source& array, std::string_view name) {
  require(array.ndim() <= 4, "{} has {} axes; expected at most 4", name, array.ndim());
  View view;
  view.data = array.data();
  view.dtype = dtype_of(array.dtype(), name);
  view.shape = {1, 1, 1, 1};
  view.strides = {0, 0, 0, 1};
  const std::size_t missing = 4 - array.ndim();
  std::int64_t step = 1;
  for (std::size_t axis = array.ndim(); axis-- > 0;) {
    view.shape[missing + axis] = static_cast<std::int64_t>(array.shape(axis));
    // Strides that nobody follows are whatever the maker of the array liked.
    view.strides[missing + axis] = array.shape(axis) == 1 || array.size() == 0 ? step : array.stride(axis);
    step = view.strides[missing + axis] * view.shape[missing + axis];
  }
  return view;
}

template <class T, class Source>
auto* elements_of(const Source& array, std::string_view name) {
  require(array.dtype() == nb::dtype<T>(), "{} has a dtype of code {} and {} bits; expected code {} and {} bits", name,
          array.dtype().code, array.dtype().bits, nb::dtype<T>().code, nb::dtype<T>().bits);
  std::int64_t step = 1;
  for (std::size_t axis = array.ndim(); axis-- > 0;) {
    require(array.size() == 0 || array.shape(axis) == 1 || array.stride(axis) == step, "{} is not contiguous", name);
    step *= static_cast<std::int64_t>(array.shape(axis));
  }
  return array.data();
}

}  // namespace

TensorView view_of(const Array& array, std::string_view name) {
  return view_as<TensorView>(array, name);
}
MutableTensorView view_of(const WritableArray& array, std::string_view name) {
  return view_as<MutableTensorView>(array, name);
}

template <class T>
std::span<const T> span_of(const Array& array, std::string_view name) {
  return {static_cast<const T*>(elements_of<T>(array, name)), array.size()};
}
template <class T>
std::span<T> span_of(const WritableArray& array, std::string_view name) {
  return {static_cast<T*>(elements_of<T>(array, name)), array.size()};
}

template std::span<const float> span_of(const Array&, std::string_view);
template std::span<const std::int32_t> span_of(const Array&, std::string_view);
template std::span<const std::uint8_t> span_of(const Array&, std::string_view);
template std::span<float> span_of(const WritableArray&, std::string_view);

}  // namespace tessera::python
