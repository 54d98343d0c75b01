// One block: up to 128 rows against up to 128 keys. Scores, modifiers, masks, online softmax, output. Included once per
// level; query-major and key-major kernels fill the scratch differently and share everything here.

/// Rows of the next register block. One or two rows left over would run at the latency of their few accumulators, so
/// the last two blocks share.
inline std::int64_t register_rows(std::int64_t remaining) {
  if (remaining <= kRegisterRows) return remaining;
  return remaining - kRegisterRows <= kRegisterRows / 3 ? (remaining + 1) / 2 : kRegisterRows;
}

inline bool group_reaches(const KeyGroup& group, std::int32_t lowest_position, std::int32_t highest_position) {
  const std::int64_t left = group.left;
  const std::int64_t right = group.right;
  return group.first_key <= highest_position + right && group.last_key >= lowest_position - left;
}

/// 16 bits of a bitmask row from bit `first` on, which may be negative.
inline std::uint32_t mask_bits(const std::uint64_t* words, std::int64_t count, std::int64_t first) {
  if (first < 0) return static_cast<std::uint32_t>(words[0] << -first) & 0xffffU;
  const std::int64_t word = first / 64;
  const std::int64_t shift = first % 64;
  if (word >= count) return 0;
  std::uint64_t bits = words[word] >> shift;
  if (shift > 48 && word + 1 < count) bits |= words[word + 1] << (64 - shift);
  return static_cast<std::uint32_t>(bits) & 0xffffU;
}

/// Which of the 16 keys of a group the row may see, as a bit per lane.
inline std::uint32_t row_lanes(const KeyGroup& group, std::int64_t row_in_tile) {
  if (group.bits == nullptr) return group.lanes;
  return group.lanes & mask_bits(group.bits + row_in_tile * group.bit_words, group.bit_words, group.first_bit);
}

/// Writes -inf over the scores of pairs that are not allowed.
inline void mask_group(const TileScratch& scratch, const KeyGroup& group, std::int64_t g, std::int64_t row) {
  const std::int64_t position = scratch.position[row];
  const std::int64_t lowest = position - group.left;
  const std::int64_t highest = position + group.right;
  const IntVec low = set1_int(static_cast<std::int32_t>(std::max<std::int64_t>(lowest, INT32_MIN)));
  const IntVec high = set1_int(static_cast<std::int32_t>(std::min<std::int64_t>(highest, INT32_MAX)));
  const std::uint32_t lanes = row_lanes(group, scratch.row_in_tile[row]);
  float* scores = scratch.scores + row * kBlockKeys + g * kGroupKeys;
  for (int lane = 0; lane < kGroupKeys; lane += kLanes) {
    const IntVec keys = load_int(scratch.keys + g * kGroupKeys + lane);
    const Mask allowed = both(both(not_less(keys, low), not_less(high, keys)), mask_from_bits(lanes >> lane));
    store(scores + lane, select(allowed, load(scores + lane), set1(kMinusInfinity)));
  }
}

