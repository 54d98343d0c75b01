// Backward: gradients of tiles of query rows. Included once per level.
//
// Everything is done with keys as rows and queries as columns. S^T = K Q^T and dP^T = V dO^T read keys and values as
// they lie in memory and the tile's queries as panels that are packed once; P^T and dS^T then lie as the products
// dV += P^T dO and dK += dS^T Q read them, and dS^T is turned round, 16 x 16 at a time, for dQ += dS K. LSE and delta
// are one number per column.

/// Products without anything in their shadow.
struct NoShadow {
  void step() const {}
};

/// Copies a row as compute words, zero up to the stride. Returns false, and a row of zeros, when it holds NaN or Inf.
inline bool stage_backward_row(const BackwardShape& shape, const std::byte* row, DType dtype, std::int64_t dim,
                               std::int64_t stride, std::uint32_t* out) {
  Vec difference = zero();  // x - x is 0 for finite numbers and NaN otherwise
  if (shape.pair_product) {
    auto* halves = reinterpret_cast<std::uint16_t*>(out);
    std::memcpy(halves, row, static_cast<std::size_t>(dim) * sizeof(std::uint16_t));
    std::fill(halves + dim, halves + 2 * stride, std::uint16_t{0});
    for (std::int64_t w = 0; w < stride; w += kLanes) {
      Vec even;
      Vec odd;
      split_bf16_words(out + w, even, odd);
      difference = add(difference, add(sub(even, even), sub(odd, odd)));
    }
  } else {
    auto* floats = reinterpret_cast<float*>(out);
    const std::int64_t whole = dim / kLanes * kLanes;
    with_dtype(dtype, [&](auto type) {
      for (std::int64_t d = 0; d < whole; d += kLanes) store(floats + d, load_storage<decltype(type)::value>(row, d));
    });
    for (std::int64_t d = whole; d < stride; ++d) floats[d] = d < dim ? load_as_float(row, dtype, d) : 0.0F;
    for (std::int64_t d = 0; d < stride; d += kLanes) {
      const Vec x = load(floats + d);
      difference = add(difference, sub(x, x));
    }
  }
  if (reduce_add(difference) == 0) return true;
  std::fill(out, out + stride, 0U);
  return false;
}

/// A row as compute words: where it lies in memory if it lies there as such, else a copy in `staged`.
inline const std::byte* words_of_row(const BackwardShape& shape, const std::byte* row, DType dtype, std::int64_t dim,
                                     std::int64_t stride, std::uint32_t* staged) {
  if (shape.pair_product ? dim % 2 == 0 : dtype == DType::f32) return row;
  stage_backward_row(shape, row, dtype, dim, stride, staged);
  return reinterpret_cast<const std::byte*>(staged);
}

/// Numbers of row r of the tile. Padding has no weight.
inline void stage_row_numbers(const BackwardJobContext& context, std::int64_t sequence, std::int64_t r,
                              const TileScratch& scratch, BackwardScratch& own) {
  const Call& call = context.call.call;
  const auto& slopes = call.inputs.modifiers.alibi_slopes;
  const auto& query_scale = call.inputs.modifiers.query_scale;
  const std::int64_t head = scratch.head[r];
  const std::int64_t index = call.lse_index(sequence, head, scratch.query[r]);
  own.shift[r] = context.rows.shifts[index];
  own.delta[r] = context.rows.deltas[index];
  own.slope[r] = slopes.empty() ? 0.0F : slopes.data()[head];
  own.query_scale[r] =
      query_scale.empty() ? 1.0F : query_scale.data()[call.problem().q_begin_of(sequence) + scratch.query[r]];
  if (context.rule.weights == RowWeights::softmax) return;
  own.inverse_sum[r] = own.shift[r] == kMinusInfinity ? 0.0F : std::exp2(own.shift[r]);
  own.weight_factor[r] =
      context.rule.weights == RowWeights::reweighted ? call.inputs.modifiers.weight_factors.data()[index] : 1.0F;
}

/// Packs the rows whose query, head, position and place in the tile the scratch holds, for both kinds of product; pads
/// them to whole slabs of 16.
inline void stage_backward_rows(const BackwardJobContext& context, std::int64_t sequence, std::int64_t rows,
                                TileScratch& scratch, BackwardScratch& own) {
  const BackwardShape& shape = context.shape;
  const Call& call = context.call.call;
  const TensorView& q = call.inputs.q;
  const TensorView& d_o = context.call.saved.d_o;
  own.slabs = static_cast<std::int32_t>((rows + 15) / 16);
  std::memset(own.d_weight_factor, 0, kTileRows * sizeof(float));
  for (std::int64_t slab = 0; slab < own.slabs; ++slab) {
    const std::byte* q_rows[16];
    const std::byte* o_rows[16];
    for (std::int64_t i = 0; i < 16; ++i) {
      const std::int64_t r = slab * 16 + i;
      q_rows[i] = o_rows[i] = own.zero_row;
      if (r >= rows) {
        scratch.position[r] = scratch.position[rows - 1];
        scratch.head[r] = scratch.head[rows - 1];
        own.delta[r] = 0;
        own.shift[r] = kMinusInfinity;
        own.slope[r] = own.query_scale[r] = own.inverse_sum[r] = own.weight_factor[r] = 0;
        continue;
      }
      stage_row_numbers(context, sequence, r, scratch, own);
      if (!std::isfinite(own.shift[r])) continue;
      q_rows[i] = words_of_row(shape, call.query_row(q, sequence, scratch.head[r], scratch.query[r]), q.dtype,
                               shape.queries.value_dim, shape.query_stride, own.q_rows + i * shape.query_stride);
      o_rows[i] = words_of_row(shape, call.query_row(d_o, sequence, scratch.head[r], scratch.query[r]), d_o.dtype,
                               shape.outputs.value_dim, shape.output_stride, own.o_rows + i * shape.output_stride);
    }
    const std::int32_t* position = scratch.position + slab * 16;
    own.slab_lowest[slab] = *std::min_element(position, position + 16);
    own.slab_highest[slab] = *std::max_element(position, position + 16);
    pack_key_panel(q_rows, shape.query_words * 4, own.q_panels + slab * shape.query_stride * 16);
    pack_key_panel(o_rows, shape.output_words * 4, own.o_panels + slab * shape.output_stride * 16);
    stage_value_panel(q_rows, shape.queries, own.q_values + slab * shape.queries.v_panel);
    stage_value_panel(o_rows, shape.outputs, own.o_values + slab * shape.outputs.v_panel);
  }
}

