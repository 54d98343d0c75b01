// Backward: probabilities and score gradients of a group of keys from its products. Included once per level.

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
