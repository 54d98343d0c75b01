// What a Workspace holds: buffers that calls borrow and give back.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/cpu/aligned_buffer.h"
#include "tessera/attention.h"

namespace tessera {

struct Workspace::Memory {
  std::vector<kernels::AlignedBuffer> spare;
};

namespace kernels {

/// A buffer for the time of a call, from the workspace if there is one.
class BorrowedBuffer {
 public:
  BorrowedBuffer() = default;
  BorrowedBuffer(Workspace* workspace, std::size_t bytes);
  ~BorrowedBuffer();
  BorrowedBuffer(BorrowedBuffer&& other) noexcept;
  BorrowedBuffer& operator=(BorrowedBuffer&& other) noexcept;
  std::byte* data() const { return buffer_.data(); }

 private:
  Workspace* workspace_ = nullptr;
  AlignedBuffer buffer_;
};

}  // namespace kernels
}  // namespace tessera