inline std::int64_t source_of_group(const TileScratch& scratch, const PackedSource* sources, std::int64_t g) {
  return scratch.key_source[g] == nullptr ? 0 : scratch.key_source[g] - sources;
}

/// Stages the collected groups as rows, and their keys as value panels.
inline void stage_backward_keys(const BackwardJobContext& context, const TileScratch& scratch, BackwardScratch& own) {
  const BackwardShape& shape = context.shape;
  for (std::int64_t g = 0; g < scratch.group_count; ++g) {
    const KeyGroup& group = scratch.groups[g];
    const std::int64_t index = source_of_group(scratch, context.sources, g);
    const PackedSource& source = context.sources[index];
    const std::uint32_t nan = shape.pair_product ? 0x7fc0U : 0x7fc00000U;
    std::uint32_t spoiled = 0;
    const std::byte* k_rows[kGroupKeys];
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      const std::int64_t column = g * kGroupKeys + lane;
      const std::int32_t key = scratch.keys[column];
      std::uint32_t* k = own.k_rows + column * shape.query_stride;
      std::uint32_t* v = own.v_rows + column * shape.output_stride;
      k_rows[lane] = reinterpret_cast<const std::byte*>(k);
      if ((group.lanes >> lane & 1U) == 0) {
        std::fill(k, k + shape.query_stride, 0U);
        std::fill(v, v + shape.output_stride, 0U);
        continue;
      }
      if (!stage_backward_row(shape, source.k.row(key), source.k.dtype, shape.queries.value_dim, shape.query_stride,
                              k)) {
        spoiled |= 1U << lane;
      }
      if (!stage_backward_row(shape, source.v.row(key), source.v.dtype, shape.outputs.value_dim, shape.output_stride,
                              v)) {
        v[0] = nan;
      }
    }
    stage_value_panel(k_rows, shape.queries, own.k_values + g * shape.queries.v_panel);
    // A key with NaN or Inf must not reach the rows that do not see it, where 0 * NaN is NaN: it is 0 in the panel. The
    // rows that do see it find a score of NaN. Likewise for values.
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      if ((spoiled >> lane & 1U) != 0) own.k_rows[(g * kGroupKeys + lane) * shape.query_stride] = nan;
    }
  }
}

/// Which columns see a key of a group, and what modifiers ask of it.
struct ColumnMask {
  std::uint32_t lanes;
  const KeyGroup* group;
  std::uint16_t bits[kGroupKeys][kTileRows / 16];  ///< of a bitmask
};

inline void read_column_bits(const TileScratch& scratch, std::int64_t rows, ColumnMask& mask) {
  if (mask.group->bits == nullptr) return;
  std::memset(mask.bits, 0, sizeof mask.bits);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::uint32_t lanes = row_lanes(*mask.group, scratch.row_in_tile[r]);
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      mask.bits[lane][r / 16] = static_cast<std::uint16_t>(mask.bits[lane][r / 16] | (lanes >> lane & 1U) << r % 16);
    }
  }
}

/// Columns [c, c + kLanes) that see key `lane` of the group.
inline Mask visible_columns(const TileScratch& scratch, const ColumnMask& mask, std::int64_t key, int lane,
                            std::int64_t c) {
  const std::int64_t lowest = std::max<std::int64_t>(key - mask.group->right, INT32_MIN);
  const std::int64_t highest = std::min<std::int64_t>(key + mask.group->left, INT32_MAX);
  const IntVec position = load_int(scratch.position + c);
  const Mask inside = both(not_less(position, set1_int(static_cast<std::int32_t>(lowest))),
                           not_less(set1_int(static_cast<std::int32_t>(highest)), position));
  std::uint32_t bits = (mask.lanes >> lane & 1U) != 0 ? 0xffffU : 0U;
  if (mask.group->bits != nullptr) bits &= mask.bits[lane][c / 16];
  return both(inside, mask_from_bits(bits >> c % 16));
}

/// Probability and score gradient of one key and kLanes columns.
struct PairGradient {
  Vec p;
  Vec d_score;    ///< by the score, before soft-cap and scale
  Vec d_product;  ///< by the (scaled) product q . k
  Vec d_factor;   ///< by the row's factor: reweighted rows
};

