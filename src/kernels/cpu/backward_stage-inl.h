// Backward: what is known of query rows, and their packing and that of keys. Included once per level.

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
