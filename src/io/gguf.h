// GGUF, the file format of llama.cpp: metadata, a table of tensors, and their data. Versions 2 and 3, little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/file_bytes.h"
#include "io/ggml_blocks.h"

namespace tessera {

/// One tensor of a file.
struct GgufTensor {
  GgmlType type = GgmlType::f32;
  std::vector<std::int64_t> shape;  ///< the last axis is contiguous, as everywhere in this library
  std::size_t begin = 0;            ///< bytes from the start of the data
  std::size_t bytes = 0;

  std::int64_t elements() const;
};

/// Number types of metadata; values are those of the file format.
enum class GgufType : std::uint32_t {
  u8 = 0,
  i8 = 1,
  u16 = 2,
  i16 = 3,
  u32 = 4,
  i32 = 5,
  f32 = 6,
  boolean = 7,
  string = 8,
  array = 9,
  u64 = 10,
  i64 = 11,
  f64 = 12,
};

/// An open file. Tensors are views of its bytes; of a mapped file nothing is read until it is touched.
class GgufFile {
 public:
  /// Checks the whole header before returning: every count and length against the bytes that are left, tensors for
  /// alignment, bounds and overlap. Throws Error for a file that is truncated, lies, or holds types that cannot be
  /// read, before anything is copied. FileBytes says what `memory` and `threads` do.
  static GgufFile open(const std::filesystem::path& path, FileMemory memory = FileMemory::mapped, int threads = 0);
  /// The same for bytes held by the caller, which must outlive the result. `name` stands for them in messages.
  static GgufFile parse(std::span<const std::byte> bytes, std::string name);

  const std::string& name() const { return name_; }  ///< path, for messages
  std::size_t copied_bytes() const { return file_.copied_bytes(); }

  bool has(std::string_view key) const { return values_.find(key) != values_.end(); }
  /// The value of a key, converted. T is std::int64_t, double, bool, std::string, or a vector of std::int64_t, double,
  /// bool or std::string. Numbers convert to the types that hold them exactly; integers also to double. Throws Error
  /// naming the key and the type expected when it is missing or has another one.
  template <class T>
  T get(std::string_view key) const;
  /// The same, but nothing when the key is missing.
  template <class T>
  std::optional<T> get_optional(std::string_view key) const;
  template <class T>
  T get_or(std::string_view key, T fallback) const {
    return get_optional<T>(key).value_or(std::move(fallback));
  }
  std::vector<std::string> keys() const;  ///< sorted

  const std::map<std::string, GgufTensor, std::less<>>& tensors() const { return tensors_; }
  /// Throws Error that suggests the nearest name.
  const GgufTensor& tensor(std::string_view tensor) const;
  std::span<const std::byte> bytes(const GgufTensor& tensor) const { return data_.subspan(tensor.begin, tensor.bytes); }

 private:
  struct Value {
    GgufType type;  ///< of the value, or of the elements
    bool array;
    std::uint64_t count;
    std::span<const std::byte> bytes;
  };
  class Reader;

  static GgufFile parse(FileBytes bytes, std::string name);
  const Value* find(std::string_view key) const;

  std::string name_;
  FileBytes file_;
  std::span<const std::byte> data_;
  std::map<std::string, Value, std::less<>> values_;
  std::map<std::string, GgufTensor, std::less<>> tensors_;
};

}  // namespace tessera