/// Rows that are no softmax: weight and its derivatives from a score, by the row's sum and times dP - delta.
inline void weigh_pair(const BackwardJobContext& context, const BackwardScratch& own, std::int64_t c, Vec score,
                       Vec d_probability, PairGradient& result) {
  constexpr float log2e = 1.4426950409F;
  const Modifiers& modifiers = context.call.call.inputs.modifiers;
  const Vec inverse_sum = load(own.inverse_sum + c);
  const Vec softplus_score = softplus(score);
  const Vec sigmoid = div(set1(1.0F), add(set1(1.0F), exp2(mul(score, set1(-log2e)))));
  const Vec by_weight = mul(inverse_sum, d_probability);
  if (context.rule.weights == RowWeights::softplus) {
    result.p = mul(softplus_score, inverse_sum);
    result.d_score = mul(sigmoid, by_weight);
    return;
  }
  const Vec factor = load(own.weight_factor + c);
  const Vec base = at_least(zero(), fma(softplus_score, factor, set1(-modifiers.weight_offset)));
  // base^(power - 1), which is 0 for base = 0 also where the power is 1.
  Vec lower = div(base, at_least(set1(std::numeric_limits<float>::min()), base));
  for (std::int32_t i = 1; i < modifiers.weight_power; ++i) lower = mul(lower, base);
  const Vec by_base = mul(mul(lower, set1(static_cast<float>(modifiers.weight_power))), by_weight);
  result.p = mul(mul(lower, base), inverse_sum);
  result.d_score = mul(mul(by_base, factor), sigmoid);
  result.d_factor = mul(by_base, softplus_score);
}

template <bool modified, class Product>
inline PairGradient gradient_of(const BackwardJobContext& context, std::int64_t sequence, const TileScratch& scratch,
                                const BackwardScratch& own, std::int64_t g, int lane, std::int64_t c) {
  const Modifiers& modifiers = context.call.call.inputs.modifiers;
  Vec score = load(own.scores + lane * kTileRows + c);
  Vec bend = set1(1.0F);
  if constexpr (modified) {
    bend = load(own.query_scale + c);
    score = mul(mul(score, set1(context.rule.to_natural)), bend);
    if (modifiers.softcap != 0) {
      const Vec t = tanh(mul(score, set1(1 / modifiers.softcap)));
      score = mul(t, set1(modifiers.softcap));
      bend = mul(bend, sub(set1(1.0F), mul(t, t)));
    }
    const std::int32_t key = scratch.keys[g * kGroupKeys + lane];
    if (scratch.key_source[g] != nullptr) {
      score = add(score, set1(scratch.key_log_weight[g * kGroupKeys + lane]));
    } else {
      const Vec distance = sub(set1(static_cast<float>(key)), to_float(load_int(scratch.position + c)));
      score = fma(load(own.slope + c), distance, score);
      if (modifiers.key_bias.data != nullptr && (scratch.groups[g].lanes >> lane & 1U) != 0) {
        alignas(64) float bias[kLanes];
        for (int i = 0; i < kLanes; ++i) bias[i] = context.call.call.key_bias(sequence, scratch.head[c + i], key);
        score = add(score, load(bias));
      }
    }
  }
  const Vec d_probability = sub(load(own.d_probabilities + lane * kTileRows + c), load(own.delta + c));
  PairGradient result;
  result.d_factor = zero();
  if (modified && context.rule.weights != RowWeights::softmax) {
    weigh_pair(context, own, c, score, d_probability, result);
  } else {
    const Vec exponent = fma(score, set1(context.rule.to_log2), load(own.shift + c));
    result.p = probability_of(exponent, Product{});
    result.d_score = mul(result.p, d_probability);
  }
  result.d_product = modified ? mul(result.d_score, bend) : result.d_score;
  return result;
}

inline void store_gradients(BackwardScratch& own, std::int64_t g, int lane, std::int64_t c, const PairGradient* pairs,
                            FloatProduct /*unused*/) {
  store(own.p_rows + lane * kTileRows + c, pairs[0].p);
  store(own.ds_rows + lane * kTileRows + c, pairs[0].d_product);
  auto* panel = reinterpret_cast<float*>(own.ds_panels) + g * kGroupKeys * kTileRows;
  store(panel + c / 16 * kGroupKeys * 16 + lane * 16 + c % 16, pairs[0].d_product);
}

#if defined(TESSERA_LEVEL_BF16)
inline void store_gradients(BackwardScratch& own, std::int64_t g, int lane, std::int64_t c, const PairGradient* pairs,
                            PairProduct /*unused*/) {
  auto* p = reinterpret_cast<std::uint16_t*>(own.p_rows) + lane * kTileRows + c;
  auto* ds = reinterpret_cast<std::uint16_t*>(own.ds_rows) + lane * kTileRows + c;
  store_bf16_two(p, p + kTileRows, pairs[0].p, pairs[1].p);
  store_bf16_two(ds, ds + kTileRows, pairs[0].d_product, pairs[1].d_product);
  std::uint32_t* panel = own.ds_panels + g * kGroupKeys / 2 * kTileRows;
  store_bf16_words(panel + (c / 16 * kGroupKeys / 2 + lane / 2) * 16, pairs[0].d_product, pairs[1].d_product);
}
#endif

/// Slabs [first, last) of columns that a group reaches.
struct SlabRange {
  std::int64_t first;
  std::int64_t last;
};

inline SlabRange slabs_reached(const BackwardScratch& own, const KeyGroup& group) {
  if (!group.masked) return {0, own.slabs};
  SlabRange range{own.slabs, 0};
  for (std::int64_t slab = 0; slab < own.slabs; ++slab) {
    if (!group_reaches(group, own.slab_lowest[slab], own.slab_highest[slab])) continue;
    range.first = std::min(range.first, slab);
    range.last = slab + 1;
  }
  return range;
}

