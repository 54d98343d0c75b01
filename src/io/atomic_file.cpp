#include "io/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace tessera {

namespace {

std::string reason(int error) {
  return std::generic_category().message(error);
}

/// A name beside the target that no other thread or process uses.
std::filesystem::path temporary_beside(const std::filesystem::path& target) {
  static std::atomic<unsigned> counter{0};
  return target.string() + fmt::format(".{}-{}.part", getpid(), counter.fetch_add(1));
}

}  // namespace

AtomicFile::AtomicFile(const std::filesystem::path& path) : target_(path), temporary_(path) {
  std::error_code ignored;
  const auto status = std::filesystem::status(path, ignored);
  const bool direct = std::filesystem::exists(status) && !std::filesystem::is_regular_file(status);
  if (direct) {
    descriptor_ = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  } else {
    // A link stays a link: its target is replaced.
    if (std::filesystem::is_symlink(std::filesystem::symlink_status(path, ignored))) {
      target_ = std::filesystem::weakly_canonical(path, ignored);
    }
    temporary_ = temporary_beside(target_);
    descriptor_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  }
  require(descriptor_ >= 0, "{}: cannot be written: {}", path.string(), reason(errno));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  close(descriptor_);
  if (temporary_ != target_) unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    require(written >= 0, "{}: writing failed: {}", target_.string(), reason(errno));
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::write(std::string_view text) {
  write(std::as_bytes(std::span(text)));
}

void AtomicFile::commit() {
  const bool direct = temporary_ == target_;
  const bool closed = close(std::exchange(descriptor_, -1)) == 0;
  if (closed && (direct || rename(temporary_.c_str(), target_.c_str()) == 0)) return;
  const int error = errno;
  if (!direct) unlink(temporary_.c_str());
  fail("{}: writing failed: {}", target_.string(), reason(error));
}

}  // namespace tessera
