// The chunked form: A and P of a chunk, the inverse of the delta rule, outputs and exit state. Included once per level.
//
// With G the sum of log decays from the chunk's start, inclusive:
//   A[i,j] = q_i . (k_j exp(G_i - G_j)), j <= i        P[i,j] = k_i . (k_j exp(G_i - G_j)), j < i
//   VN = (I + diag(beta) P)^-1 diag(beta) (V - (K exp(G)) S)      (without delta rule: VN = V)
//   O  = (Q exp(G)) S + A VN
//   S' = diag(exp(G_C)) S + (K exp(G_C - G))^T VN
// Every exp(G_i - G_j) is a product of factors exp(g) <= 1 in a row: no logarithms are subtracted, nothing overflows,
// and what underflows is smaller than the smallest float anyway. A decay of minus infinity clears the state.

/// exp(g) of the chunk's tokens as vectors; what is above 0 or NaN makes bad_decay differ from 0.
inline void load_channel_factors(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, Scratch& scratch) {
  Vec bad = set1(scratch.bad_decay);
  for (std::int64_t i = 0; i < chunk.rows; ++i) {
    float* row = chunk.factor + i * shape.key_stride;
    load_row(job.decay.row(chunk.first + i), job.decay.dtype, shape.head_dim, shape.key_columns, 1.0F, row);
    each_vector(shape.key_columns, [&](std::int64_t c) {
      const Vec g = load(row + c);
      bad = add(bad, at_least(zero(), g));
      store(row + c, exp_of(g));
    });
  }
  scratch.bad_decay = reduce_add(bad);
}

inline void load_scalar_factors(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, Scratch& scratch) {
  alignas(64) float g[128 + 16] = {};
  for (std::int64_t i = 0; i < chunk.rows; ++i) {
    if (shape.decay == DecayKind::scalar) g[i] = load_as_float(job.decay.row(chunk.first + i), job.decay.dtype, 0);
    if (!(g[i] <= 0)) scratch.bad_decay = 1;
  }
  for (std::int64_t i = 0; i < chunk.rows; i += kLanes) store(chunk.factor + i, exp_of(load(g + i)));
}

/// Divides a row by sqrt(its squared length + epsilon), then multiplies it by `scale`; returns 1 over that root.
inline float normalise_row(float* row, std::int64_t columns, float scale) {
  const float factor = 1.0F / std::sqrt(dot(row, row, columns) + static_cast<float>(kLengthEpsilon));
  scale_row(row, scale * factor, columns, row);
  return factor;
}

inline void load_queries_and_keys(const ChunkShape& shape, const HeadJob& job, Purpose purpose, const Chunk& chunk) {
  const std::int64_t padded = (chunk.rows + 15) / 16 * 16;
  const auto ahead = [&](const Rows& rows, std::int64_t t, std::int64_t count) {
    const auto bytes = shape.head_dim * static_cast<std::int64_t>(size_of(rows.dtype));
    prefetch_to_read(rows.row(std::clamp<std::int64_t>(t + kRowsAhead, 0, count - 1)), bytes);
  };
  for (std::int64_t i = 0; i < padded; ++i) {
    float* q = chunk.q + i * shape.key_stride;
    float* k = chunk.k + i * shape.key_stride;
    if (purpose != Purpose::states && job.queries > 0) ahead(job.q, chunk.first + i - job.first_query(), job.queries);
    ahead(job.k, chunk.first + i, job.tokens);
    if (purpose == Purpose::states) {
      // q is not read
    } else if (i >= chunk.first_query && i < chunk.rows) {
      load_row(job.q.row(chunk.first + i - job.first_query()), job.q.dtype, shape.head_dim, shape.key_columns,
               shape.normalise ? 1.0F : shape.scale, q);
      if (shape.normalise) chunk.q_length[i] = normalise_row(q, shape.key_columns, shape.scale);
    } else {
      fill_zero(q, shape.key_columns);
    }
    if (i < chunk.rows) {
      load_row(job.k.row(chunk.first + i), job.k.dtype, shape.head_dim, shape.key_columns, 1.0F, k);
      if (shape.normalise) chunk.k_length[i] = normalise_row(k, shape.key_columns, 1.0F);
      chunk.beta[i] = shape.delta ? load_as_float(job.beta.row(chunk.first + i), job.beta.dtype, 0) : 1.0F;
    } else {
      fill_zero(k, shape.key_columns);
    }
  }
}

