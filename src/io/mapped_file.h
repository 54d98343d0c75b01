// A whole file as read-only memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace tessera {

/// Maps a regular file. Pages are read when touched, so opening is cheap whatever the size. As with every mapping, a
/// file that another process truncates meanwhile ends this one with SIGBUS.
class MappedFile {
 public:
  MappedFile() = default;
  /// Throws Error when the path cannot be opened, is not a regular file or cannot be mapped.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  /// Page-aligned; valid as long as this object, also after it is moved.
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace tessera
