// Split-key: decode. Few query rows against many keys, so keys and values are read once, straight from where they lie,
// with the rows of a GQA group sharing every load. Included once per level.

constexpr std::int64_t kDecodeKeys = 64;  // keys of a block: their rows stay in L1 between scores and output
/// Rows that share the loads of a key and their widening to floats: as many as registers hold sums of, with two keys at
/// a time, or four where pairs are multiplied.
#if defined(TESSERA_LEVEL_AVX512)
constexpr int kDecodeRows = 8;
#else
constexpr int kDecodeRows = 4;
#endif
constexpr int kDecodePairRows = 4;
/// Rows are asked for this long before they are read: bytes of consecutive key rows at most, keys of a list.
constexpr std::int64_t kRunAhead = std::int64_t{64} << 10;
constexpr std::int64_t kListAhead = 64;

/// The keys of one decode block.
struct DecodeBlock {
  const std::byte* k[kDecodeKeys];
  const std::byte* v[kDecodeKeys];
  std::int64_t ahead_k[kBlockGroups];  ///< per 16 keys: bytes from a row to the one to ask for meanwhile
  std::int64_t ahead_v[kBlockGroups];
  std::int64_t count = 0;
};

/// Keys of a run of `keys` that lie between the one that is read and the one that is asked for: of a short run most
/// keys would be read before anybody had asked for them.
inline std::int64_t keys_ahead(const TileShape& shape, std::int64_t keys) {
  const std::int64_t most = kRunAhead / (shape.head_dim * static_cast<std::int64_t>(size_of(shape.dtype)));
  return std::min(most, std::max(kDecodeKeys, keys / 8));
}

/// Numbers per step: rows are read two vectors at a time.
constexpr std::int64_t kPair = 2 * kLanes;

/// The rows to ask for meanwhile, line after line: in the order of memory, whatever part of the rows a product is at,
/// because the machine then reads on by itself. Into L2: its queue of misses is longer than that of L1. A few lines at
/// a time, between products: a burst would hold up the loads behind it.
class RowWalk {
 public:
  RowWalk(const std::byte* const* rows, const std::int64_t* ahead, std::int64_t row_bytes, std::int64_t count)
      : rows_(rows),
        ahead_(ahead),
        lines_(static_cast<std::uint32_t>((row_bytes + line_bytes - 1) / line_bytes)),
        count_(static_cast<std::uint32_t>(count)) {
    start_row();
  }

  [[gnu::always_inline]] inline void ask_for_lines(std::int64_t lines) {
    for (std::int64_t i = 0; i < lines; ++i) {
      __builtin_prefetch(next_, 0, 2);
      next_ += line_bytes;
      if (--left_ != 0) continue;
      if (key_ + 1 < count_) ++key_;
      start_row();
    }
  }

 private:
  static constexpr std::int64_t line_bytes = 64;

  [[gnu::always_inline]] inline void start_row() {
    next_ = rows_[key_] + ahead_[key_ / kGroupKeys];
    left_ = lines_;
  }

  const std::byte* const* rows_;
  const std::int64_t* ahead_;
  std::uint32_t lines_;  ///< of a row
  std::uint32_t count_;
  std::uint32_t key_ = 0;
  std::uint32_t left_ = 0;  ///< lines of the row at key_
  const std::byte* next_ = nullptr;
};

inline RowWalk walk_values(const TileShape& shape, const DecodeBlock& block) {
  return {block.v, block.ahead_v, shape.value_dim * static_cast<std::int64_t>(size_of(shape.dtype)), block.count};
}

inline RowWalk walk_keys(const TileShape& shape, const DecodeBlock& block) {
  return {block.k, block.ahead_k, shape.head_dim * static_cast<std::int64_t>(size_of(shape.dtype)), block.count};
}

