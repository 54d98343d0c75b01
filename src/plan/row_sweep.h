// Two operands side by side: the pieces of one row of each, walked together in segments within which neither changes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/geometry.h"
#include "plan/pieces.h"
#include "tessera/plan.h"

namespace tessera {

/// What one operand says about a segment of keys: nothing, every pair, the pairs of a window, or bits.
struct Cover {
  enum class Kind : std::uint8_t { nothing, all, band, bits };
  Kind kind = Kind::nothing;
  Window window;                         ///< of a band
  std::span<const Piece* const> pieces;  ///< those that reach into the segment
  const Plan* plan = nullptr;
};

/// Sums up the pieces over one segment. Windows contain the query's own position, so a union of windows is a window.
Cover cover_of(const Plan& plan, std::span<const Piece* const> pieces);

/// Bits of one row of a tile over keys [begin, end): all pieces of a cover together.
void cover_bits(const Cover& cover, const BlockView& view, std::int64_t tile, std::int64_t row, std::int64_t begin,
                std::int64_t end, std::span<std::uint64_t> words);

/// Smallest window that both contain, respectively largest: side by side, -1 as infinity.
Window intersection_of(const Window& a, const Window& b);
Window union_of(const Window& a, const Window& b);

/// Pieces of one row of a plan and source, ascending, bands resolved where the block is in order.
void load_row(const Plan& plan, const BlockView& view, std::int64_t tile, std::uint16_t source,
              std::vector<Piece>& pieces);

/// Walks two rows. Keeps its buffers between calls.
class RowSweep {
 public:
  /// visit(begin, end, a, b) for every segment that at least one operand covers, ascending.
  template <class Visit>
  void run(const Plan& plan_a, std::span<const Piece> a, const Plan& plan_b, std::span<const Piece> b,
           const Visit& visit) {
    find_borders(a, b);
    open_a_.clear();
    open_b_.clear();
    std::size_t next_a = 0;
    std::size_t next_b = 0;
    for (std::size_t i = 0; i + 1 < borders_.size(); ++i) {
      const std::int64_t begin = borders_[i];
      advance(a, begin, next_a, open_a_);
      advance(b, begin, next_b, open_b_);
      if (open_a_.empty() && open_b_.empty()) continue;
      visit(begin, borders_[i + 1], cover_of(plan_a, open_a_), cover_of(plan_b, open_b_));
    }
  }

 private:
  void find_borders(std::span<const Piece> a, std::span<const Piece> b);
  static void advance(std::span<const Piece> pieces, std::int64_t begin, std::size_t& next,
                      std::vector<const Piece*>& open);

  std::vector<std::int64_t> borders_;
  std::vector<const Piece*> open_a_;
  std::vector<const Piece*> open_b_;
};

/// Throws Error unless the plans are about the same problem, query tiles and orders; the message starts with `action`.
void check_compatible(const Plan& a, const Plan& b, std::string_view action);
/// Whether blocks have the same orders (an empty order is the identity).
bool same_orders(const Plan& a, const Plan& b);

/// Walks the blocks of the finer of two divisions.
struct FinerDivision {
  std::int64_t heads = 1;
  std::int64_t sequences = 1;

  FinerDivision(const Plan& a, const Plan& b)
      : heads(std::max(a.plan_heads, b.plan_heads)), sequences(std::max(a.plan_sequences, b.plan_sequences)) {}
  /// The block of `plan` that covers block `index` of the finer division.
  std::int64_t block_in(const Plan& plan, std::int64_t index) const {
    return plan.block_of(index / heads, index % heads * (plan.problem.q_heads / heads));
  }
  std::int64_t blocks() const { return heads * sequences; }
};

}  // namespace tessera
