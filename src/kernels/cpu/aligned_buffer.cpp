#include "kernels/cpu/aligned_buffer.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <new>

namespace tessera::kernels {

AlignedBuffer::AlignedBuffer(std::size_t bytes) : bytes_(bytes) {
  constexpr std::size_t cache_line = 64;
  constexpr std::size_t huge_page = std::size_t{2} << 20;
  const std::size_t alignment = bytes >= huge_page ? huge_page : cache_line;
  const std::size_t whole = std::max<std::size_t>(1, (bytes + cache_line - 1) / cache_line) * cache_line;
  // Large sizes are rounded to the alignment too, as aligned_alloc() wants.
  const std::size_t size = (whole + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(alignment, size)));
  if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  // Memory of this size is new to the process every time, and gathered rows are far apart in it: fewer page faults and
  // fewer address translations.
  if (bytes >= huge_page) madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
}

void AlignedBuffer::Release::operator()(std::byte* p) const {
  std::free(p);
}

}  // namespace tessera::kernels