#if defined(TESSERA_LEVEL_BF16)
/// scores[r][key] for `rows` rows and all keys of the block, by products of bf16 pairs, which are exact.
template <int rows>
inline void decode_scores_of_pairs(const TileShape& shape, const std::uint32_t* const* q_rows, const DecodeBlock& block,
                                   float* scores) {
  constexpr std::int64_t vector_words = 16;
  const std::int64_t whole = shape.storage_words / vector_words * vector_words;
  const auto tail_bytes = static_cast<std::size_t>(shape.head_dim - 2 * whole) * sizeof(std::uint16_t);
  RowWalk walk = walk_keys(shape, block);
  for (std::int64_t key = 0; key < block.count; key += 4) {
    const std::byte* k[4];
    for (int i = 0; i < 4; ++i) k[i] = block.k[std::min(key + i, block.count - 1)];
    Vec acc[rows][4];
    const auto multiply = [&](const Vec(&x)[4], std::int64_t word) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Vec q = load_words(q_rows[r] + word);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = PairProduct::multiply_add(q, x[i], acc[r][i]);
      }
    };
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = zero();
    }
    for (std::int64_t word = 0; word < whole; word += vector_words) {
      Vec x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        x[i] = load_words(reinterpret_cast<const std::uint32_t*>(k[i]) + word);
      }
      walk.ask_for_lines(4);
      multiply(x, word);
    }
    if (tail_bytes > 0) {
      Vec x[4];
      for (int i = 0; i < 4; ++i) {
        std::uint32_t words[vector_words] = {};
        std::memcpy(words, k[i] + whole * sizeof(std::uint32_t), tail_bytes);
        x[i] = load_words(words);
      }
      multiply(x, whole);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) reduce_add4(acc[r], scores + r * kBlockKeys + key);
  }
}
#endif

/// scores[r][key] for `rows` rows and all keys of the block; q_rows are in the order of load_storage_pair.
template <DType dtype, int rows>
inline void decode_scores(const TileShape& shape, const std::uint32_t* const* q_rows, const DecodeBlock& block,
                          float* scores) {
  constexpr std::int64_t element = dtype == DType::f32 ? 4 : 2;
  const std::int64_t whole = shape.head_dim / kPair * kPair;
  // Channels behind the last whole pair of vectors are one more pair, filled up with zeros.
  const auto tail_bytes = static_cast<std::size_t>((shape.head_dim - whole) * element);
  alignas(64) float q_tail[rows][kPair] = {};
  alignas(64) std::byte k_tail[2][kPair * element] = {};
  for (std::int64_t d = whole; d < shape.head_dim; ++d) {
    for (int r = 0; r < rows; ++r) {
      q_tail[r][paired_place(dtype, d - whole)] = reinterpret_cast<const float*>(q_rows[r])[d];
    }
  }
  RowWalk walk = walk_keys(shape, block);
  for (std::int64_t key = 0; key < block.count; key += 2) {
    const std::byte* k0 = block.k[key];
    const std::byte* k1 = block.k[std::min(key + 1, block.count - 1)];
    constexpr int fours = (rows + 3) / 4;
    Vec acc0[fours][4];
    Vec acc1[fours][4];
#pragma GCC unroll 8
    for (int r = 0; r < 4 * fours; ++r) acc0[r / 4][r % 4] = acc1[r / 4][r % 4] = zero();
    const auto multiply = [&](const std::byte* first, const std::byte* second, std::int64_t d, const auto& q_at) {
      Vec x0[2];
      Vec x1[2];
      load_storage_pair<dtype>(first, d, x0[0], x0[1]);
      load_storage_pair<dtype>(second, d, x1[0], x1[1]);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const float* q = q_at(r);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const Vec factor = load(q + half * kLanes);
          acc0[r / 4][r % 4] = fma(factor, x0[half], acc0[r / 4][r % 4]);
          acc1[r / 4][r % 4] = fma(factor, x1[half], acc1[r / 4][r % 4]);
        }
      }
    };
    for (std::int64_t d = 0; d < whole; d += kPair) {
      multiply(k0, k1, d, [&](int r) { return reinterpret_cast<const float*>(q_rows[r]) + d; });
      walk.ask_for_lines(2 * kPair * element / 64);
    }
    if (tail_bytes > 0) {
      std::memcpy(k_tail[0], k0 + whole * element, tail_bytes);
      std::memcpy(k_tail[1], k1 + whole * element, tail_bytes);
      multiply(k_tail[0], k_tail[1], 0, [&](int r) { return q_tail[r]; });
    }
    float dot0[4 * fours];
    float dot1[4 * fours];
