// From plan entries to groups of 16 keys. Included once per level.
//
// Aligned groups of source 0 point into panels packed before; everything else (gathered, permuted, derived, or when the
// workspace was too small) is packed into the scratch here.

/// What an entry's mask asks of all its groups: a band around the query position, or a bitmask.
struct EntryLimits {
  std::int32_t left = INT32_MAX;
  std::int32_t right = INT32_MAX;
  const std::uint64_t* bits = nullptr;
  std::int64_t bit_words = 0;
};

inline EntryLimits limits_of(const Plan& plan, const PlanEntry& entry, std::int64_t keys) {
  EntryLimits limits;
  if (entry.mask == EntryMask::band) {
    const Window& band = plan.bands.data()[entry.mask_index];
    if (band.left >= 0) limits.left = static_cast<std::int32_t>(std::min<std::int64_t>(band.left, INT32_MAX));
    if (band.right >= 0) limits.right = static_cast<std::int32_t>(std::min<std::int64_t>(band.right, INT32_MAX));
  } else if (entry.mask == EntryMask::bitmask) {
    limits.bits = plan.mask_words.data() + entry.mask_index;
    limits.bit_words = (keys + 63) / 64;
  }
  return limits;
}

/// Log-weights of a group's keys, 0 where the source has none and on absent lanes.
inline void store_log_weights(const PackedSource& source, std::uint32_t lanes, const std::int32_t* keys, float* out) {
  for (int lane = 0; lane < kGroupKeys; ++lane) {
    const bool present = (lanes >> lane & 1U) != 0 && source.log_weight != nullptr;
    out[lane] = present ? source.log_weight[keys[lane]] : 0.0F;
  }
}

/// Gathered rows are nowhere near each other: asks for those of list[from, to) before they are needed.
template <class List>
inline void prefetch_listed(const TileShape& shape, const PackedSource& source, const List& list, std::int64_t from,
                            std::int64_t to) {
  const auto element = static_cast<std::int64_t>(size_of(shape.dtype));
  for (std::int64_t i = from; i < to; ++i) {
    const std::byte* k = source.k.row(list[i]);
    const std::byte* v = source.v.row(list[i]);
    for (std::int64_t line = 0; line < shape.head_dim * element; line += 64) __builtin_prefetch(k + line, 0, 2);
    for (std::int64_t line = 0; line < shape.value_dim * element; line += 64) __builtin_prefetch(v + line, 0, 2);
  }
}

/// Collects groups for a block and flushes it when it is full.
template <class Flush>
class GroupCollector {
 public:
  GroupCollector(const Call& call, const TileShape& shape, std::int64_t block, const PackedSource* sources,
                 TileScratch& scratch, Flush flush)
      : call_(call), shape_(shape), block_(block), sources_(sources), scratch_(scratch), flush_(flush) {
    const auto& orders = call.plan.key_order;
    if (!orders.empty() && !orders[static_cast<std::size_t>(block)].empty()) {
      key_order_ = orders[static_cast<std::size_t>(block)].data();
    }
    // The online skip judges whole key tiles: none may lie in two blocks.
    if (call.online_skip.used()) whole_groups_ = static_cast<std::int32_t>(call.plan.tile_k / kGroupKeys);
    clear();
  }

  /// Lowest and highest query position of the rows: groups out of their reach are dropped.
  void set_positions(std::int32_t lowest, std::int32_t highest) {
    lowest_ = lowest;
    highest_ = highest;
  }

  /// Adds all keys of a plan row's entries [first, last).
  void add_row(std::int64_t first, std::int64_t last) {
    const PlanEntry* entries = call_.plan.entries.data();
    following_end_ = entries + last;
    for (std::int64_t e = first; e < last; ++e) {
      following_ = entries + e + 1;
      add(entries[e], 0, call_.plan.keys_of(entries[e], block_).count);
    }
    following_ = following_end_;
    finish();
  }

  /// Adds keys [first, first + count) of an entry.
  void add(const PlanEntry& entry, std::int64_t first, std::int64_t count) {
    const Plan::KeyRange range = call_.plan.keys_of(entry, block_);
    source_ = &sources_[entry.source];
    derived_ = entry.source != 0;
    limits_ = limits_of(call_.plan, entry, range.count);
    if (entry.kind == EntryKind::gather) {
      add_listed({call_.plan.tokens.data() + range.begin, derived_ ? nullptr : key_order_}, first, count);
    } else if (key_order_ != nullptr && !derived_) {
      add_listed({key_order_ + range.begin, nullptr}, first, count);
    } else if (!derived_ && source_->k_panels != nullptr) {
      add_packed(range.begin, first, count);
    } else {
      add_run(range.begin, first, count);
    }
  }

