#include "methods/prompt_window.h"

#include <algorithm>

#include "core/convert.h"

namespace tessera {

void PromptWindow::observe(const TensorView& q, std::int64_t tokens) {
  const std::int64_t rows = q.tokens();
  const std::int64_t old = std::min(window_, std::ssize(positions_));
  positions_.erase(positions_.begin(), positions_.end() - old);
  queries_.erase(queries_.begin(), queries_.end() - old * width());
  const std::int64_t taken = std::min(window_, rows);
  queries_.resize(static_cast<std::size_t>((old + taken) * width()));
  for (std::int64_t row = 0; row < taken; ++row) {
    positions_.push_back(tokens - taken + row);
    for (std::int64_t head = 0; head < q_heads_; ++head) {
      to_float(q.row(0, head, rows - taken + row), q.dtype, head_dim_,
               queries_.data() + (old + row) * width() + head * head_dim_);
    }
  }
}

std::int64_t PromptWindow::rows(std::int64_t tokens) const {
  const std::int64_t seen = std::ssize(positions_);
  std::int64_t rows = 0;
  while (rows < std::min(seen, window_) && positions_[static_cast<std::size_t>(seen - 1 - rows)] == tokens - 1 - rows) {
    ++rows;
  }
  return rows;
}

TensorView PromptWindow::last(std::int64_t rows) const {
  const float* first = queries_.data() + (std::ssize(positions_) - rows) * width();
  return view_of(first, DType::f32, {1, q_heads_, rows, head_dim_}, Layout::bnhd);
}

void PromptWindow::truncate(std::int64_t tokens) {
  while (!positions_.empty() && positions_.back() >= tokens) positions_.pop_back();
  queries_.resize(positions_.size() * static_cast<std::size_t>(width()));
  if (queries_.empty()) std::vector<float>().swap(queries_);
}

void PromptWindow::clear() {
  std::vector<float>().swap(queries_);
  positions_.clear();
}

}  // namespace tessera