#pragma GCC unroll 2
    for (int four = 0; four < fours; ++four) {
      reduce_add4(acc0[four], dot0 + 4 * four);
      reduce_add4(acc1[four], dot1 + 4 * four);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      scores[r * kBlockKeys + key] = dot0[r];
      scores[r * kBlockKeys + key + 1] = dot1[r];
    }
  }
}

/// output[r] += probabilities[r] . values; output columns are in the order of load_storage_pair.
template <DType dtype, int rows>
inline void decode_output(const TileShape& shape, const DecodeBlock& block, const float* probabilities,
                          float* const* output) {
  constexpr std::int64_t step_bytes = kPair * (dtype == DType::f32 ? 4 : 2);
  RowWalk walk = walk_values(shape, block);
  const std::int64_t whole = shape.value_dim / kPair * kPair;
  for (std::int64_t c = 0; c < whole; c += kPair) {
    Vec acc[rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      acc[r][0] = load(output[r] + c);
      acc[r][1] = load(output[r] + c + kLanes);
    }
    for (std::int64_t key = 0; key < block.count; ++key) {
      Vec v[2];
      load_storage_pair<dtype>(block.v[key], c, v[0], v[1]);
      walk.ask_for_lines(step_bytes >= 64 ? step_bytes / 64 : key % 2);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Vec p = set1(probabilities[r * kBlockKeys + key]);
        acc[r][0] = fma(p, v[0], acc[r][0]);
        acc[r][1] = fma(p, v[1], acc[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      store(output[r] + c, acc[r][0]);
      store(output[r] + c + kLanes, acc[r][1]);
    }
  }
  for (std::int64_t c = whole; c < shape.value_dim; ++c) {
    for (int r = 0; r < rows; ++r) {
      for (std::int64_t key = 0; key < block.count; ++key) {
        output[r][c] += probabilities[r * kBlockKeys + key] * load_as_float(block.v[key], dtype, c);
      }
    }
  }
}

/// Numbers of a row of `count`, into the order of load_storage_pair or back.
inline void reorder_pairs(DType dtype, std::int64_t count, bool back, float* row) {
  float natural[kPair];
  for (std::int64_t begin = 0; begin + kPair <= count; begin += kPair) {
    std::memcpy(natural, row + begin, sizeof natural);
    for (std::int64_t i = 0; i < kPair; ++i) {
      const std::int64_t place = paired_place(dtype, i);
      row[begin + (back ? i : place)] = natural[back ? place : i];
    }
  }
}

/// A masked pair has probability 0; its value must not be read, for it may be NaN.
inline void decode_output_slow(const TileShape& shape, const DecodeBlock& block, const TileScratch& scratch,
                               std::int64_t rows) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t key = 0; key < block.count; ++key) {
      const float p = scratch.probabilities[row * kBlockKeys + key];
      if (p == 0) continue;
      const std::int64_t whole = shape.value_dim / kPair * kPair;
      for (std::int64_t c = 0; c < shape.value_dim; ++c) {
        const std::int64_t place = c < whole ? c / kPair * kPair + paired_place(shape.dtype, c % kPair) : c;
        scratch.output_rows[row][place] += p * load_as_float(block.v[key], shape.dtype, c);
      }
    }
  }
}

inline bool any_value_nonfinite(const TileShape& shape, const DecodeBlock& block) {
  for (std::int64_t key = 0; key < block.count; ++key) {
    for (std::int64_t c = 0; c < shape.value_dim; ++c) {
      const float x = load_as_float(block.v[key], shape.dtype, c);
      if (x - x != 0) return true;
    }
  }
  return false;
}