/// Zeros above the diagonal of a lower triangle; `diagonal` keeps the diagonal itself.
inline void clear_above(float* matrix, std::int64_t stride, std::int64_t rows, bool diagonal) {
  const std::int64_t padded = (rows + 15) / 16 * 16;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = diagonal ? i + 1 : i; j < padded; ++j) matrix[i * stride + j] = 0;
  }
}

/// A and P of one decay per token: plain products, then the decays as a mask.
inline void pair_scalar(const ChunkShape& shape, bool scores, bool overlap, Chunk& chunk, Scratch& scratch) {
  const std::int64_t rows = chunk.rows;
  const std::int64_t padded = (rows + 15) / 16 * 16;
  const std::int64_t ld = shape.key_stride;
  const std::int64_t ldp = shape.pair_stride;

  // Row i of the mask is row i - 1 times exp(g_i).
  for (std::int64_t i = 0; i < rows; ++i) {
    float* row = chunk.pair_decay + i * ldp;
    if (i == 0) {
      fill_zero(row, padded);
    } else {
      scale_row(row - ldp, chunk.factor[i], padded, row);
    }
    row[i] = 1;
  }
  transpose_to_panels(chunk.k, ld, padded, shape.key_columns, scratch.panels);
  const RightMatrix keys{scratch.panels, 16, shape.key_columns * 16};
  const auto masked = [&](const float* left, float* out) {
    multiply({left, ld, 1}, keys, {out, ldp}, rows, shape.head_dim, rows, Part::product_lower);
    for (std::int64_t i = 0; i < rows; ++i) {
      float* row = out + i * ldp;
      const std::int64_t columns = (i + 16) / 16 * 16;
      multiply_rows(row, chunk.pair_decay + i * ldp, columns, row);
      if (columns < padded) fill_zero(row + columns, padded - columns);
    }
  };
  if (scores) masked(chunk.q, chunk.scores);
  if (overlap) {
    masked(chunk.k, chunk.overlap);
    clear_above(chunk.overlap, ldp, rows, false);
  }
}

/// One decay per token.
inline void prepare_scalar(const ChunkShape& shape, Purpose purpose, Chunk& chunk, Scratch& scratch) {
  const std::int64_t rows = chunk.rows;
  const std::int64_t ld = shape.key_stride;
  const bool scores = purpose != Purpose::states && chunk.first_query < rows;
  const bool overlap = purpose != Purpose::gradient && shape.delta;
  if (scores || overlap || purpose == Purpose::gradient) pair_scalar(shape, scores, overlap, chunk, scratch);

  float reach = 1;
  for (std::int64_t i = 0; i < rows; ++i) {
    reach *= chunk.factor[i];
    if (scores) scale_row(chunk.q + i * ld, reach, shape.key_columns, chunk.q_start + i * ld);
    if (shape.delta) scale_row(chunk.k + i * ld, reach, shape.key_columns, chunk.k_start + i * ld);
    if (purpose == Purpose::gradient) chunk.start[i] = reach;
  }
  each_vector(shape.key_columns, [&](std::int64_t c) { store(chunk.total + c, set1(reach)); });
  reach = 1;
  for (std::int64_t i = rows - 1; i >= 0; --i) {
    if (purpose == Purpose::gradient) {
      chunk.end[i] = reach;
    } else {
      scale_row(chunk.k + i * ld, reach, shape.key_columns, chunk.k_end + i * ld);
    }
    reach *= chunk.factor[i];
  }
}