/// Query scale, soft-cap, ALiBi, key bias and log-weights on one row, in natural units; then ScoreRule::from_natural.
inline void modify_row(const Call& call, const ScoreRule& rule, const TileJob& job, const TileScratch& scratch,
                       std::int64_t row) {
  const Modifiers& modifiers = call.inputs.modifiers;
  const std::int32_t head = scratch.head[row];
  const float slope = modifiers.alibi_slopes.empty() ? 0.0F : modifiers.alibi_slopes.data()[head];
  const auto position = static_cast<float>(scratch.position[row]);
  float to_natural = rule.to_natural;
  if (!modifiers.query_scale.empty()) {
    to_natural *= modifiers.query_scale.data()[call.problem().q_begin_of(job.sequence) + scratch.query[row]];
  }
  for (std::int32_t g = 0; g < scratch.group_count; ++g) {
    const bool raw = scratch.key_source[g] == nullptr;
    float* scores = scratch.scores + row * kBlockKeys + g * kGroupKeys;
    alignas(64) float bias[kGroupKeys] = {};
    if (raw && modifiers.key_bias.data != nullptr) {
      for (int lane = 0; lane < kGroupKeys; ++lane) {
        const bool present = (scratch.groups[g].lanes >> lane & 1U) != 0;
        bias[lane] = present ? call.key_bias(job.sequence, head, scratch.keys[g * kGroupKeys + lane]) : 0.0F;
      }
    }
    for (int lane = 0; lane < kGroupKeys; lane += kLanes) {
      Vec s = mul(load(scores + lane), set1(to_natural));
      if (modifiers.softcap != 0) s = mul(tanh(mul(s, set1(1 / modifiers.softcap))), set1(modifiers.softcap));
      if (raw) {
        const Vec keys = to_float(load_int(scratch.keys + g * kGroupKeys + lane));
        s = fma(set1(slope), sub(keys, set1(position)), s);
        s = add(s, load(bias + lane));
      } else {
        s = add(s, load(scratch.key_log_weight + g * kGroupKeys + lane));
      }
      store(scores + lane, mul(s, set1(rule.from_natural)));
    }
  }
}

inline float probability(const float* row, std::int64_t column, FloatProduct /*unused*/) {
  return row[column];
}
#if defined(TESSERA_LEVEL_BF16)
inline float probability(const float* row, std::int64_t column, PairProduct /*unused*/) {
  const std::uint32_t bits = reinterpret_cast<const std::uint16_t*>(row)[column];
  return std::bit_cast<float>(bits << 16);
}
#endif

/// Groups whose values hold NaN or Inf: rows that give them no weight must not see them (0 * NaN is NaN).
template <class Product>
inline void add_slow_values(const TileShape& shape, const PackedSource* sources, const TileScratch& scratch,
                            std::int64_t rows) {
  for (std::int32_t g = 0; g < scratch.group_count; ++g) {
    if (!scratch.groups[g].slow_value) continue;
    const PackedSource& source = scratch.key_source[g] == nullptr ? sources[0] : *scratch.key_source[g];
    for (std::int64_t row = 0; row < rows; ++row) {
      for (int lane = 0; lane < kGroupKeys; ++lane) {
        const float p = probability(scratch.probabilities, row * kBlockKeys + g * kGroupKeys + lane, Product{});
        if (p == 0 || (scratch.groups[g].lanes >> lane & 1U) == 0) continue;
        const std::byte* v = source.v.row(scratch.keys[g * kGroupKeys + lane]);
        for (std::int64_t c = 0; c < shape.value_dim; ++c) {
          scratch.output_rows[row][c] += p * load_as_float(v, shape.dtype, c);
        }
      }
    }
  }
}

/// Places of [first, last) whose groups some of the rows [row, row + rows) may see, cut down from both ends.
struct GroupRange {
  std::int32_t first;
  std::int32_t last;
};
inline GroupRange reached_groups(const TileScratch& scratch, std::int64_t row, std::int64_t rows, GroupRange range) {
  if (!scratch.any_masked) return range;
  const auto [lowest, highest] = std::minmax_element(scratch.position + row, scratch.position + row + rows);
  const auto reached = [&, low = *lowest, high = *highest](const KeyGroup& group) {
    return !group.masked || group_reaches(group, low, high);
  };
  while (range.first < range.last && !reached(scratch.groups[range.first])) ++range.first;
  while (range.first < range.last && !reached(scratch.groups[range.last - 1])) --range.last;
  return range;
}

/// Asks for the panels of the next block, into L2, a few lines before every register block: they come from memory or
/// L3, each is too short for the processor's own prefetching to get going, and many at once would keep the misses of
/// the product waiting.
class PanelFetch {
 public:
  /// Everything is asked for after `steps` steps.
  PanelFetch(const TileShape& shape, const TileScratch& scratch, std::int64_t steps)
      : k_lines_(shape.k_storage_panel / line_words), v_lines_(shape.v_panel / line_words), scratch_(scratch) {
    left_ = scratch.next_count * (k_lines_ + v_lines_);
    steps = std::max<std::int64_t>(1, steps);
    share_ = (left_ + steps - 1) / steps;
  }

