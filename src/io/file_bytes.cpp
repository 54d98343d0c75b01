#include "io/file_bytes.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>
#include <utility>

#include "core/error.h"
#include "core/parallel.h"

namespace tessera {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
/// What a thread reads at a time: whole huge pages, so that no two threads meet in one.
constexpr std::size_t kPiece = 4 * kHugePage;

std::string reason(int error) {
  return std::generic_category().message(error);
}

std::size_t rounded_up(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
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

/// A wish: what the system says to it does not matter.
void ask_for_huge_pages(std::span<std::byte> pages) {
#if defined(MADV_HUGEPAGE)
  if (pages.size() >= kHugePage) madvise(pages.data(), pages.size(), MADV_HUGEPAGE);
#else
  static_cast<void>(pages);
#endif
}

/// Pages of the process for `size` bytes; huge ones, from the start of one on, where there are that many. Nothing when
/// the system refuses.
std::span<std::byte> new_pages(std::size_t size) {
  const bool huge = size >= kHugePage;
  const std::size_t unit = huge ? kHugePage : static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t length = rounded_up(size, unit);
  const std::size_t reserved = huge ? length + unit : length;
  void* address = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return {};
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  const std::size_t before = rounded_up(first, unit) - first;
  auto* begin = static_cast<std::byte*>(address) + before;
  if (before > 0) munmap(address, before);
  if (reserved > before + length) munmap(begin + length, reserved - before - length);
  ask_for_huge_pages({begin, length});
  return {begin, length};
}

void read_piece(int file, std::span<std::byte> to, std::size_t offset, const std::filesystem::path& path) {
  while (!to.empty()) {
    const ssize_t count = pread(file, to.data(), to.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    require(count >= 0, "{}: cannot be read: {}", path.string(), reason(errno));
    require(count > 0, "{}: ends after {} bytes, {} before its end when it was opened", path.string(), offset,
            to.size());
    to = to.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::size_t>(count);
  }
}

}  // namespace

FileBytes::FileBytes(const std::filesystem::path& path, FileMemory memory, int threads) {
  // O_NONBLOCK: opening a FIFO must fail below, not wait for a writer.
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  require(file.value() >= 0, "{}: cannot be opened: {}", path.string(), reason(errno));
  struct stat status {};
  require(fstat(file.value(), &status) == 0, "{}: cannot be examined: {}", path.string(), reason(errno));
  require(S_ISREG(status.st_mode), "{}: is not a regular file", path.string());
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size == 0) return;  // an empty mapping is an error for mmap, not for us

  FileBytes result;  // owns the pages if reading fails
  result.size_ = size;
  result.memory_ = memory;
  if (memory == FileMemory::mapped) {
    void* address = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.value(), 0);
    require(address != MAP_FAILED, "{}: cannot be mapped ({} bytes): {}", path.string(), size, reason(errno));
    result.pages_ = {static_cast<std::byte*>(address), size};
    ask_for_huge_pages(result.pages_);  // some file systems have them
  } else {
    result.pages_ = new_pages(size);
    require(!result.pages_.empty(), "{}: there is no memory for a copy ({} bytes): {}", path.string(), size,
            reason(errno));
    const auto pieces = static_cast<std::int64_t>(rounded_up(size, kPiece) / kPiece);
    const auto team = static_cast<int>(std::min<std::int64_t>(pieces, thread_count(threads)));
    parallel_for(pieces, team, [&](std::int64_t piece, int) {
      const std::size_t first = static_cast<std::size_t>(piece) * kPiece;
      read_piece(file.value(), result.pages_.subspan(first, std::min(kPiece, size - first)), first, path);
    });
    mprotect(result.pages_.data(), result.pages_.size(), PROT_READ);  // as a mapping is
  }
  *this = std::move(result);
}

FileBytes::FileBytes(FileBytes&& other) noexcept
    : pages_(std::exchange(other.pages_, {})), size_(std::exchange(other.size_, 0)), memory_(other.memory_) {}

FileBytes& FileBytes::operator=(FileBytes&& other) noexcept {
  std::swap(pages_, other.pages_);
  std::swap(size_, other.size_);
  std::swap(memory_, other.memory_);
  return *this;
}

FileBytes::~FileBytes() {
  if (!pages_.empty()) munmap(pages_.data(), pages_.size());
}

}  // namespace tessera
