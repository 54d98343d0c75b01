#include "support/input_file.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <span>

#include "core/error.h"

namespace tessera::cli {

InputFile::InputFile(const std::string& path) : file_(SafetensorsFile::open(path)) {
  inputs_.q = attention_tensor("q");
  inputs_.k = attention_tensor("k");
  inputs_.v = attention_tensor("v");
  for (const std::string& name : file_.names()) {
    const TensorInfo& info = file_.info(name);
    if (name == "q" || name == "k" || name == "v") continue;
    if (!is_attention_dtype(info.dtype) || info.shape.size() > 4) continue;
    inputs_.side.push_back({name, view(name)});
  }
}

/// A view of a tensor with at most 4 axes, missing ones in front.
TensorView InputFile::view(const std::string& name) {
  const TensorInfo& info = file_.info(name);
  require(std::find(info.shape.begin(), info.shape.end(), 0) == info.shape.end(),
          "{}: tensor '{}' has shape [{}]; expected 1 or more on every axis", file_.name(), name,
          fmt::join(info.shape, ", "));
  std::span<const std::byte> bytes = file_.bytes(name);
  if (reinterpret_cast<std::uintptr_t>(bytes.data()) % size_of(info.dtype) != 0) {
    bytes = storage_.emplace_back(bytes.begin(), bytes.end());
  }
  std::array<std::int64_t, 4> shape{1, 1, 1, 1};
  std::copy_backward(info.shape.begin(), info.shape.end(), shape.end());
  return view_of(bytes.data(), info.dtype, shape);
}

TensorView InputFile::attention_tensor(const std::string& name) {
  const TensorInfo& info = file_.info(name);
  require(is_attention_dtype(info.dtype), "{}: tensor '{}' has dtype {}; expected F32, BF16 or F16", file_.name(), name,
          info.dtype_name);
  require(info.shape.size() == 4, "{}: tensor '{}' has shape [{}]; expected 4 axes: batch, heads, tokens, dim",
          file_.name(), name, fmt::join(info.shape, ", "));
  return view(name);
}

}  // namespace tessera::cli
