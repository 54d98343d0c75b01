#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace tessera {

namespace {

[[maybe_unused]] constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::string reason(int error) {
  return std::generic_category().message(error);
}

/// Closes on every way out.
class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  ~Descriptor() {
    if (value_ >= 0) close(value_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int value() const { return value_; }

 private:
  int value_;
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  // O_NONBLOCK: opening a FIFO must fail below, not wait for a writer.
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  require(file.value() >= 0, "{}: cannot be opened: {}", path.string(), reason(errno));
  struct stat status {};
  require(fstat(file.value(), &status) == 0, "{}: cannot be examined: {}", path.string(), reason(errno));
  require(S_ISREG(status.st_mode), "{}: is not a regular file", path.string());
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size == 0) return;  // an empty mapping is an error for mmap, not for us
  void* address = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.value(), 0);
  require(address != MAP_FAILED, "{}: cannot be mapped ({} bytes): {}", path.string(), size, reason(errno));
#if defined(MADV_HUGEPAGE)
  // Weights are read through for every token: file systems that can then read into huge pages, which spares address
  // translations. A wish: what the system says to it does not matter.
  if (size >= kHugePage) madvise(address, size, MADV_HUGEPAGE);
#endif
  bytes_ = {static_cast<const std::byte*>(address), size};
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  // munmap wants a mutable pointer although it writes nothing.
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace tessera