/// Whether the decays of rows (from, to] of every channel multiply to at least e^-40.
inline bool within_range(const ChunkShape& shape, const Chunk& chunk, std::int64_t from, std::int64_t to) {
  constexpr float smallest = 4.3e-18F;  // e^-40; two such factors and a product of rows stay inside float32
  bool inside = true;
  each_vector(shape.key_columns, [&](std::int64_t c) {
    Vec reach = set1(1.0F);
    for (std::int64_t i = from + 1; i <= to; ++i) reach = mul(reach, load(chunk.factor + i * shape.key_stride + c));
    inside = inside && !any_greater(set1(smallest), reach);
  });
  return inside;
}

/// Diagonal block by one product around its middle row: the factors of rows before it are above 1, up to e^40.
inline void diagonal_by_product(const ChunkShape& shape, Chunk& chunk, std::int64_t begin, std::int64_t count,
                                bool scores, bool overlap, Scratch& scratch) {
  const std::int64_t ld = shape.key_stride;
  const std::int64_t middle = std::min<std::int64_t>(kSubChunk / 2, count - 1);
  alignas(64) float reach[1024];
  const auto place = [&](std::int64_t i) {
    const std::int64_t row = (begin + i) * ld;
    each_vector(shape.key_columns, [&](std::int64_t c) {
      const Vec forward = load(reach + c);
      const Vec k = load(chunk.k + row + c);
      // Before the middle, reach runs from the row to it and the row's factor is its inverse; after it, from it to the
      // row.
      const Vec up = i < middle ? div(set1(1.0F), forward) : forward;
      const Vec down = i < middle ? forward : div(set1(1.0F), forward);
      if (scores) store(scratch.left + i * ld + c, mul(load(chunk.q + row + c), up));
      if (overlap) store(scratch.left + (kSubChunk + i) * ld + c, mul(k, up));
      store(scratch.keys + i * ld + c, mul(k, down));
    });
  };
  fill_one(reach, shape.key_columns);
  for (std::int64_t i = middle; i < count; ++i) {
    if (i > middle) multiply_rows(reach, chunk.factor + (begin + i) * ld, shape.key_columns, reach);
    place(i);
  }
  fill_one(reach, shape.key_columns);
  for (std::int64_t i = middle - 1; i >= 0; --i) {
    multiply_rows(reach, chunk.factor + (begin + i + 1) * ld, shape.key_columns, reach);
    place(i);
  }
  for (std::int64_t i = count; i < kSubChunk; ++i) fill_zero(scratch.keys + i * ld, shape.key_columns);
  float* panel = scratch.panels + begin * shape.key_columns;
  transpose_to_panels(scratch.keys, ld, kSubChunk, shape.key_columns, panel);
  const RightMatrix right{panel, 16, 0};
  const std::int64_t corner = begin * shape.pair_stride + begin;
  if (scores) {
    multiply({scratch.left, ld, 1}, right, {chunk.scores + corner, shape.pair_stride}, count, shape.head_dim,
             kSubChunk);
  }
  if (overlap) {
    multiply({scratch.left + kSubChunk * ld, ld, 1}, right, {chunk.overlap + corner, shape.pair_stride}, count,
             shape.head_dim, kSubChunk);
  }
}

/// Diagonal block pair by pair, whatever the decays: a copy of each key decays as the rows go on.
inline void diagonal_by_running(const ChunkShape& shape, Chunk& chunk, std::int64_t begin, std::int64_t count,
                                bool scores, bool overlap, Scratch& scratch) {
  const std::int64_t ld = shape.key_stride;
  float* key = scratch.keys;
  for (std::int64_t j = 0; j < count; ++j) {
    std::copy_n(chunk.k + (begin + j) * ld, shape.key_columns, key);
    for (std::int64_t i = j; i < count; ++i) {
      const std::int64_t row = (begin + i) * ld;
      const std::int64_t pair = (begin + i) * shape.pair_stride + begin + j;
      if (i > j) multiply_rows(key, chunk.factor + row, shape.key_columns, key);
      if (scores) chunk.scores[pair] = dot(chunk.q + row, key, shape.key_columns);
      if (overlap && i > j) chunk.overlap[pair] = dot(chunk.k + row, key, shape.key_columns);
    }
  }
}

