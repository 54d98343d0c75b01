// A range of addresses whose memory comes and goes: a buffer that grows without moving.
#pragma once

#include <cstddef>

namespace tessera {

/// Reserves addresses only; commit() backs a prefix of them with zeroed memory.
class AddressRange {
 public:
  AddressRange() = default;
  /// Throws Error when the system has no such range.
  explicit AddressRange(std::size_t bytes);
  AddressRange(AddressRange&& other) noexcept;
  AddressRange& operator=(AddressRange&& other) noexcept;
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;
  ~AddressRange();

  std::byte* data() const { return data_; }
  /// Makes at least the first `bytes` bytes readable and writable. Throws Error when memory is refused.
  void commit(std::size_t bytes);
  /// Returns the memory beyond the first `bytes` bytes (rounded up to whole pages) to the system; the addresses stay
  /// reserved, and memory committed there again is zeroed.
  void shrink(std::size_t bytes);
  /// Returns all memory.
  void release() { shrink(0); }

 private:
  void prefer_huge_pages() const;

  std::size_t page_ = 1;          ///< commits come in multiples of it
  std::byte* mapping_ = nullptr;  ///< what was reserved; data_ lies in it on a page boundary
  std::size_t reserved_ = 0;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t committed_ = 0;
};

}  // namespace tessera
