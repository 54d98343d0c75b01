#include "kernels/workspace.h"

#include <algorithm>
#include <utility>

namespace tessera {

Workspace::Workspace() : memory_(std::make_unique<Memory>()) {}
Workspace::~Workspace() = default;
Workspace::Workspace(Workspace&& other) noexcept = default;
Workspace& Workspace::operator=(Workspace&& other) noexcept = default;

namespace kernels {

BorrowedBuffer::BorrowedBuffer(Workspace* workspace, std::size_t bytes) : workspace_(workspace) {
  if (workspace == nullptr) {
    buffer_ = AlignedBuffer(bytes);
    return;
  }
  // The smallest that is large enough; failing that, a new one in the place of the largest.
  std::vector<AlignedBuffer>& spare = workspace->memory().spare;
  const auto smaller = [](const AlignedBuffer& a, const AlignedBuffer& b) { return a.bytes() < b.bytes(); };
  std::sort(spare.begin(), spare.end(), smaller);
  const auto found =
      std::find_if(spare.begin(), spare.end(), [bytes](const AlignedBuffer& b) { return b.bytes() >= bytes; });
  if (found != spare.end()) {
    buffer_ = std::move(*found);
    spare.erase(found);
    return;
  }
  if (!spare.empty()) spare.pop_back();
  buffer_ = AlignedBuffer(bytes);
}

BorrowedBuffer::~BorrowedBuffer() {
  if (workspace_ != nullptr && buffer_.data() != nullptr) workspace_->memory().spare.push_back(std::move(buffer_));
}

BorrowedBuffer::BorrowedBuffer(BorrowedBuffer&& other) noexcept
    : workspace_(std::exchange(other.workspace_, nullptr)), buffer_(std::move(other.buffer_)) {}

BorrowedBuffer& BorrowedBuffer::operator=(BorrowedBuffer&& other) noexcept {
  std::swap(workspace_, other.workspace_);
  std::swap(buffer_, other.buffer_);
  return *this;
}

}  // namespace kernels
}  // namespace tessera