/// Writes the scores of one row to the caller's by-product.
inline void dump_scores(const Call& call, const ScoreRule& rule, const TileJob& job, const TileScratch& scratch,
                        std::int64_t row) {
  const std::int64_t batch = call.problem().tensor_batch_of(job.sequence);
  auto* out = reinterpret_cast<float*>(call.outputs.scores.row(batch, scratch.head[row], scratch.query[row]));
  const Vec to_natural = set1(rule.to_log2 * std::numbers::ln2_v<float>);
  for (std::int32_t g = 0; g < scratch.group_count; ++g) {
    if (scratch.key_source[g] != nullptr) continue;
    const KeyGroup& group = scratch.groups[g];
    const std::int32_t* keys = scratch.keys + g * kGroupKeys;
    alignas(64) float natural[kGroupKeys];
    for (int lane = 0; lane < kGroupKeys; lane += kLanes) {
      store(natural + lane, mul(load(scratch.scores + row * kBlockKeys + g * kGroupKeys + lane), to_natural));
    }
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      if ((group.lanes >> lane & 1U) != 0 && natural[lane] != kMinusInfinity) out[keys[lane]] = natural[lane];
    }
  }
}

inline void decode_all_scores(const TileShape& shape, const DecodeBlock& block, const TileScratch& scratch,
                              std::int64_t rows) {
#if defined(TESSERA_LEVEL_BF16)
  if (shape.pair_product) {
    for (std::int64_t first = 0; first < rows; first += kDecodePairRows) {
      with_count<kDecodePairRows>(std::min<std::int64_t>(kDecodePairRows, rows - first), [&](auto count) {
        decode_scores_of_pairs<count()>(shape, scratch.q_rows + first, block, scratch.scores + first * kBlockKeys);
      });
    }
    return;
  }
#endif
  with_dtype(shape.dtype, [&](auto dtype) {
    for (std::int64_t first = 0; first < rows; first += kDecodeRows) {
      with_count<kDecodeRows>(std::min<std::int64_t>(kDecodeRows, rows - first), [&](auto count) {
        decode_scores<decltype(dtype)::value, count()>(shape, scratch.q_rows + first, block,
                                                       scratch.scores + first * kBlockKeys);
      });
    }
  });
}

inline void process_decode_block(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                                 TileScratch& scratch, DecodeBlock& block, std::int64_t rows) {
  if (block.count == 0) return;
  decode_all_scores(shape, block, scratch, rows);
  const std::int64_t columns = (block.count + kLanes - 1) / kLanes * kLanes;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (rule.modified) modify_row(call, rule, job, scratch, row);
    if (scratch.any_masked) {
      for (std::int32_t g = 0; g < scratch.group_count; ++g) {
        if (scratch.groups[g].masked) mask_group(scratch, scratch.groups[g], g, row);
      }
    }
    for (std::int64_t c = block.count; c < columns; ++c) scratch.scores[row * kBlockKeys + c] = kMinusInfinity;
    if (call.outputs.scores.data != nullptr) dump_scores(call, rule, job, scratch, row);
  }
  if (rule.weights == RowWeights::softmax) {
    with_product(shape, [&](auto scores) {
      softmax_rows<FloatProduct, decltype(scores)>(rule, shape, scratch, 0, rows, columns);
    });
  } else {
    for (std::int64_t row = 0; row < rows; ++row) weigh_row<FloatProduct>(call, rule, job, scratch, row, columns);
  }
  if (scratch.any_masked && any_value_nonfinite(shape, block)) {
    decode_output_slow(shape, block, scratch, rows);
  } else {
    with_dtype(shape.dtype, [&](auto dtype) {
      for (std::int64_t first = 0; first < rows; first += kDecodeRows) {
        with_count<kDecodeRows>(std::min<std::int64_t>(kDecodeRows, rows - first), [&](auto count) {
          decode_output<decltype(dtype)::value, count()>(shape, block, scratch.probabilities + first * kBlockKeys,
                                                         scratch.output_rows + first);
        });
      }
    });
  }
  block.count = 0;
  scratch.group_count = 0;
  scratch.any_masked = false;
}