/// P^T and dS^T of group g over the slabs, from the products in the scratch.
template <bool modified, class Product>
inline void group_gradients(const BackwardJobContext& context, std::int64_t sequence, const TileScratch& scratch,
                            std::int64_t rows, std::int64_t g, SlabRange slabs, BackwardScratch& own) {
  const KeyGroup& group = scratch.groups[g];
  ColumnMask mask;
  mask.lanes = group.lanes;
  mask.group = &group;
  if (group.masked) read_column_bits(scratch, rows, mask);
  for (int lane = 0; lane < kGroupKeys; lane += Product::keys_per_word) {
    for (std::int64_t c = slabs.first * 16; c < slabs.last * 16; c += kLanes) {
      PairGradient pairs[Product::keys_per_word];
#pragma GCC unroll 2
      for (int i = 0; i < Product::keys_per_word; ++i) {
        pairs[i] = gradient_of<modified, Product>(context, sequence, scratch, own, g, lane + i, c);
        if (group.masked) {
          const std::int64_t key = scratch.keys[g * kGroupKeys + lane + i];
          const Mask visible = visible_columns(scratch, mask, key, lane + i, c);
          pairs[i].p = select(visible, pairs[i].p, zero());
          pairs[i].d_product = select(visible, pairs[i].d_product, zero());
          if constexpr (modified) {
            pairs[i].d_score = select(visible, pairs[i].d_score, zero());
            pairs[i].d_factor = select(visible, pairs[i].d_factor, zero());
          }
        }
        if constexpr (modified) {
          if (context.rule.wants_bias) store(own.scores + (lane + i) * kTileRows + c, pairs[i].d_score);
          if (context.rule.weights == RowWeights::reweighted) {
            store(own.d_weight_factor + c, add(load(own.d_weight_factor + c), pairs[i].d_factor));
          }
        }
      }
      store_gradients(own, g, lane, c, pairs, Product{});
    }
  }
}

/// Asks for the sums of a group's keys, which are far apart in memory, in the shadow of its scores.
class SumsAhead {
 public:
  SumsAhead(const BackwardJobContext& context, const TileScratch& scratch, std::int64_t g) {
    const std::int64_t begin = context.lane.source_begin[source_of_group(scratch, context.sources, g)];
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      if ((scratch.groups[g].lanes >> lane & 1U) == 0) continue;
      rows_[count_++] = context.lane.keys + (begin + scratch.keys[g * kGroupKeys + lane]) * context.shape.row_floats;
    }
    floats_ = context.shape.row_floats;
  }
  [[gnu::always_inline]] inline void step() {
    for (int line = 0; line < lines_per_step && at_ < count_; ++line) {
      __builtin_prefetch(rows_[at_] + offset_, 0, 2);
      offset_ += 16;
      if (offset_ < floats_) continue;
      offset_ = 0;
      ++at_;
    }
  }

 private:
  static constexpr int lines_per_step = 6;  // all of them, for rows of any width
  const float* rows_[kGroupKeys];
  int count_ = 0;
  int at_ = 0;
  std::int64_t offset_ = 0;
  std::int64_t floats_;
};

/// Asks for the query rows that a key-major job takes next, which lie in no order: q, dO and the sums of dQ.
class RowsAhead {
 public:
  /// After row `row` of the queries and heads of `selection`; selections end at `end`.
  RowsAhead(const BackwardJobContext& context, const KeyMajorJob& job, const float* d_q, const Selection* selection,
            const Selection* end, std::int64_t row)
      : context_(context), job_(job), d_q_(d_q), selection_(selection), end_(end), row_(row) {}
  [[gnu::always_inline]] inline void step() {
    for (int line = 0; line < lines_per_step; ++line) {
      if (part_ == parts && !next_row()) return;
      __builtin_prefetch(at_[part_], 0, 2);
      at_[part_] += cache_line;
      if (at_[part_] >= end_of_[part_]) ++part_;
    }
  }

 private:
  static constexpr int lines_per_step = 6;  // a tile of rows during a tile of 64 keys
  static constexpr std::int64_t cache_line = 64;
  static constexpr int parts = 3;

  [[gnu::noinline]] bool next_row() {
    if (rows_left_ == 0) return false;
    const Call& call = context_.call.call;
    const std::int64_t tile_q = call.plan.tile_q;
    const std::int64_t rows = std::min(tile_q, job_.queries - selection_->plan_row * tile_q) * job_.heads;
    if (++row_ >= rows) {
      if (++selection_ == end_) {
        rows_left_ = 0;
        return false;
      }
      row_ = 0;
    }
    --rows_left_;
    const std::int64_t r = selection_->plan_row * tile_q * job_.heads + row_;
    const std::int64_t head = job_.first_head + r % job_.heads;
    const std::int64_t query = job_.first_query + r / job_.heads;
    const TensorView& q = call.inputs.q;
    const TensorView& d_o = context_.call.saved.d_o;
    part_ = 0;
    place(0, call.query_row(q, job_.sequence, head, query), q.dim() * static_cast<std::int64_t>(size_of(q.dtype)));
    place(1, call.query_row(d_o, job_.sequence, head, query),
          d_o.dim() * static_cast<std::int64_t>(size_of(d_o.dtype)));
    const std::int64_t width = context_.shape.queries.value_columns;
    place(2, reinterpret_cast<const std::byte*>(d_q_ + r * width), width * static_cast<std::int64_t>(sizeof(float)));
    return true;
  }
  void place(int part, const std::byte* row, std::int64_t bytes) {
    at_[part] = row;
    end_of_[part] = row + bytes;
  }

  const BackwardJobContext& context_;
  const KeyMajorJob& job_;
  const float* d_q_;
  const Selection* selection_;
  const Selection* end_;
  std::int64_t row_;
  std::int64_t rows_left_ = kTileRows;
  const std::byte* at_[parts];
  const std::byte* end_of_[parts];
  int part_ = parts;
};

/// What is asked for while scores are computed.
struct FetchAhead {
  SumsAhead sums;
  RowsAhead* rows;  ///< null: the rows stay
  [[gnu::always_inline]] inline void step() {
    sums.step();
    if (rows != nullptr) rows->step();
  }
};