  void step() {
    const std::int64_t count = std::min(share_, left_);
    left_ -= count;
    for (std::int64_t i = 0; i < count; ++i) {
      if (in_panel_ == 0) next_panel();
      __builtin_prefetch(line_, 0, 2);
      line_ += line_words;
      --in_panel_;
    }
  }

 private:
  static constexpr std::int64_t line_words = 16;  ///< words

  /// Keys and values of a group, then those of the next.
  void next_panel() {
    const bool value = panel_ % 2 != 0;
    const std::uint32_t* const* panels = value ? scratch_.next_v : scratch_.next_k;
    line_ = panels[panel_ / 2];
    in_panel_ = value ? v_lines_ : k_lines_;
    ++panel_;
  }

  std::int64_t k_lines_;
  std::int64_t v_lines_;
  const TileScratch& scratch_;
  std::int64_t left_;
  std::int64_t share_;
  std::int64_t panel_ = 0;
  std::int64_t in_panel_ = 0;  ///< lines that the panel still has
  const std::uint32_t* line_ = nullptr;
};

/// Exponentials that run before every register block where products cannot carry them along: there the processor is
/// still busy with the sums of the block before, and at the end of a stage it would wait for nothing else.
constexpr int kStepsBetweenBlocks = kShadow ? 0 : 4;

/// Scores of rows [begin, end), for the groups that reach any of their positions.
template <class Product>
inline void block_scores(const TileShape& shape, TileScratch& scratch, std::int64_t begin, std::int64_t end,
                         SoftmaxStream<Product>& shadow, PanelFetch& fetch) {
  for (std::int32_t g = 0; g < scratch.group_count; g += kRegisterPanels) {
    const GroupRange all = {g, std::min<std::int32_t>(g + kRegisterPanels, scratch.group_count)};
    for (std::int64_t first = begin, count = 0; first < end; first += count) {
      count = register_rows(end - first);
      // mask_group writes -inf over the scores of the others, whatever is there.
      const GroupRange range = reached_groups(scratch, first, count, all);
      if (range.first == range.last) continue;
      const std::uint32_t* k[kRegisterPanels] = {};
      for (std::int32_t p = range.first; p < range.last; ++p) k[p - range.first] = scratch.groups[p].k;
      float* scores = scratch.scores + first * kBlockKeys + range.first * kGroupKeys;
      fetch.step();
      for (int i = 0; i < kStepsBetweenBlocks; ++i) shadow.step();
      with_count<kRegisterRows>(count, [&](auto row_count) {
        with_count<kRegisterPanels>(range.last - range.first, [&](auto panel_count) {
          score_rows<Product, row_count(), panel_count()>(scratch.q_rows + first, k, shape.compute_words, scores,
                                                          shadow);
        });
      });
    }
  }
}

