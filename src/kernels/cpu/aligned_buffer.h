// Memory for packed panels and scratch: 64-byte aligned, not initialised, in huge pages where it is large.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace tessera::kernels {

struct ReleaseAligned {
  std::align_val_t alignment{64};
  void operator()(std::byte* p) const;
};

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes);
  std::byte* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<std::byte, ReleaseAligned> data_;
  std::size_t bytes_ = 0;
};

}  // namespace tessera::kernels