/// product[key][column] = a[key] . panels for the 16 keys of a group.
template <class Product>
inline void group_products(const std::uint32_t* rows, std::int64_t stride, std::int64_t words,
                           const std::uint32_t* panels, SlabRange slabs, float* product, FetchAhead& shadow) {
  const std::uint32_t* a[kGroupKeys];
  for (int lane = 0; lane < kGroupKeys; ++lane) a[lane] = rows + lane * stride;
  for (std::int64_t slab = slabs.first; slab < slabs.last; slab += kRegisterPanels) {
    const std::int64_t count = std::min<std::int64_t>(kRegisterPanels, slabs.last - slab);
    const std::uint32_t* b[kRegisterPanels];
    for (std::int64_t p = 0; p < count; ++p) b[p] = panels + (slab + p) * stride * 16;
    for (std::int64_t first = 0, height = 0; first < kGroupKeys; first += height) {
      height = register_rows(kGroupKeys - first);
      with_count<kRegisterRows>(height, [&](auto row_count) {
        with_count<kRegisterPanels>(count, [&](auto panel_count) {
          score_rows<Product, row_count(), panel_count()>(a + first, b, words, product + first * kTileRows + slab * 16,
                                                          shadow);
        });
      });
    }
  }
}

/// output[row] += numbers[row] . panels for `rows` rows, all columns.
template <class Product>
inline void add_products(const float* numbers, const ValueGroups& groups, std::int64_t rows, std::int64_t first_slab,
                         std::int64_t last_slab, float* const* output) {
  NoShadow shadow;
  for (std::int64_t slab = first_slab; slab < last_slab; slab += kRegisterPanels) {
    const std::int64_t panels = std::min<std::int64_t>(kRegisterPanels, last_slab - slab);
    for (std::int64_t first = 0, count = 0; first < rows; first += count) {
      count = register_rows(rows - first);
      with_count<kRegisterRows>(count, [&](auto row_count) {
        with_count<kRegisterPanels>(panels, [&](auto panel_count) {
          output_rows<Product, row_count(), panel_count()>(numbers + first * kTileRows / Product::keys_per_word, groups,
                                                           slab, output + first, shadow);
        });
      });
    }
  }
}

/// Where the sums of a group's keys lie. Keys that repeat an earlier one get spare rows, added afterwards.
class GroupSums {
 public:
  GroupSums(const BackwardJobContext& context, const TileScratch& scratch, std::int64_t g, BackwardScratch& own)
      : context_(context) {
    const std::int64_t source = source_of_group(scratch, context.sources, g);
    const bool repeats = context.call.call.plan.sources.data()[source].repeats_allowed;
    const std::int64_t width = context.shape.row_floats;
    const std::int32_t* keys = scratch.keys + g * kGroupKeys;
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      repeat_of_[lane] = -1;
      if ((scratch.groups[g].lanes >> lane & 1U) == 0) {
        rows_[lane] = own.spare_rows + kGroupKeys * width;
        continue;
      }
      rows_[lane] = context.lane.keys + (context.lane.source_begin[source] + keys[lane]) * width;
      for (int earlier = 0; repeats && earlier < lane && repeat_of_[lane] < 0; ++earlier) {
        if (rows_[earlier] == rows_[lane]) repeat_of_[lane] = earlier;
      }
      if (repeat_of_[lane] < 0) continue;
      rows_[lane] = own.spare_rows + lane * width;
      std::memset(rows_[lane], 0, static_cast<std::size_t>(width) * sizeof(float));
    }
  }
  void rows_at(std::int64_t offset, float** out) const {
    for (int lane = 0; lane < kGroupKeys; ++lane) out[lane] = rows_[lane] + offset;
  }
  void finish() const {
    for (int lane = 0; lane < kGroupKeys; ++lane) {
      if (repeat_of_[lane] < 0) continue;
      float* to = rows_[repeat_of_[lane]];
      for (std::int64_t c = 0; c < context_.shape.row_floats; ++c) to[c] += rows_[lane][c];
    }
  }

 private:
  const BackwardJobContext& context_;
  float* rows_[kGroupKeys];
  int repeat_of_[kGroupKeys];
};

/// Sums of dS per key and head of the group: gradients of key bias and log-weights.
inline void add_bias_gradients(const BackwardJobContext& context, const TileScratch& scratch, std::int64_t rows,
                               std::int64_t g, SlabRange slabs, const BackwardScratch& own) {
  const std::int64_t source = source_of_group(scratch, context.sources, g);
  const std::int64_t group = context.call.problem().group();
  for (int lane = 0; lane < kGroupKeys; ++lane) {
    if ((scratch.groups[g].lanes >> lane & 1U) == 0) continue;
    float* bias = context.lane.bias + context.lane.source_begin[source] + scratch.keys[g * kGroupKeys + lane];
    for (std::int64_t c = slabs.first * 16; c < std::min(slabs.last * 16, rows); ++c) {
      bias[scratch.head[c] % group * context.lane.bias_stride] += own.scores[lane * kTileRows + c];
    }
  }
}

/// Words of dS^T of one group and 16 columns: [keys, or pairs of keys][16 columns].
template <class Product>
constexpr std::int64_t kTurnedWords = kGroupKeys / Product::keys_per_word * 16;