/// Adds up to 16 keys of an entry to the block as one group; the caller starts every group on a multiple of 16.
inline void add_decode_group(const Call& call, const TileShape& shape, const TileJob& job, const PlanEntry& entry,
                             const PackedSource& source, std::int64_t first, std::int64_t count, std::int32_t lowest,
                             std::int32_t highest, TileScratch& scratch, DecodeBlock& block) {
  const Plan& plan = call.plan;
  const Plan::KeyRange range = plan.keys_of(entry, job.block);
  const std::int32_t* list = entry.kind == EntryKind::gather ? plan.tokens.data() + range.begin : nullptr;
  const std::int32_t* order = nullptr;
  if (entry.source == 0 && !plan.key_order.empty() && !plan.key_order.data()[job.block].empty()) {
    order = plan.key_order.data()[job.block].data();
  }
  const bool scattered = list != nullptr || order != nullptr;
  const std::int32_t g = scratch.group_count;
  KeyGroup& group = scratch.groups[g];
  std::int32_t* keys = scratch.keys + g * kGroupKeys;
  const std::int64_t later = first + keys_ahead(shape, range.count);
  const bool known = !scattered && later < range.count;
  block.ahead_k[g] = known ? source.k.row(range.begin + later) - source.k.row(range.begin + first) : 0;
  block.ahead_v[g] = known ? source.v.row(range.begin + later) - source.v.row(range.begin + first) : 0;
  const std::byte** k_rows = block.k + block.count;
  const std::byte** v_rows = block.v + block.count;
  if (scattered) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t place = list != nullptr ? list[first + i] : range.begin + first + i;
      const std::int64_t key = order != nullptr ? order[place] : place;
      k_rows[i] = source.k.row(key);
      v_rows[i] = source.v.row(key);
      keys[i] = static_cast<std::int32_t>(key);
    }
    group.first_key = *std::min_element(keys, keys + count);
    group.last_key = *std::max_element(keys, keys + count);
  } else {
    // Runs of rows at one distance: the whole group, or its part of a page.
    for (std::int64_t i = 0, run = 0; i < count; i += run) {
      const std::int64_t key = range.begin + first + i;
      run = source.k.contiguous_from(key, count - i);
      const std::byte* k = source.k.row(key);
      const std::byte* v = source.v.row(key);
      for (std::int64_t j = 0; j < run; ++j) {
        k_rows[i + j] = k + j * source.k.row_bytes;
        v_rows[i + j] = v + j * source.v.row_bytes;
        keys[i + j] = static_cast<std::int32_t>(key + j);
      }
    }
    group.first_key = keys[0];
    group.last_key = keys[count - 1];
  }
  for (std::int64_t i = count; i < kGroupKeys; ++i) keys[i] = keys[0];
  group.lanes = 0xffffU >> (kGroupKeys - count);
  group.slow_value = false;
  const EntryLimits limits = limits_of(plan, entry, range.count);
  group.left = limits.left;
  group.right = limits.right;
  group.bits = limits.bits;
  group.bit_words = limits.bit_words;
  group.first_bit = first;
  const bool inside = group.last_key <= static_cast<std::int64_t>(lowest) + group.right &&
                      group.first_key >= static_cast<std::int64_t>(highest) - group.left;
  group.masked = group.bits != nullptr || !inside || count != kGroupKeys;
  scratch.any_masked = scratch.any_masked || group.bits != nullptr || !inside;
  scratch.key_source[g] = entry.source == 0 ? nullptr : &source;
  if (entry.source != 0) store_log_weights(source, group.lanes, keys, scratch.key_log_weight + g * kGroupKeys);
  ++scratch.group_count;
  block.count += count;
}

/// The keys of a run that no key before them asks for.
inline void ask_for_first_keys(const TileShape& shape, const Plan::KeyRange& range, const PackedSource& source) {
  struct Run {
    std::int64_t begin;
    std::int64_t operator[](std::int64_t i) const { return begin + i; }
  };
  prefetch_listed(shape, source, Run{range.begin}, 0, std::min(range.count, keys_ahead(shape, range.count)));
}

