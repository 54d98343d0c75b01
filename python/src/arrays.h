// Arrays of Python (NumPy, PyTorch, anything with DLPack) as the views of the library, without a copy.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>
#include <vector>

#include "tessera/core.h"

namespace tessera::python {

namespace nb = nanobind;

/// An array that is read; a bf16 array of NumPy comes as uint16, which NumPy lacks a name for in DLPack.
using Array = nb::ndarray<nb::ro, nb::device::cpu>;
/// An array that is written.
using WritableArray = nb::ndarray<nb::device::cpu>;

/// Views of at most 4 axes; missing leading ones have size 1. Throws Error for other dtypes and ranks.
TensorView view_of(const Array& array, std::string_view name);
MutableTensorView view_of(const WritableArray& array, std::string_view name);

/// The elements of a contiguous array of that type, whatever its shape. Throws Error for any other.
template <class T>
std::span<const T> span_of(const Array& array, std::string_view name);
template <class T>
std::span<T> span_of(const WritableArray& array, std::string_view name);

/// An array of NumPy on memory that `owner` holds, read-only.
template <class T>
nb::ndarray<nb::numpy, const T> numpy_view(const T* data, std::initializer_list<std::size_t> shape, nb::handle owner) {
  static const T nothing{};  // NumPy wants an address even for no elements
  return nb::ndarray<nb::numpy, const T>(data == nullptr ? &nothing : data, shape, owner);
}

/// An array of NumPy that owns these elements.
template <class T>
nb::ndarray<nb::numpy, T> numpy_array(std::vector<T> values, std::initializer_list<std::size_t> shape) {
  auto* held = new std::vector<T>(std::move(values));  // NOLINT(cppcoreguidelines-owning-memory): the capsule frees it
  if (held->empty()) held->reserve(1);
  const nb::capsule owner(held, [](void* pointer) noexcept { delete static_cast<std::vector<T>*>(pointer); });
  return nb::ndarray<nb::numpy, T>(held->data(), shape, owner);
}

}  // namespace tessera::python