/// dS of 16 rows and the groups from the panels of dS^T: ds_turned[row][keys of the block] numbers.
template <class Product>
inline void turn_slab(std::int64_t slab, std::int64_t group_count, BackwardScratch& own) {
  constexpr std::int64_t words = kGroupKeys / Product::keys_per_word;  // of a group in a row
  constexpr std::int64_t groups = 16 / words;                          // turned together
  constexpr std::int64_t row_words = kBlockKeys / Product::keys_per_word;
  alignas(64) std::uint32_t turned[16 * 16];
  for (std::int64_t g = 0; g < group_count; g += groups) {
    const std::byte* rows[16];
    for (std::int64_t i = 0; i < 16; ++i) {
      const std::int64_t group = std::min(g + i / words, group_count - 1);
      const std::uint32_t* panel = own.ds_panels + (group * kTileRows / 16 + slab) * kTurnedWords<Product>;
      rows[i] = reinterpret_cast<const std::byte*>(panel + i % words * 16);
    }
    for (std::int64_t w = 0; w < 16; w += kTransposeWords) transpose_block(rows, w * 4, turned + w * 16);
    std::uint32_t* to = own.ds_turned + slab * 16 * row_words + g * words;
    for (std::int64_t r = 0; r < 16; ++r) std::memcpy(to + r * row_words, turned + r * 16, 16 * sizeof(std::uint32_t));
  }
}

/// dQ of the staged rows += dS K over the groups of the block; slabs that the same groups reach go together.
template <class Product>
inline void add_query_gradients(const BackwardShape& shape, const SlabRange* reached, std::int64_t group_count,
                                BackwardScratch& own, float* const* d_q) {
  const auto reaches = [&](std::int64_t g, std::int64_t slab) {
    return slab >= reached[g].first && slab < reached[g].last;
  };
  for (std::int64_t slab = 0, end = 0; slab < own.slabs; slab = end) {
    ValueGroups groups;
    groups.count = 0;
    for (std::int64_t g = 0; g < group_count; ++g) {
      if (!reaches(g, slab)) continue;
      groups.panels[groups.count] = own.k_values + g * shape.queries.v_panel;
      groups.column[groups.count] = static_cast<std::int32_t>(g * kGroupKeys);
      ++groups.count;
    }
    const auto same = [&](std::int64_t other) {
      for (std::int64_t g = 0; g < group_count; ++g) {
        if (reaches(g, slab) != reaches(g, other)) return false;
      }
      return true;
    };
    for (end = slab + 1; end < own.slabs && same(end);) ++end;
    if (groups.count == 0) continue;
    for (std::int64_t s = slab; s < end; ++s) turn_slab<Product>(s, group_count, own);
    const auto* numbers =
        reinterpret_cast<const float*>(own.ds_turned + slab * 16 * kBlockKeys / Product::keys_per_word);
    add_products<Product>(numbers, groups, (end - slab) * 16, 0, shape.queries.value_columns / 16, d_q + slab * 16);
  }
}

/// All gradients of `rows` staged rows against the staged groups; `d_q` has a row of floats for each of them and of
/// their padding.
template <class Product>
void backward_block(const BackwardJobContext& context, std::int64_t sequence, const TileScratch& scratch,
                    std::int64_t rows, BackwardScratch& own, float* const* d_q, RowsAhead* rows_ahead) {
  const BackwardShape& shape = context.shape;
  const std::int64_t key_columns = shape.queries.value_columns;
  SlabRange reached[kBlockGroups];
  for (std::int64_t g = 0; g < scratch.group_count; ++g) {
    const SlabRange slabs = slabs_reached(own, scratch.groups[g]);
    reached[g] = slabs;
    if (slabs.first >= slabs.last) continue;
    FetchAhead ahead{SumsAhead(context, scratch, g), rows_ahead};
    group_products<Product>(own.k_rows + g * kGroupKeys * shape.query_stride, shape.query_stride, shape.query_words,
                            own.q_panels, slabs, own.scores, ahead);
    group_products<Product>(own.v_rows + g * kGroupKeys * shape.output_stride, shape.output_stride, shape.output_words,
                            own.o_panels, slabs, own.d_probabilities, ahead);
    if (context.rule.modified) {
      group_gradients<true, Product>(context, sequence, scratch, rows, g, slabs, own);
      if (context.rule.wants_bias) add_bias_gradients(context, scratch, rows, g, slabs, own);
    } else {
      group_gradients<false, Product>(context, sequence, scratch, rows, g, slabs, own);
    }
    const GroupSums sums(context, scratch, g, own);
    float* output[kGroupKeys];
    ValueGroups queries;
    ValueGroups outputs;
    queries.count = outputs.count = static_cast<std::int32_t>(slabs.last - slabs.first);
    for (std::int32_t i = 0; i < queries.count; ++i) {
      const std::int64_t slab = slabs.first + i;
      queries.panels[i] = own.q_values + slab * shape.queries.v_panel;
      outputs.panels[i] = own.o_values + slab * shape.outputs.v_panel;
      queries.column[i] = outputs.column[i] = static_cast<std::int32_t>(slab * 16);
    }
    sums.rows_at(0, output);
    add_products<Product>(own.ds_rows, queries, kGroupKeys, 0, key_columns / 16, output);
    sums.rows_at(key_columns, output);
    add_products<Product>(own.p_rows, outputs, kGroupKeys, 0, shape.outputs.value_columns / 16, output);
    sums.finish();
  }
  if (context.call.gradients.d_q.data != nullptr) {
    add_query_gradients<Product>(shape, reached, scratch.group_count, own, d_q);
  }
}

