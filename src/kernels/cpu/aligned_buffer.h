// Memory for packed panels and scratch: 64-byte aligned, not initialised, in huge pages where it is large.
#pragma once

#include <cstddef>
#include <memory>

namespace tessera::kernels {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes);
  std::byte* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

 private:
  struct Release {
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte, Release> data_;
  std::size_t bytes_ = 0;
};

}  // namespace tessera::kernels
