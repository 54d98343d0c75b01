// The safetensors format: eight bytes of header length, a JSON header, then tensor data back to back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/file_bytes.h"
#include "tessera/core.h"

namespace tessera {

/// One tensor of a file.
struct TensorInfo {
  DType dtype = DType::f32;         ///< u8 for BOOL
  std::string dtype_name;           ///< as written in the file: "F32", "BF16", "BOOL", ...
  std::vector<std::int64_t> shape;  ///< empty for a scalar
  std::size_t begin = 0;            ///< bytes from the start of the data
  std::size_t end = 0;

  std::int64_t elements() const;
};

/// An open file. Tensors are views of its bytes; of a mapped file nothing is read until it is touched.
///
/// The format does not promise alignment: bytes() may start anywhere. values() gives typed access whatever the
/// alignment, copying only where it must.
class SafetensorsFile {
 public:
  /// Checks the whole header before returning. Throws Error for a file that is truncated, lies about its sizes, has an
  /// unknown dtype, overlapping tensors or holes between them, before anything is copied. FileBytes says what `memory`
  /// and `threads` do.
  static SafetensorsFile open(const std::filesystem::path& path, FileMemory memory = FileMemory::mapped,
                              int threads = 0);
  /// The same for bytes held by the caller, which must outlive the result. `name` stands for them in messages.
  static SafetensorsFile parse(std::span<const std::byte> bytes, std::string name);

  const std::string& name() const { return name_; }  ///< path, for messages
  std::size_t copied_bytes() const { return file_.copied_bytes(); }
  /// Sorted.
  std::vector<std::string> names() const;
  bool contains(std::string_view tensor) const { return tensors_.find(tensor) != tensors_.end(); }
  /// Throws Error that suggests the nearest name.
  const TensorInfo& info(std::string_view tensor) const;
  std::span<const std::byte> bytes(std::string_view tensor) const;
  const std::map<std::string, std::string, std::less<>>& metadata() const { return metadata_; }

  /// Elements of a tensor whose dtype is that of T (std::uint16_t reads bf16 and f16; std::uint64_t reads i64 as bits):
  /// the file's own memory when it is aligned for T, else a copy in `storage`. Throws Error for another dtype.
  template <class T>
  std::span<const T> values(std::string_view tensor, std::vector<T>& storage) const {
    const std::span<const std::byte> raw = checked_bytes(tensor, dtypes_of(T{}));
    const auto address = reinterpret_cast<std::uintptr_t>(raw.data());
    if (address % alignof(T) == 0) return {reinterpret_cast<const T*>(raw.data()), raw.size() / sizeof(T)};
    storage.resize(raw.size() / sizeof(T));
    std::memcpy(storage.data(), raw.data(), raw.size());
    return storage;
  }
  /// A copy of the elements.
  template <class T>
  std::vector<T> copy(std::string_view tensor) const {
    const std::span<const std::byte> raw = checked_bytes(tensor, dtypes_of(T{}));
    std::vector<T> values(raw.size() / sizeof(T));
    if (!raw.empty()) std::memcpy(values.data(), raw.data(), raw.size());
    return values;
  }

 private:
  static std::vector<DType> dtypes_of(float) { return {DType::f32}; }
  static std::vector<DType> dtypes_of(double) { return {DType::f64}; }
  static std::vector<DType> dtypes_of(std::uint8_t) { return {DType::u8}; }
  static std::vector<DType> dtypes_of(std::uint16_t) { return {DType::bf16, DType::f16}; }
  static std::vector<DType> dtypes_of(std::int32_t) { return {DType::i32}; }
  static std::vector<DType> dtypes_of(std::int64_t) { return {DType::i64}; }
  static std::vector<DType> dtypes_of(std::uint64_t) { return {DType::i64}; }
  std::span<const std::byte> checked_bytes(std::string_view tensor, const std::vector<DType>& expected) const;
  static SafetensorsFile parse(FileBytes bytes, std::string name);
  void read_header(std::span<const std::byte> bytes);

  std::string name_;
  FileBytes file_;
  std::span<const std::byte> data_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

/// What to write.
struct NamedTensor {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
};

/// A tensor of a vector or span of numbers.
template <class T>
NamedTensor named_tensor(std::string name, DType dtype, std::vector<std::int64_t> shape, std::span<const T> values) {
  return {std::move(name), dtype, std::move(shape), std::as_bytes(values)};
}

/// Writes a file whole or not at all (under a temporary name, then renamed). Tensors lie by descending element size, so
/// each is aligned for its type. Throws Error for a name given twice, bytes that do not fit the shape, and I/O errors.
void write_safetensors(const std::filesystem::path& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string, std::less<>>& metadata = {});

}  // namespace tessera