/// Output product of rows [begin, end) over the groups that reach any of them and that not all of them skip.
template <class Product>
inline void block_output(const TileShape& shape, TileScratch& scratch, std::int64_t begin, std::int64_t end,
                         bool may_skip, SoftmaxStream<Product>& shadow, PanelFetch& fetch) {
  const std::int64_t slabs = shape.value_columns / 16;
  for (std::int64_t slab = 0; slab < slabs; slab += kRegisterPanels) {
    const std::int64_t panels = std::min<std::int64_t>(kRegisterPanels, slabs - slab);
    ValueGroups groups;
    for (std::int64_t first = begin, count = 0; first < end; first += count) {
      count = register_rows(end - first);
      if (first == begin || scratch.any_masked || may_skip) {
        std::uint32_t skipped = may_skip ? ~0U : 0U;
        for (std::int64_t r = first; r < first + count && skipped != 0; ++r) skipped &= scratch.skipped_groups[r];
        groups.count = 0;
        for (std::int32_t g = 0; g < scratch.group_count; ++g) {
          const KeyGroup& group = scratch.groups[g];
          bool reached = !group.masked;
          for (std::int64_t r = first; r < first + count && !reached; ++r) {
            reached = group_reaches(group, scratch.position[r], scratch.position[r]);
          }
          if (!reached || group.slow_value || (skipped >> g & 1U) != 0) continue;
          groups.panels[groups.count] = group.v;
          groups.column[groups.count] = static_cast<std::int32_t>(g * kGroupKeys);
          ++groups.count;
        }
      }
      fetch.step();
      for (int i = 0; i < kStepsBetweenBlocks; ++i) shadow.step();
      with_count<kRegisterRows>(count, [&](auto row_count) {
        with_count<kRegisterPanels>(panels, [&](auto panel_count) {
          output_rows<Product, row_count(), panel_count()>(
              scratch.probabilities + first * kBlockKeys / Product::keys_per_word, groups, slab,
              scratch.output_rows + first, shadow);
        });
      });
    }
  }
}

/// Largest score of every group of rows [begin, end), NaN left out.
inline void find_group_peaks(TileScratch& scratch, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* scores = scratch.scores + row * kBlockKeys;
    for (std::int32_t g = 0; g < scratch.group_count; ++g) {
      Vec highest = set1(kMinusInfinity);
      for (int lane = 0; lane < kGroupKeys; lane += kLanes) {
        highest = at_least(load(scores + g * kGroupKeys + lane), highest);
      }
      scratch.group_peak[row * kBlockGroups + g] = reduce_max(highest);
    }
  }
}

/// Whether the scores of groups [first, last) of a row hold a NaN.
inline bool has_undefined(const TileScratch& scratch, std::int64_t row, std::int32_t first, std::int32_t last) {
  Vec sum = zero();  // 0 * x is NaN for NaN, and for infinity, which is no low score either
  for (std::int64_t c = first * kGroupKeys; c < last * kGroupKeys; c += kLanes) {
    sum = fma(at_least(set1(std::numeric_limits<float>::lowest()), load(scratch.scores + row * kBlockKeys + c)), zero(),
              sum);
  }
  return std::isnan(reduce_add(sum));
}

/// Online skip of one row group [begin, end): key tiles whose scores are all too low for it get -inf.
inline void skip_low_tiles(const Call& call, const ScoreRule& rule, const TileJob& job, TileScratch& scratch,
                           std::int64_t begin, std::int64_t end) {
  const std::int64_t tile_k = call.plan.tile_k;
  const std::int64_t last_tile = (call.problem().kv_len_of(job.sequence) - 1) / tile_k;
  const float distance = call.online_skip.distance / rule.to_log2;
  for (std::int32_t first = 0, last = 0; first < scratch.group_count; first = last) {
    const std::int64_t tile = scratch.groups[first].first_key / tile_k;
    bool skip = tile != last_tile;
    for (last = first; last < scratch.group_count && scratch.groups[last].first_key / tile_k == tile; ++last) {
      const KeyGroup& group = scratch.groups[last];
      skip = skip && group.left == INT32_MAX && group.right == INT32_MAX;  // no mask
    }
    for (std::int64_t row = begin; row < end && skip; ++row) {
      float peak = kMinusInfinity;
      for (std::int32_t g = first; g < last; ++g) peak = std::max(peak, scratch.group_peak[row * kBlockGroups + g]);
      const bool low = peak == kMinusInfinity || peak - scratch.row_peak[row] <= -distance;
      skip = low && !has_undefined(scratch, row, first, last);
    }
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int32_t g = first; g < last; ++g) {
        if (!skip) {
          scratch.row_peak[row] = std::max(scratch.row_peak[row], scratch.group_peak[row * kBlockGroups + g]);
          continue;
        }
        float* scores = scratch.scores + row * kBlockKeys + g * kGroupKeys;
        for (int lane = 0; lane < kGroupKeys; lane += kLanes) store(scores + lane, set1(kMinusInfinity));
        scratch.group_peak[row * kBlockGroups + g] = kMinusInfinity;
        scratch.skipped_groups[row] |= 1U << g;
      }
    }
    if (skip) scratch.skipped_pairs += (end - begin) * (last - first) * kGroupKeys;
  }
}

