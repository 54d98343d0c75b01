#include "cache/address_range.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstdint>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace tessera {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// Ranges from this size on are backed by huge pages where the system has them: decoding reads rows all over the cache,
// and with small pages every row would need an address translation of its own. Costs up to one huge page per range.
constexpr std::size_t kLargeRange = std::size_t{64} << 20;

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

AddressRange::AddressRange(std::size_t bytes)
    : page_(bytes >= kLargeRange ? kHugePage : static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
      size_(round_up(bytes, page_)) {
  if (size_ == 0) return;
  // Room to begin on a page boundary of either kind.
  reserved_ = size_ + (page_ == kHugePage ? kHugePage : 0);
  void* address = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(address != MAP_FAILED, "cannot reserve {} bytes of addresses: {}", size_,
          std::generic_category().message(errno));
  mapping_ = static_cast<std::byte*>(address);
  const auto place = reinterpret_cast<std::uintptr_t>(address);
  data_ = mapping_ + (round_up(place, page_) - place);
  prefer_huge_pages();
}

/// A wish: what the system says to it does not matter.
void AddressRange::prefer_huge_pages() const {
#if defined(MADV_HUGEPAGE)
  if (page_ == kHugePage) madvise(data_, size_, MADV_HUGEPAGE);
#endif
}

AddressRange::AddressRange(AddressRange&& other) noexcept
    : page_(std::exchange(other.page_, 1)),
      mapping_(std::exchange(other.mapping_, nullptr)),
      reserved_(std::exchange(other.reserved_, 0)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      committed_(std::exchange(other.committed_, 0)) {}

AddressRange& AddressRange::operator=(AddressRange&& other) noexcept {
  std::swap(page_, other.page_);
  std::swap(mapping_, other.mapping_);
  std::swap(reserved_, other.reserved_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(committed_, other.committed_);
  return *this;
}

AddressRange::~AddressRange() {
  if (mapping_ != nullptr) munmap(mapping_, reserved_);
}

void AddressRange::commit(std::size_t bytes) {
  assert(bytes <= size_);
  const std::size_t wanted = std::min(round_up(bytes, page_), size_);
  if (wanted <= committed_) return;
  require(mprotect(data_ + committed_, wanted - committed_, PROT_READ | PROT_WRITE) == 0,
          "cannot allocate {} bytes: {}", wanted - committed_, std::generic_category().message(errno));
  committed_ = wanted;
}

void AddressRange::shrink(std::size_t bytes) {
  const std::size_t kept = round_up(bytes, page_);
  if (kept >= committed_) return;
  // A fresh mapping over the old one: drops the pages and their share of the commit limit at once.
  void* address =
      mmap(data_ + kept, committed_ - kept, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  require(address != MAP_FAILED, "cannot release {} bytes: {}", committed_ - kept,
          std::generic_category().message(errno));
  committed_ = kept;
  prefer_huge_pages();
}

}  // namespace tessera