/// One decay per token and key channel: secondary chunking. Rows of a sub-chunk are referred to its start, keys of
/// earlier ones to their end and from there on to the start of the row's sub-chunk.
inline void prepare_channel(const ChunkShape& shape, Purpose purpose, Chunk& chunk, Scratch& scratch) {
  const std::int64_t rows = chunk.rows;
  const std::int64_t ld = shape.key_stride;
  const std::int64_t ldp = shape.pair_stride;
  const std::int64_t columns = shape.key_columns;
  const bool scores = purpose != Purpose::states && chunk.first_query < rows;
  const bool overlap = purpose != Purpose::gradient && shape.delta;
  const bool for_gradient = purpose == Purpose::gradient;
  alignas(64) float reach[1024];   // from the sub-chunk's start or end to the row
  fill_one(chunk.total, columns);  // from the chunk's start to the sub-chunk's
  for (std::int64_t begin = 0; begin < rows; begin += kSubChunk) {
    const std::int64_t count = std::min(kSubChunk, rows - begin);
    fill_one(reach, columns);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t row = (begin + i) * ld;
      multiply_rows(reach, chunk.factor + row, columns, reach);
      each_vector(columns, [&](std::int64_t c) {
        const Vec from_sub_chunk = load(reach + c);
        const Vec from_chunk = mul(load(chunk.total + c), from_sub_chunk);
        const Vec k = load(chunk.k + row + c);
        if (scores) {
          const Vec q = load(chunk.q + row + c);
          store(scratch.left + i * ld + c, mul(q, from_sub_chunk));
          store(chunk.q_start + row + c, mul(q, from_chunk));
        }
        if (overlap) store(scratch.left + (kSubChunk + i) * ld + c, mul(k, from_sub_chunk));
        if (shape.delta) store(chunk.k_start + row + c, mul(k, from_chunk));
        if (for_gradient) store(chunk.start + row + c, from_chunk);
      });
    }
    if (begin > 0) {
      const RightMatrix keys{scratch.panels, 16, columns * 16};
      if (scores) {
        multiply({scratch.left, ld, 1}, keys, {chunk.scores + begin * ldp, ldp}, count, shape.head_dim, begin);
      }
      if (overlap) {
        multiply({scratch.left + kSubChunk * ld, ld, 1}, keys, {chunk.overlap + begin * ldp, ldp}, count,
                 shape.head_dim, begin);
      }
    }
    multiply_rows(chunk.total, reach, columns, chunk.total);
    if (!scores && !overlap) continue;

    const std::int64_t middle = begin + std::min<std::int64_t>(kSubChunk / 2, count - 1);
    if (shape.product_on_diagonal && within_range(shape, chunk, begin, middle) &&
        within_range(shape, chunk, middle, begin + count - 1)) {
      diagonal_by_product(shape, chunk, begin, count, scores, overlap, scratch);
    } else {
      diagonal_by_running(shape, chunk, begin, count, scores, overlap, scratch);
    }
    if (begin + count == rows) break;
    // Earlier panels move on to the end of this sub-chunk, whose own keys join them.
    for (std::int64_t panel = 0; panel < begin; panel += kSubChunk) {
      float* at = scratch.panels + panel * columns;
      for (std::int64_t d = 0; d < shape.head_dim; ++d) scale_row(at + d * 16, reach[d], 16, at + d * 16);
    }
    fill_one(reach, columns);
    for (std::int64_t i = count - 1; i >= 0; --i) {
      multiply_rows(chunk.k + (begin + i) * ld, reach, columns, scratch.keys + i * ld);
      multiply_rows(reach, chunk.factor + (begin + i) * ld, columns, reach);
    }
    transpose_to_panels(scratch.keys, ld, kSubChunk, columns, scratch.panels + begin * columns);
  }
  if (scores) clear_above(chunk.scores, ldp, rows, true);
  if (overlap) clear_above(chunk.overlap, ldp, rows, false);

  fill_one(reach, columns);
  for (std::int64_t i = rows - 1; i >= 0; --i) {
    multiply_rows(chunk.k + i * ld, reach, columns, chunk.k_end + i * ld);
    if (for_gradient) std::copy_n(reach, columns, chunk.end + i * ld);
    multiply_rows(reach, chunk.factor + i * ld, columns, reach);
  }
}

