// Union, intersection and complement of plans, row by row on sorted intervals. Where both operands are whole or bands
// the result is too; bitmasks appear only where they must. Nothing is ever expanded to queries x keys.
#include <algorithm>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "plan/geometry.h"
#include "plan/row_sweep.h"
#include "plan/row_writer.h"
#include "tessera/plan.h"

namespace tessera {

namespace {

enum class Operation : std::uint8_t { unite, intersect, subtract };

/// Combines plans of the same frame.
class Combination {
 public:
  Combination(const Plan& a, const Plan& b, Operation operation)
      : a_(a),
        b_(b),
        operation_(operation),
        finer_(a, b),
        builder_(a.problem, a.tile_q, a.tile_k, finer_.heads, finer_.sequences),
        writer_(builder_) {}

  Plan make() && {
    const Plan& with_sources = a_.sources.size() >= b_.sources.size() ? a_ : b_;
    for (std::size_t s = 1; s < with_sources.sources.size(); ++s) builder_.add_source(with_sources.sources[s]);
    for (std::int64_t i = 0; i < finer_.blocks(); ++i) {
      const std::int64_t in_a = finer_.block_in(a_, i);
      if (!a_.query_order.empty()) builder_.set_query_order(i, a_.query_order[in_a]);
      if (!a_.key_order.empty()) builder_.set_key_order(i, a_.key_order[in_a]);
    }
    builder_.reserve(a_.entries.size() + b_.entries.size());
    for (std::int64_t i = 0; i < finer_.blocks(); ++i) {
      const BlockView in_a(a_, finer_.block_in(a_, i));
      const BlockView in_b(b_, finer_.block_in(b_, i));
      for (std::int64_t tile = 0; tile < in_a.tiles(); ++tile) {
        for (std::size_t s = 0; s < with_sources.sources.size(); ++s) {
          combine_row(in_a, in_b, tile, static_cast<std::uint16_t>(s), with_sources.sources[s]);
        }
        builder_.end_row();
      }
    }
    return std::move(builder_).finish();
  }

 private:
  void combine_row(const BlockView& in_a, const BlockView& in_b, std::int64_t tile, std::uint16_t source,
                   const KeySourceInfo& info) {
    if (info.repeats_allowed) {
      copy_entries(a_, in_a, tile, source);
      copy_entries(b_, in_b, tile, source);
      return;
    }
    rows_ = in_a.rows_of(tile);
    load_row(a_, in_a, tile, source, pieces_a_);
    load_row(b_, in_b, tile, source, pieces_b_);
    writer_.begin_row(rows_, source == 0 ? in_a.keys : info.keys, source);
    sweep_.run(a_, pieces_a_, b_, pieces_b_, [&](std::int64_t begin, std::int64_t end, const Cover& a, const Cover& b) {
      combine(in_a, tile, begin, end, a, b);
    });
    writer_.finish_row();
  }

  void combine(const BlockView& view, std::int64_t tile, std::int64_t begin, std::int64_t end, const Cover& a,
               const Cover& b) {
    using Kind = Cover::Kind;
    const bool bands = a.kind == Kind::band && b.kind == Kind::band;
    const auto copy = [&](const Cover& cover) {
      if (cover.kind == Kind::all) return writer_.all(begin, end);
      if (cover.kind == Kind::band) return writer_.band(begin, end, cover.window);
      if (cover.kind == Kind::bits) write_bits(view, tile, begin, end, cover, {});
    };
    switch (operation_) {
      case Operation::unite:
        if (a.kind == Kind::all || b.kind == Kind::nothing) return copy(a);
        if (b.kind == Kind::all || a.kind == Kind::nothing) return copy(b);
        if (bands) return writer_.band(begin, end, union_of(a.window, b.window));
        break;
      case Operation::intersect:
        if (a.kind == Kind::nothing || b.kind == Kind::all) return copy(a);
        if (b.kind == Kind::nothing || a.kind == Kind::all) return copy(b);
        if (bands) return writer_.band(begin, end, intersection_of(a.window, b.window));
        break;
      case Operation::subtract:
        if (a.kind == Kind::nothing || b.kind == Kind::all) return;
        if (b.kind == Kind::nothing) return copy(a);
        if (bands && union_of(a.window, b.window) == b.window) return;
        break;
    }
    write_bits(view, tile, begin, end, a, b);
  }

