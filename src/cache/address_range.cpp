#include "cache/address_range.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace tessera {

namespace {

std::size_t round_up(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

AddressRange::AddressRange(std::size_t bytes) : size_(round_up(bytes)) {
  if (size_ == 0) return;
  void* address = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(address != MAP_FAILED, "cannot reserve {} bytes of addresses: {}", size_,
          std::generic_category().message(errno));
  data_ = static_cast<std::byte*>(address);
}

AddressRange::AddressRange(AddressRange&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      committed_(std::exchange(other.committed_, 0)) {}

AddressRange& AddressRange::operator=(AddressRange&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(committed_, other.committed_);
  return *this;
}

AddressRange::~AddressRange() {
  if (data_ != nullptr) munmap(data_, size_);
}

void AddressRange::commit(std::size_t bytes) {
  assert(bytes <= size_);
  const std::size_t wanted = std::min(round_up(bytes), size_);
  if (wanted <= committed_) return;
  require(mprotect(data_ + committed_, wanted - committed_, PROT_READ | PROT_WRITE) == 0,
          "cannot allocate {} bytes: {}", wanted - committed_, std::generic_category().message(errno));
  committed_ = wanted;
}

void AddressRange::release() {
  if (committed_ == 0) return;
  // A fresh mapping over the old one: drops the pages and their share of the commit limit at once.
  void* address = mmap(data_, committed_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  require(address != MAP_FAILED, "cannot release {} bytes: {}", committed_, std::generic_category().message(errno));
  committed_ = 0;
}

}  // namespace tessera