/// (I + diag(beta) P)^-1 by forward substitution, four rows at a time: their sums over earlier rows run side by side.
inline void invert(const ChunkShape& shape, Chunk& chunk) {
  constexpr std::int64_t group = 4;
  const std::int64_t ldp = shape.pair_stride;
  const std::int64_t padded = (chunk.rows + 15) / 16 * 16;
  for (std::int64_t begin = 0; begin < chunk.rows; begin += group) {
    const std::int64_t count = std::min(group, chunk.rows - begin);
    const float* overlap[group];
    for (std::int64_t r = 0; r < group; ++r) overlap[r] = chunk.overlap + (begin + std::min(r, count - 1)) * ldp;
    for (std::int64_t column = 0; column < padded; column += 16) {
      float* inverse = chunk.inverse + column;
      Vec sum[group][kVecsPer16];
      for (auto& row : sum) std::fill_n(row, kVecsPer16, zero());
      const auto add_row = [&](std::int64_t r, std::int64_t j) {
        const Vec factor = set1(overlap[r][j]);
        for (int v = 0; v < kVecsPer16; ++v) sum[r][v] = fma(factor, load(inverse + j * ldp + v * kLanes), sum[r][v]);
      };
      for (std::int64_t j = column; j < begin; ++j) {
        for (std::int64_t r = 0; r < group; ++r) add_row(r, j);
      }
      for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t i = begin + r;
        for (std::int64_t j = std::max(column, begin); j < i; ++j) add_row(r, j);
        const Vec beta = set1(-chunk.beta[i]);
        for (int v = 0; v < kVecsPer16; ++v) store(inverse + i * ldp + v * kLanes, mul(beta, sum[r][v]));
        if (i >= column && i < column + 16) inverse[i * ldp + i - column] = 1;
      }
    }
  }
}

void prepare(const ChunkShape& shape, const HeadJob& job, Purpose purpose, Chunk& chunk, Scratch& scratch) {
  load_queries_and_keys(shape, job, purpose, chunk);
  if (shape.decay == DecayKind::channel) {
    load_channel_factors(shape, job, chunk, scratch);
    prepare_channel(shape, purpose, chunk, scratch);
  } else {
    load_scalar_factors(shape, job, chunk, scratch);
    prepare_scalar(shape, purpose, chunk, scratch);
  }
  if (shape.delta && purpose != Purpose::gradient) invert(shape, chunk);
}

inline void load_values(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, std::int64_t first,
                        std::int64_t last, float* out) {
  const std::int64_t width = std::min(last, shape.value_dim) - first;
  for (std::int64_t i = 0; i < chunk.rows; ++i) {
    const std::int64_t t = chunk.first + i;
    prefetch_to_read(column_of(job.v, std::min(t + kRowsAhead, job.tokens - 1), first),
                     width * static_cast<std::int64_t>(size_of(job.v.dtype)));
    load_row(column_of(job.v, t, first), job.v.dtype, width, last - first, 1.0F, out + i * shape.value_stride + first);
  }
}