/// out[0..count) = factor * numbers in any dtype, count <= 16 (numbers has 16).
inline void store_scaled(const float* numbers, float factor, std::int64_t count, DType dtype, std::byte* row,
                         std::int64_t at) {
  if (count < 16) {
    for (std::int64_t i = 0; i < count; ++i) store_from_float(row, dtype, at + i, numbers[i] * factor);
    return;
  }
  for (std::int64_t i = 0; i < 16; i += kLanes) {
    const Vec x = mul(load(numbers + i), set1(factor));
    if (dtype == DType::f32) {
      store(reinterpret_cast<float*>(row) + at + i, x);
    } else if (dtype == DType::bf16) {
      store_bf16(reinterpret_cast<std::uint16_t*>(row) + at + i, x);
    } else {
      store_f16(reinterpret_cast<std::uint16_t*>(row) + at + i, x);
    }
  }
}

/// row[0..dim) = factor * numbers, which have a whole number of 16.
inline void store_scaled_row(const float* numbers, float factor, std::int64_t dim, DType dtype, std::byte* row) {
  for (std::int64_t d = 0; d < dim; d += 16) {
    store_scaled(numbers + d, factor, std::min<std::int64_t>(16, dim - d), dtype, row, d);
  }
}

/// Adds what the staged rows gathered for their factors; a row belongs to one job.
inline void add_factor_gradients(const BackwardJobContext& context, std::int64_t sequence, const TileScratch& scratch,
                                 std::int64_t rows, const BackwardScratch& own) {
  const std::span<float>& out = context.call.gradients.d_weight_factors;
  for (std::int64_t r = 0; r < rows && !out.empty(); ++r) {
    out.data()[context.call.call.lse_index(sequence, scratch.head[r], scratch.query[r])] += own.d_weight_factor[r];
  }
}

void backward_tile(const BackwardJobContext& context, const TileJob& job, TileScratch& scratch, BackwardScratch& own) {
  const Call& call = context.call.call;
  const Plan& plan = call.plan;
  const MutableTensorView& d_q = context.call.gradients.d_q;
  const std::int64_t offset = call.problem().q_offset_of(job.sequence);
  const std::int64_t width = context.shape.queries.value_columns;
  float* d_q_rows[kTileRows];
  for (std::int64_t r = 0; r < kTileRows; ++r) d_q_rows[r] = own.d_q + r * width;
  with_product(context.shape.queries, [&](auto product) {
    for (std::int64_t first = 0; first < job.rows(); first += kTileRows) {
      const std::int64_t rows = std::min(kTileRows, job.rows() - first);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t query = query_of_row(call, job, first + r);
        scratch.query[r] = static_cast<std::int32_t>(query);
        scratch.position[r] = static_cast<std::int32_t>(offset + query);
        scratch.head[r] = static_cast<std::int32_t>(job.first_head + (first + r) / job.places);
        scratch.row_in_tile[r] = static_cast<std::int32_t>(job.first_place % plan.tile_q + (first + r) % job.places);
      }
      stage_backward_rows(context, job.sequence, rows, scratch, own);
      std::memset(own.d_q, 0, static_cast<std::size_t>(own.slabs * 16 * width) * sizeof(float));
      const auto flush = [&] {
        stage_backward_keys(context, scratch, own);
        backward_block<decltype(product)>(context, job.sequence, scratch, rows, own, d_q_rows, nullptr);
      };
      GroupCollector<decltype(flush)> groups(call, context.shape.keys, job.block, context.sources, scratch, flush);
      groups.set_positions(*std::min_element(scratch.position, scratch.position + rows),
                           *std::max_element(scratch.position, scratch.position + rows));
      groups.add_row(plan.entry_begin.data()[job.plan_row], plan.entry_begin.data()[job.plan_row + 1]);
      add_factor_gradients(context, job.sequence, scratch, rows, own);
      if (d_q.data == nullptr) continue;
      for (std::int64_t r = 0; r < rows; ++r) {
        store_scaled_row(d_q_rows[r], context.rule.to_natural, context.shape.queries.value_dim, d_q.dtype,
                         call.query_row(d_q, job.sequence, scratch.head[r], scratch.query[r]));
      }
    }
  });
}

