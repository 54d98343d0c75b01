// Output files that appear whole or not at all.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace tessera {

/// Writes beside the target under a temporary name; commit() moves the result into place. Without commit() nothing is
/// left behind. Targets that are not regular files (pipes, /dev/stdout) are written directly.
class AtomicFile {
 public:
  /// Throws Error when the file cannot be created.
  explicit AtomicFile(const std::filesystem::path& path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// Throws Error when the data did not reach the file.
  void commit();

 private:
  std::filesystem::path target_;
  std::filesystem::path temporary_;  ///< equals target_ when written directly
  int descriptor_ = -1;
};

}  // namespace tessera
