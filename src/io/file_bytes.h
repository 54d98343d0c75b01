// A whole file as read-only memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

namespace tessera {

/// How the bytes of a file come into memory.
enum class FileMemory : std::uint8_t {
  mapped,  ///< pages of the file, read when touched: opening is cheap whatever the size, and processes share them
  copied,  ///< read at once into memory of this process, in huge pages where the system gives them
};

/// The bytes of a regular file. As with every mapping, a mapped file that another process truncates meanwhile ends this
/// one with SIGBUS; a copied one is refused if that happens while it is read, and is independent of the file
/// afterwards.
class FileBytes {
 public:
  FileBytes() = default;
  /// So many `threads` copy, 0: all. Throws Error when the path cannot be opened, is not a regular file, cannot be
  /// mapped or read, or when there is no memory for a copy.
  explicit FileBytes(const std::filesystem::path& path, FileMemory memory = FileMemory::mapped, int threads = 0);
  FileBytes(FileBytes&& other) noexcept;
  FileBytes& operator=(FileBytes&& other) noexcept;
  FileBytes(const FileBytes&) = delete;
  FileBytes& operator=(const FileBytes&) = delete;
  ~FileBytes();

  /// Page-aligned; valid as long as this object, also after it is moved.
  std::span<const std::byte> bytes() const { return pages_.first(size_); }
  /// Memory of this process that a copy takes; 0 for a mapped file.
  std::size_t copied_bytes() const { return memory_ == FileMemory::copied ? pages_.size() : 0; }

 private:
  std::span<std::byte> pages_;
  std::size_t size_ = 0;  ///< of the file
  FileMemory memory_ = FileMemory::mapped;
};

}  // namespace tessera