  void finish() {
    if (scratch_.group_count > 0) flush_();
    clear();
  }

 private:
  void clear() {
    scratch_.group_count = 0;
    scratch_.any_masked = false;
    scratch_.next_count = 0;
  }

  /// Before a group at `key`: makes room for the rest of its key tile where that must not be cut.
  void keep_tile_whole(std::int64_t key) {
    if (whole_groups_ == 0 || key % (whole_groups_ * kGroupKeys) != 0) return;
    if (scratch_.group_count + whole_groups_ > kBlockGroups) finish();
  }

  /// Notes the panels of the next block's groups: the rest of this packed run, then the runs of the entries after it.
  void look_ahead(std::int64_t base, std::int64_t end) {
    if (source_->v_panels == nullptr) return;
    std::int32_t& count = scratch_.next_count;
    for (const PlanEntry* next = following_;; ++next) {
      for (; base < end && count < kBlockGroups; base += kGroupKeys) {
        scratch_.next_k[count] = source_->k_panels + base / kGroupKeys * shape_.k_storage_panel;
        scratch_.next_v[count] = source_->v_panels + base / kGroupKeys * shape_.v_panel;
        ++count;
      }
      if (count == kBlockGroups || next == following_end_ || next->kind == EntryKind::gather || next->source != 0)
        return;
      const Plan::KeyRange range = call_.plan.keys_of(*next, block_);
      base = range.begin / kGroupKeys * kGroupKeys;
      end = range.begin + range.count;
    }
  }

  /// Tests the reach of a group and sets everything but its panels. Returns null when no row sees it.
  KeyGroup* open_group(std::int32_t first_key, std::int32_t last_key, std::uint32_t lanes, std::int64_t first_bit) {
    KeyGroup& group = scratch_.groups[scratch_.group_count];
    group.lanes = lanes;
    group.left = limits_.left;
    group.right = limits_.right;
    group.first_key = first_key;
    group.last_key = last_key;
    group.bits = limits_.bits;
    group.bit_words = limits_.bit_words;
    group.first_bit = first_bit;
    if (!group_reaches(group, lowest_, highest_)) return nullptr;
    const std::int64_t left = limits_.left;
    const std::int64_t right = limits_.right;
    const bool inside = last_key <= lowest_ + right && first_key >= highest_ - left;
    group.masked = lanes != 0xffffU || limits_.bits != nullptr || !inside;
    group.slow_value = false;
    scratch_.any_masked = scratch_.any_masked || group.masked;
    scratch_.key_source[scratch_.group_count] = derived_ ? source_ : nullptr;
    return &group;
  }

  void close_group() {
    const std::int32_t g = scratch_.group_count;
    KeyGroup& group = scratch_.groups[g];
    const std::int32_t* keys = scratch_.keys + g * kGroupKeys;
    for (int lane = 0; source_->value_nonfinite != nullptr && lane < kGroupKeys; ++lane) {
      if ((group.lanes >> lane & 1U) == 0) continue;
      if (source_->value_nonfinite[keys[lane]] != 0) group.slow_value = true;
    }
    if (source_->log_weight != nullptr || derived_) {
      store_log_weights(*source_, group.lanes, keys, scratch_.key_log_weight + g * kGroupKeys);
    }
    if (++scratch_.group_count == kBlockGroups) finish();
  }

  /// Packed panels: groups lie on multiples of 16 keys.
  void add_packed(std::int64_t begin, std::int64_t first, std::int64_t count) {
    const std::int64_t start = begin + first;
    const std::int64_t end = start + count;
    for (std::int64_t base = start / kGroupKeys * kGroupKeys; base < end; base += kGroupKeys) {
      keep_tile_whole(base);
      const std::int64_t from = std::max(start, base) - base;
      const std::int64_t to = std::min(end, base + kGroupKeys) - base;
      const std::uint32_t lanes = (0xffffU >> (kGroupKeys - to)) & (0xffffU << from);
      KeyGroup* group = open_group(static_cast<std::int32_t>(base + from), static_cast<std::int32_t>(base + to - 1),
                                   lanes, base - begin);
      if (group == nullptr) continue;
      const std::int32_t g = scratch_.group_count;
      std::int32_t* keys = scratch_.keys + g * kGroupKeys;
      for (int lane = 0; lane < kGroupKeys; ++lane) keys[lane] = static_cast<std::int32_t>(base + lane);
      const std::uint32_t* panel = source_->k_panels + base / kGroupKeys * shape_.k_storage_panel;
      if (shape_.k_widens()) {
        group->k = scratch_.k + g * shape_.k_compute_panel;
        widen_key_panel(panel, shape_.storage_words, shape_.dtype, scratch_.k + g * shape_.k_compute_panel);
      } else {
        group->k = panel;
      }
      if (source_->v_panels != nullptr) {
        group->v = source_->v_panels + base / kGroupKeys * shape_.v_panel;
      } else {
        stage_values_of(*group, g, keys);
      }
      if (scratch_.group_count + 1 == kBlockGroups) look_ahead(base + kGroupKeys, end);
      close_group();
    }
  }