/// Raises the largest scores per key tile of a row.
inline void note_tile_peaks(const Call& call, TileScratch& scratch, std::int64_t row) {
  const std::int64_t tile_k = call.plan.tile_k;
  float* peaks = scratch.tile_peak + row * scratch.tile_peak_count;
  for (std::int32_t g = 0; g < scratch.group_count; ++g) {
    if (scratch.key_source[g] != nullptr) continue;
    const KeyGroup& group = scratch.groups[g];
    const std::int64_t tile = group.first_key / tile_k;
    if (group.last_key / tile_k == tile) {
      peaks[tile] = std::max(peaks[tile], scratch.group_peak[row * kBlockGroups + g]);
      continue;
    }
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      if ((group.lanes >> lane & 1U) == 0) continue;
      float& peak = peaks[scratch.keys[g * kGroupKeys + lane] / tile_k];
      peak = std::max(peak, scratch.scores[row * kBlockKeys + g * kGroupKeys + lane]);
    }
  }
}

/// Whether all groups of the block are raw keys of one key tile.
inline bool is_one_tile(const Call& call, const TileScratch& scratch) {
  const std::int64_t tile = scratch.groups[0].first_key / call.plan.tile_k;
  for (std::int32_t g = 0; g < scratch.group_count; ++g) {
    const KeyGroup& group = scratch.groups[g];
    const bool inside = group.first_key / call.plan.tile_k == tile && group.last_key / call.plan.tile_k == tile;
    if (scratch.key_source[g] != nullptr || !inside) return false;
  }
  return true;
}

/// Raises the largest scores of rows [begin, end), and those of the tile that the whole block lies in if one is wanted.
inline void note_block_peaks(const Call& call, TileScratch& scratch, std::int64_t begin, std::int64_t end) {
  const std::int64_t tile = scratch.groups[0].first_key / call.plan.tile_k;
  for (std::int64_t row = begin; row < end; ++row) {
    const float* scores = scratch.scores + row * kBlockKeys;
    Vec highest = set1(kMinusInfinity);
    for (std::int64_t c = 0; c < scratch.group_count * kGroupKeys; c += kLanes) {
      highest = at_least(load(scores + c), highest);
    }
    const float peak = reduce_max(highest);
    scratch.row_peak[row] = std::max(scratch.row_peak[row], peak);
    if (scratch.tile_peak == nullptr) continue;
    float& of_tile = scratch.tile_peak[row * scratch.tile_peak_count + tile];
    of_tile = std::max(of_tile, peak);
  }
}

/// Maxima of rows [begin, end) of a block whose scores are ready, for by-products and the online skip.
inline void follow_maxima(const Call& call, const ScoreRule& rule, const TileJob& job, TileScratch& scratch,
                          std::int64_t begin, std::int64_t end) {
  if (!call.online_skip.used() && (scratch.tile_peak == nullptr || is_one_tile(call, scratch))) {
    note_block_peaks(call, scratch, begin, end);
    return;
  }
  find_group_peaks(scratch, begin, end);
  if (call.online_skip.used()) {
    std::fill(scratch.skipped_groups + begin, scratch.skipped_groups + end, 0U);
    if (begin < end) skip_low_tiles(call, rule, job, scratch, begin, end);
  }
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int32_t g = 0; g < scratch.group_count; ++g) {
      scratch.row_peak[row] = std::max(scratch.row_peak[row], scratch.group_peak[row * kBlockGroups + g]);
    }
    if (scratch.tile_peak != nullptr) note_tile_peaks(call, scratch, row);
  }
}

