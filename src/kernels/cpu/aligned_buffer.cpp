#include "kernels/cpu/aligned_buffer.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <new>

namespace tessera::kernels {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::align_val_t alignment_of(std::size_t bytes) {
  constexpr std::size_t cache_line = 64;
  return std::align_val_t{bytes >= kHugePage ? kHugePage : cache_line};
}

}  // namespace

AlignedBuffer::AlignedBuffer(std::size_t bytes)
    : data_(static_cast<std::byte*>(::operator new(std::max<std::size_t>(1, bytes), alignment_of(bytes))),
            ReleaseAligned{alignment_of(bytes)}),
      bytes_(bytes) {
#if defined(__linux__)
  // Memory of this size is new to the process every time, and gathered rows are far apart in it: fewer page faults and
  // fewer address translations. A wish: what the system says to it does not matter.
  if (bytes >= kHugePage) madvise(data_.get(), bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

void ReleaseAligned::operator()(std::byte* p) const {
  ::operator delete(p, alignment);
}

}  // namespace tessera::kernels