  void add_run(std::int64_t begin, std::int64_t first, std::int64_t count) {
    for (std::int64_t i = first; i < first + count; i += kGroupKeys) {
      const std::int64_t present = std::min(kGroupKeys, first + count - i);
      const auto key = static_cast<std::int32_t>(begin + i);
      keep_tile_whole(key);
      KeyGroup* group =
          open_group(key, static_cast<std::int32_t>(key + present - 1), 0xffffU >> (kGroupKeys - present), i);
      if (group == nullptr) continue;
      std::int32_t* keys = scratch_.keys + scratch_.group_count * kGroupKeys;
      for (int lane = 0; lane < kGroupKeys; ++lane) keys[lane] = key + lane;
      stage_group(*group, keys);
    }
  }

  /// Keys by list: places, which an order may turn into keys.
  struct KeyList {
    const std::int32_t* places;
    const std::int32_t* order;
    std::int32_t operator[](std::int64_t i) const { return order == nullptr ? places[i] : order[places[i]]; }
  };

  void add_listed(const KeyList& list, std::int64_t first, std::int64_t count) {
    for (std::int64_t i = first; i < first + count; i += kGroupKeys) {
      const std::int64_t present = std::min(kGroupKeys, first + count - i);
      prefetch_listed(shape_, *source_, list, i + kGroupKeys, std::min(i + 2 * kGroupKeys, first + count));
      std::int32_t lowest = list[i];
      std::int32_t highest = list[i];
      for (std::int64_t lane = 1; lane < present; ++lane) {
        lowest = std::min(lowest, list[i + lane]);
        highest = std::max(highest, list[i + lane]);
      }
      KeyGroup* group = open_group(lowest, highest, 0xffffU >> (kGroupKeys - present), i);
      if (group == nullptr) continue;
      std::int32_t* keys = scratch_.keys + scratch_.group_count * kGroupKeys;
      for (int lane = 0; lane < kGroupKeys; ++lane) keys[lane] = list[lane < present ? i + lane : i];
      stage_group(*group, keys);
    }
  }

  void stage_group(KeyGroup& group, const std::int32_t* keys) {
    const std::int32_t g = scratch_.group_count;
    const std::byte* rows[kGroupKeys];
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      rows[lane] = (group.lanes >> lane & 1U) != 0 ? source_->k.row(keys[lane]) : scratch_.zero_row;
    }
    std::uint32_t* k = scratch_.k + g * shape_.k_compute_panel;
    std::uint32_t* storage = shape_.k_widens() ? scratch_.k_storage : k;
    pack_key_panel(rows, shape_.head_dim * static_cast<std::int64_t>(size_of(shape_.dtype)), storage);
    if (shape_.k_widens()) widen_key_panel(storage, shape_.storage_words, shape_.dtype, k);
    group.k = k;
    stage_values_of(group, g, keys);
    close_group();
  }

  void stage_values_of(KeyGroup& group, std::int32_t g, const std::int32_t* keys) {
    const std::byte* rows[kGroupKeys];
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      rows[lane] = (group.lanes >> lane & 1U) != 0 ? source_->v.row(keys[lane]) : scratch_.zero_row;
    }
    std::uint32_t* v = scratch_.v + g * shape_.v_panel;
    stage_value_panel(rows, shape_, v);
    group.v = v;
  }

  const Call& call_;
  const TileShape& shape_;
  std::int64_t block_;
  const PackedSource* sources_;
  TileScratch& scratch_;
  Flush flush_;
  const std::int32_t* key_order_ = nullptr;
  std::int32_t lowest_ = INT32_MIN;
  std::int32_t highest_ = INT32_MAX;
  std::int32_t whole_groups_ = 0;  ///< groups of a key tile that must stay in one block; 0: any

  // Entries after the one being added, where the caller gave a whole row.
  const PlanEntry* following_ = nullptr;
  const PlanEntry* following_end_ = nullptr;

  // The entry being added.
  const PackedSource* source_ = nullptr;
  bool derived_ = false;
  EntryLimits limits_;
};