  /// The segment pair by pair, 64 keys at a time, so that whole and empty parts of it are found.
  void write_bits(const BlockView& view, std::int64_t tile, std::int64_t begin, std::int64_t end, const Cover& a,
                  const Cover& b) {
    words_.resize(static_cast<std::size_t>(rows_));
    for (std::int64_t from = begin; from < end; from += 64) {
      const std::int64_t to = std::min(from + 64, end);
      for (std::int64_t row = 0; row < rows_; ++row) {
        std::uint64_t word_a = 0;
        std::uint64_t word_b = 0;
        cover_bits(a, view, tile, row, from, to, {&word_a, 1});
        if (b.plan == nullptr) {
          words_[row] = word_a;
          continue;
        }
        cover_bits(b, view, tile, row, from, to, {&word_b, 1});
        words_[row] = operation_ == Operation::unite       ? word_a | word_b
                      : operation_ == Operation::intersect ? word_a & word_b
                                                           : word_a & ~word_b;
      }
      writer_.bits(from, to, words_);
    }
  }

  void copy_entries(const Plan& plan, const BlockView& view, std::int64_t tile, std::uint16_t source) {
    for (const PlanEntry& entry : plan.row(plan.row_begin[view.block] + tile)) {
      if (entry.source != source) continue;
      const Plan::KeyRange keys = plan.keys_of(entry, view.block);
      std::int64_t mask_index = 0;
      if (entry.mask == EntryMask::bitmask) {
        const auto words = static_cast<std::size_t>(view.rows_of(tile) * mask_words_of(keys.count));
        mask_index = builder_.add_mask({plan.mask_words.data() + entry.mask_index, words});
      }
      if (entry.kind == EntryKind::gather) {
        const std::int64_t tokens =
            builder_.add_tokens({plan.tokens.data() + keys.begin, static_cast<std::size_t>(keys.count)});
        builder_.gather(tokens, keys.count, entry.mask, mask_index, source);
      } else {
        builder_.run(keys.begin, keys.count, entry.mask, mask_index, source);
      }
    }
  }

  const Plan& a_;
  const Plan& b_;
  Operation operation_;
  FinerDivision finer_;
  PlanBuilder builder_;
  RowWriter writer_;
  RowSweep sweep_;
  std::int64_t rows_ = 0;
  std::vector<Piece> pieces_a_;
  std::vector<Piece> pieces_b_;
  std::vector<std::uint64_t> words_;
};

void require_raw_keys_only(const Plan& plan, std::string_view action) {
  require(plan.sources.size() == 1, "{}: the plan has {} key sources; expected only the raw keys", action,
          plan.sources.size());
}

/// Every pair the problem allows, in the frame of another plan.
Plan everything_like(const Plan& plan) {
  PlanBuilder builder(plan.problem, plan.tile_q, plan.tile_k, plan.plan_heads, plan.plan_sequences);
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    if (!plan.query_order.empty()) builder.set_query_order(block, plan.query_order[block]);
    if (!plan.key_order.empty()) builder.set_key_order(block, plan.key_order[block]);
    const std::int64_t keys = plan.source_keys(0, block);
    for (std::int64_t tile = 0; tile < builder.query_tiles(block); ++tile) {
      builder.run(0, keys, plan.problem.causal ? EntryMask::band : EntryMask::none);
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

}  // namespace

Plan unite(const Plan& a, const Plan& b) {
  check_compatible(a, b, "unite");
  require(a.sources == b.sources || a.sources.size() == 1 || b.sources.size() == 1,
          "unite: the plans have different key sources");
  return Combination(a, b, Operation::unite).make();
}

Plan intersect(const Plan& a, const Plan& b) {
  check_compatible(a, b, "intersect");
  require_raw_keys_only(a, "intersect");
  require_raw_keys_only(b, "intersect");
  return Combination(a, b, Operation::intersect).make();
}

Plan complement(const Plan& plan) {
  require_raw_keys_only(plan, "complement");
  const Plan everything = everything_like(plan);
  return Combination(everything, plan, Operation::subtract).make();
}

}  // namespace tessera