void attend_piece(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                  const SplitPiece& piece, const PackedSource* sources, TileScratch& scratch, float* maximum,
                  float* sum, float* output) {
  const Plan& plan = call.plan;
  const std::int64_t rows = job.rows();
  stage_rows(call, shape, rule, job, 0, rows, scratch);
  for (std::int64_t r = 0; r < rows && !shape.pair_product; ++r) {
    reorder_pairs(shape.dtype, shape.head_dim, false, reinterpret_cast<float*>(scratch.q + r * scratch.q_stride));
  }
  const std::int32_t lowest = *std::min_element(scratch.position, scratch.position + rows);
  const std::int32_t highest = *std::max_element(scratch.position, scratch.position + rows);
  DecodeBlock block;
  scratch.group_count = 0;
  scratch.any_masked = false;
  std::int64_t remaining = piece.keys;
  std::int64_t offset = piece.offset;
  for (std::int64_t e = piece.first_entry; remaining > 0; ++e) {
    const PlanEntry& entry = plan.entries.data()[e];
    const std::int64_t end = std::min(plan.keys_of(entry, job.block).count, offset + remaining);
    const PackedSource& source = sources[entry.source];
    const std::int64_t asked_from = offset;
    if (entry.kind != EntryKind::gather && offset == 0) {
      ask_for_first_keys(shape, plan.keys_of(entry, job.block), source);
    }
    while (offset < end) {
      // Groups start on multiples of 16 columns: a short group closes the block.
      const std::int64_t count = std::min(kGroupKeys, end - offset);
      if (entry.kind == EntryKind::gather) {
        const std::int32_t* list = plan.tokens.data() + entry.begin;
        const std::int64_t ahead = offset == asked_from ? 0 : kListAhead;
        prefetch_listed(shape, source, list, std::min(offset + ahead, end),
                        std::min(offset + kListAhead + kGroupKeys, end));
      }
      add_decode_group(call, shape, job, entry, source, offset, count, lowest, highest, scratch, block);
      offset += count;
      remaining -= count;
      if (block.count == kDecodeKeys || count != kGroupKeys) {
        process_decode_block(call, shape, rule, job, scratch, block, rows);
      }
    }
    offset = 0;
  }
  process_decode_block(call, shape, rule, job, scratch, block, rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    reorder_pairs(shape.dtype, shape.value_dim, true, scratch.output + r * shape.value_columns);
  }
  std::memcpy(maximum, scratch.maximum, static_cast<std::size_t>(rows) * sizeof(float));
  std::memcpy(sum, scratch.sum, static_cast<std::size_t>(rows) * sizeof(float));
  std::memcpy(output, scratch.output, static_cast<std::size_t>(rows * shape.value_columns) * sizeof(float));
}

void merge_pieces(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                  std::int64_t pieces, const float* maximum, const float* sum, float* output) {
  const std::int64_t rows = job.rows();
  for (std::int64_t r = 0; r < rows; ++r) {
    float highest = kMinusInfinity;
    for (std::int64_t p = 0; p < pieces; ++p) highest = std::max(highest, maximum[p * rows + r]);
    float total = 0;
    float* joined = output + r * shape.value_columns;  // piece 0
    for (std::int64_t p = 0; p < pieces; ++p) {
      const float own = maximum[p * rows + r];
      // A piece without allowed keys weighs nothing; its sum is 0 unless it holds NaN, which must survive.
      const float factor = own == kMinusInfinity ? 1.0F : std::exp2((own - highest) * rule.to_log2);
      total += sum[p * rows + r] * factor;
      const float* part = output + (p * rows + r) * shape.value_columns;
      for (std::int64_t c = 0; c < shape.value_columns; c += kLanes) {
        const Vec scaled = mul(load(part + c), set1(factor));
        store(joined + c, p == 0 ? scaled : add(load(joined + c), scaled));
      }
    }
    finish_row(call, shape, rule, job.sequence, job.first_head + r / job.places, query_of_row(call, job, r), highest,
               total, joined);
  }
}
