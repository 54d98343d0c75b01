// Memory for packed panels and scratch: 64-byte aligned, not initialised.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace tessera::kernels {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes)
      : data_(static_cast<std::byte*>(::operator new (bytes == 0 ? alignment : bytes, std::align_val_t{alignment}))) {}
  std::byte* data() const { return data_.get(); }

 private:
  static constexpr std::size_t alignment = 64;
  struct Release {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{alignment}); }
  };
  std::unique_ptr<std::byte, Release> data_;
};

}  // namespace tessera::kernels
