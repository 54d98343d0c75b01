// Backward: all gradients of staged query rows and a block of staged keys. Included once per level.
//
// Everything is done with keys as rows and queries as columns. S^T = K Q^T and dP^T = V dO^T read keys and values as
// they lie in memory and the tile's queries as panels that are packed once; P^T and dS^T then lie as the products
// dV += P^T dO and dK += dS^T Q read them, and dS^T is turned round, 16 x 16 at a time, for dQ += dS K. LSE and delta
// are one number per column.

/// Products without anything in their shadow.
struct NoShadow {
  void step() const {}
};

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