/// What comes between the scores of rows [begin, end) and their exponentials: modifiers, masks, maxima. Weights that
/// are no softmax are made here too.
template <class Product>
inline void prepare_weights(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                            TileScratch& scratch, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    if (rule.modified) modify_row(call, rule, job, scratch, row);
    if (scratch.any_masked) {
      for (std::int32_t g = 0; g < scratch.group_count; ++g) {
        if (scratch.groups[g].masked) mask_group(scratch, scratch.groups[g], g, row);
      }
    }
  }
  if (call.follows_maxima()) follow_maxima(call, rule, job, scratch, begin, end);
  const std::int64_t columns = scratch.group_count * kGroupKeys;
  for (std::int64_t row = begin; row < end; ++row) {
    if (rule.weights == RowWeights::softmax) {
      ready_row(rule, shape, scratch, row, columns);
    } else {
      weigh_row<Product>(call, rule, job, scratch, row, columns);
    }
  }
}

/// Rows of a stage of the pipeline: enough for the exponentials of one stage to hide behind the products of its
/// neighbours, few enough for the scores of three stages to stay near. Without a shadow, and with the smaller panels of
/// pairs, more rows read a panel while it is in L1.
template <class Product>
constexpr std::int64_t kStageRows = (kShadow && Product::keys_per_word == 1 ? 2 : 4) * kRegisterRows;

/// The whole block for `rows` rows of the scratch; clears the list of groups.
///
/// Stage by stage of a few register blocks, in a pipeline of three: the scores of one stage and the output of the one
/// before last are products, and the exponentials of the stage between them run in their shadow, on the processor's
/// ports that a product leaves free.
template <class Product>
void process_block(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                   const PackedSource* sources, TileScratch& scratch, std::int64_t rows) {
  if (scratch.group_count == 0) return;
  bool slow = false;
  for (std::int32_t g = 0; g < scratch.group_count; ++g) slow = slow || scratch.groups[g].slow_value;
  const std::int64_t columns = scratch.group_count * kGroupKeys;
  // The online skip judges a whole row group at once.
  const bool may_skip = call.online_skip.used();
  const std::int64_t stage_rows = may_skip ? call.online_skip.rows : kStageRows<Product>;
  PanelFetch fetch(shape, scratch,
                   rows / kRegisterRows * (scratch.group_count + shape.value_columns / 16) / kRegisterPanels);
  for (std::int64_t stage = 0; stage < rows + 2 * stage_rows; stage += stage_rows) {
    const auto row_of = [&](std::int64_t lag) { return std::clamp<std::int64_t>(stage - lag * stage_rows, 0, rows); };
    prepare_weights<Product>(call, shape, rule, job, scratch, row_of(1), row_of(0));
    const std::int64_t last = rule.weights == RowWeights::softmax ? row_of(0) : row_of(1);
    SoftmaxStream<Product> shadow(rule, shape, scratch, row_of(1), last, columns);
    block_scores<Product>(shape, scratch, row_of(0), row_of(-1), shadow, fetch);
    block_output<Product>(shape, scratch, row_of(2), row_of(1), may_skip, shadow, fetch);
    shadow.finish();
  }
  if (slow) add_slow_values<Product>(shape, sources, scratch, rows);
}

/// Original index of the query of a row.
inline std::int64_t query_of_row(const Call& call, const TileJob& job, std::int64_t row) {
  const std::int64_t place = job.first_place + row % job.places;
  const auto& orders = call.plan.query_order;
  return orders.empty() || orders.data()[job.block].empty() ? place : orders.data()[job.block].data()[place];
}

/// Calls body with the product of this call.
template <class Body>
inline void with_product(const TileShape& shape, const Body& body) {
#if defined(TESSERA_LEVEL_BF16)
  if (shape.pair_product) {
    body(PairProduct{});
    return;
  }
#endif
  (void)shape;
  body(FloatProduct{});
}