void backward_key_major(const BackwardJobContext& context, const KeyMajorJob& job, const SelectionsByTile& selected,
                        TileScratch& scratch, BackwardScratch& own, float* d_q) {
  const Call& call = context.call.call;
  const Plan& plan = call.plan;
  const std::int64_t offset = call.problem().q_offset_of(job.sequence);
  const std::int64_t plan_row = plan.row_begin.data()[job.block] + job.first_query / plan.tile_q;
  const std::int64_t width = context.shape.queries.value_columns;
  const auto entry_of = [&](const Selection& s) -> const PlanEntry& {
    return plan.entries.data()[plan.entry_begin.data()[plan_row + s.plan_row] + s.entry];
  };
  std::memset(d_q, 0, static_cast<std::size_t>(job.queries * job.heads * width) * sizeof(float));
  with_product(context.shape.queries, [&](auto product) {
    const Selection* first = nullptr;  // the selections of one tile that share a mask
    const Selection* last = nullptr;
    const auto flush = [&] {
      stage_backward_keys(context, scratch, own);
      std::int64_t count = 0;
      float* d_q_rows[kTileRows];
      const auto process = [&](const Selection* selection, std::int64_t row) {
        RowsAhead ahead(context, job, d_q, selection, selected.selections + selected.begin[selected.tile_count], row);
        stage_backward_rows(context, job.sequence, count, scratch, own);
        std::fill(d_q_rows + count, d_q_rows + own.slabs * 16, own.d_q);  // padding
        backward_block<decltype(product)>(context, job.sequence, scratch, count, own, d_q_rows, &ahead);
        add_factor_gradients(context, job.sequence, scratch, count, own);
        count = 0;
      };
      for (const Selection* s = first; s != last; ++s) {
        const std::int64_t begin = s->plan_row * plan.tile_q;
        const std::int64_t end = std::min(begin + plan.tile_q, job.queries);
        for (std::int64_t r = begin * job.heads; r < end * job.heads; ++r) {
          const std::int64_t query = job.first_query + r / job.heads;
          scratch.query[count] = static_cast<std::int32_t>(query);
          scratch.position[count] = static_cast<std::int32_t>(offset + query);
          scratch.head[count] = static_cast<std::int32_t>(job.first_head + r % job.heads);
          scratch.row_in_tile[count] = static_cast<std::int32_t>(r / job.heads % plan.tile_q);
          d_q_rows[count] = d_q + r * width;
          if (++count == kTileRows) process(s, r - begin * job.heads);
        }
      }
      if (count > 0) process(last - 1, kTileRows * job.heads);
    };
    GroupCollector<decltype(flush)> groups(call, context.shape.keys, job.block, context.sources, scratch, flush);
    for (std::int64_t t = 0; t < selected.tile_count; ++t) {
      const Selection* end = selected.selections + selected.begin[t + 1];
      for (first = selected.selections + selected.begin[t]; first != end; first = last) {
        PlanEntry entry = entry_of(*first);
        last = first + 1;
        while (last != end && entry_of(*last).mask == entry.mask && entry_of(*last).mask_index == entry.mask_index) {
          ++last;
        }
        entry.begin = selected.tiles[t];
        entry.count = 1;
        const std::int64_t lowest = offset + job.first_query + first->plan_row * plan.tile_q;
        const std::int64_t highest = offset + job.first_query + ((last - 1)->plan_row + 1) * plan.tile_q - 1;
        groups.set_positions(static_cast<std::int32_t>(lowest), static_cast<std::int32_t>(highest));
        groups.add(entry, 0, plan.keys_of(entry, job.block).count);
        groups.finish();
      }
    }
  });
  const MutableTensorView& to = context.call.gradients.d_q;
  if (to.data == nullptr) return;
  const std::int64_t dim = context.shape.queries.value_dim;
  for (std::int64_t r = 0; r < job.queries * job.heads; ++r) {
    std::byte* row = call.query_row(to, job.sequence, job.first_head + r % job.heads, job.first_query + r / job.heads);
    store_scaled_row(d_q + r * width, context.rule.to_natural, dim, to.dtype, row);
  }
}

/// Whether all numbers of a row are finite.
inline bool is_finite_row(const std::byte* row, DType dtype, std::int64_t dim) {
  Vec difference = zero();  // x - x is 0 for finite numbers and NaN otherwise
  const std::int64_t whole = dim / kLanes * kLanes;
  with_dtype(dtype, [&](auto type) {
    for (std::int64_t d = 0; d < whole; d += kLanes) {
      const Vec x = load_storage<decltype(type)::value>(row, d);
      difference = add(difference, sub(x, x));
    }
  });
  bool finite = reduce_add(difference) == 0;
  for (std::int64_t d = whole; d < dim; ++d) finite = finite && std::isfinite(load_as_float(row, dtype, d));
  return finite;
}

void backward_row_numbers(const BackwardCall& backward, std::int64_t sequence, std::int64_t head, std::int64_t first,
                          std::int64_t last, const BackwardRows& rows) {
  constexpr float log2e = 1.4426950409F;
  const SavedForward& saved = backward.saved;
  const TensorView& q = backward.call.inputs.q;
  const std::int64_t dim = backward.problem().value_dim;
  const std::int64_t whole = dim / kLanes * kLanes;
  for (std::int64_t query = first; query < last; ++query) {
    const std::int64_t index = backward.call.lse_index(sequence, head, query);
    const float lse = saved.lse.data()[index];
    if (lse == kMinusInfinity) {
      rows.deltas[index] = 0;
      rows.shifts[index] = kMinusInfinity;
      continue;
    }
    const std::byte* o = backward.call.query_row(saved.o, sequence, head, query);
    const std::byte* d_o = backward.call.query_row(saved.d_o, sequence, head, query);
    Vec sum = zero();
    with_dtype(saved.o.dtype, [&](auto o_type) {
      with_dtype(saved.d_o.dtype, [&](auto d_o_type) {
        for (std::int64_t d = 0; d < whole; d += kLanes) {
          sum = fma(load_storage<decltype(o_type)::value>(o, d), load_storage<decltype(d_o_type)::value>(d_o, d), sum);
        }
      });
    });
    float total = reduce_add(sum);
    for (std::int64_t d = whole; d < dim; ++d) {
      total += load_as_float(o, saved.o.dtype, d) * load_as_float(d_o, saved.d_o.dtype, d);
    }
    rows.deltas[index] = total - (saved.d_lse.empty() ? 0.0F : saved.d_lse.data()[index]);
    // A row with NaN or Inf spoils the keys that it sees, and no others: its probabilities are NaN.
    const bool finite =
        is_finite_row(backward.call.query_row(q, sequence, head, query), q.dtype, backward.problem().head_dim) &&
        is_finite_row(d_o, saved.d_o.dtype, dim);
    rows.shifts[index] = finite ? -lse * log2e : std::numeric_limits<float>::quiet_NaN();
  }
}

void sum_lanes(const float* sums, std::int64_t lanes, std::int64_t lane_stride, float factor, std::int64_t count,
               DType dtype, std::byte* row) {
  for (std::int64_t d = 0; d < count; d += 16) {
    alignas(64) float total[16];
    for (int i = 0; i < 16; i += kLanes) {
      Vec sum = load(sums + d + i);
      for (std::int64_t lane = 1; lane < lanes; ++lane) sum = add(sum, load(sums + lane * lane_stride + d + i));
      store(total + i, sum);
    }
    store_scaled(total, factor, std::min<std::int64_t>(16, count - d), dtype, row, d);
  }
}