/// VN, and where there is room for it V - KG S - P VN.
inline void correct_values(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, const float* entry,
                           std::int64_t first, std::int64_t last, float* corrected, float* unweighted,
                           Scratch& scratch) {
  const std::int64_t ldv = shape.value_stride;
  if (!shape.delta) {
    load_values(shape, job, chunk, first, last, corrected);
    return;
  }
  load_values(shape, job, chunk, first, last, scratch.values);
  multiply({chunk.k_start, shape.key_stride, 1}, row_major(entry + first, ldv),
           {scratch.values + first, ldv, Update::subtract}, chunk.rows, shape.head_dim, last - first, Part::all,
           &scratch.ahead);
  for (std::int64_t i = 0; i < chunk.rows; ++i) {
    float* row = scratch.values + i * ldv + first;
    if (unweighted != nullptr) std::copy_n(row, last - first, unweighted + i * ldv + first);
    scale_row(row, chunk.beta[i], last - first, row);
  }
  multiply({chunk.inverse, shape.pair_stride, 1}, row_major(scratch.values + first, ldv), {corrected + first, ldv},
           chunk.rows, chunk.rows, last - first, Part::left_lower);
  if (unweighted != nullptr) {
    multiply({chunk.overlap, shape.pair_stride, 1}, row_major(corrected + first, ldv),
             {unweighted + first, ldv, Update::subtract}, chunk.rows, chunk.rows, last - first, Part::left_lower);
  }
}

/// O from the entry state and VN; written out where there is a query.
inline void write_outputs(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, const float* entry,
                          std::int64_t first, std::int64_t last, Scratch& scratch) {
  if (chunk.first_query >= chunk.rows || job.o.data == nullptr) return;
  const std::int64_t ldv = shape.value_stride;
  const Target target{scratch.output + first, ldv};
  multiply({chunk.q_start, shape.key_stride, 1}, row_major(entry + first, ldv), target, chunk.rows, shape.head_dim,
           last - first);
  multiply({chunk.scores, shape.pair_stride, 1}, row_major(scratch.corrected + first, ldv),
           {target.data, ldv, Update::add}, chunk.rows, chunk.rows, last - first, Part::left_lower);
  const std::int64_t width = std::min(last, shape.value_dim) - first;
  for (std::int64_t i = chunk.first_query; i < chunk.rows; ++i) {
    store_row(scratch.output + i * ldv + first, job.o.dtype, width,
              column_of(job.o, chunk.first + i - job.first_query(), first));
  }
}

void advance(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, float* state, std::int64_t first,
             std::int64_t last, Scratch& scratch) {
  const std::int64_t ldv = shape.value_stride;
  correct_values(shape, job, chunk, state, first, last, scratch.corrected, nullptr, scratch);
  write_outputs(shape, job, chunk, state, first, last, scratch);
  multiply({chunk.k_end, 1, shape.key_stride}, row_major(scratch.corrected + first, ldv),
           {state + first, ldv, Update::add, chunk.total}, shape.head_dim, chunk.rows, last - first);
}

void pass(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, const float* entry, float* exit,
          const KeptChunk* kept, Scratch& scratch) {
  const std::int64_t ldv = shape.value_stride;
  const bool keep = kept != nullptr && shape.delta;
  float* corrected = keep ? kept->corrected : scratch.corrected;
  correct_values(shape, job, chunk, entry, 0, shape.value_columns, corrected, keep ? kept->unweighted : nullptr,
                 scratch);
  if (exit == nullptr) return;
  multiply({chunk.k_end, 1, shape.key_stride}, row_major(corrected, ldv),
           {.data = exit, .stride = ldv, .update = Update::add, .row_scale = chunk.total, .before = entry},
           shape.head_dim, chunk.rows, shape.value_columns, Part::all, &scratch.ahead);
}

void write(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, float* added, Scratch& scratch) {
  load_values(shape, job, chunk, 0, shape.value_columns, scratch.corrected);
  multiply({chunk.k_end, 1, shape.key_stride}, row_major(scratch.corrected, shape.value_stride),
           {added, shape.value_stride}, shape.head_dim, chunk.rows, shape.value_columns);
}

void read(const ChunkShape& shape, const HeadJob& job, const Chunk& chunk, const float* entry, Scratch& scratch) {
  load_values(shape, job, chunk, 0, shape.value_columns, scratch.corrected);
  write_outputs(shape, job, chunk, entry, 0, shape.value_columns, scratch);
}
