// Gradients of a chunk. Included once per level.
//
// With R = V - KG S, KG = K exp(G), KO = K exp(G_C - G), QG = Q exp(G), M = (I + diag(beta) P)^-1, VN = M diag(beta) R,
// U = R - P VN (so that VN = diag(beta) U), and dS' the gradient of the exit state:
//   dVN = A^T dO + KO dS'        dA = tril(dO VN^T)        Z = M^T dVN        dbeta_i = Z_i . U_i
//   dR = diag(beta) Z = dV       dP = -stril(dR VN^T)
//   dS = diag(exp(G_C)) dS' + QG^T dO - KG^T dR
// S, VN, M and U come from the pass over the states.
// Keys meet exp(G) with a plus (as rows of P and in KG) and with a minus (as columns of A and P and in KO); the
// gradient of G is q dq + k dK+ - k dK-, so that no product of decays has to be kept for it.

/// Gradients of pairs, with `sign`, times `decay` where it is given; 0 above the diagonal, which `diagonal` keeps.
inline void mask_pairs(const ChunkShape& shape, float* pairs, const float* decay, float sign, std::int64_t rows,
                       bool diagonal) {
  const std::int64_t padded = (rows + 15) / 16 * 16;
  const Vec factor = set1(sign);
  for (std::int64_t i = 0; i < rows; ++i) {
    float* row = pairs + i * shape.pair_stride;
    const std::int64_t columns = (i + 16) / 16 * 16;
    each_vector(columns, [&](std::int64_t c) {
      const Vec pair = mul(factor, load(row + c));
      store(row + c, decay != nullptr ? mul(load(decay + i * shape.pair_stride + c), pair) : pair);
    });
    for (std::int64_t j = diagonal ? i + 1 : i; j < columns; ++j) row[j] = 0;
    fill_zero(row + columns, padded - columns);
  }
}

/// Inside the chunk, one decay per token, which the gradients of the pairs hold already.
inline void pair_gradients_scalar(const ChunkShape& shape, const Chunk& chunk, GradientScratch& gradient) {
  const std::int64_t ld = shape.key_stride;
  const std::int64_t ldp = shape.pair_stride;
  const std::int64_t rows = chunk.rows;
  const auto through = [&](const float* d_pairs, float* d_rows, const float* left_rows) {
    multiply({d_pairs, ldp, 1}, row_major(chunk.k, ld), {d_rows, ld, Update::add}, rows, rows, shape.key_columns,
             Part::left_lower);
    multiply({d_pairs, 1, ldp}, row_major(left_rows, ld), {gradient.d_k_minus, ld, Update::add}, rows, rows,
             shape.key_columns, Part::left_upper);
  };
  if (chunk.first_query < rows) through(gradient.d_scores, gradient.d_q, chunk.q);
  if (shape.delta) through(gradient.d_overlap, gradient.d_k_plus, chunk.k);
}

/// Pairs within a sub-chunk: for a vector of channels and each key a copy of the key decays as the rows go on.
inline void diagonal_gradients(const ChunkShape& shape, const Chunk& chunk, std::int64_t begin, std::int64_t count,
                               GradientScratch& gradient) {
  const std::int64_t ld = shape.key_stride;
  const std::int64_t end = begin + count;
  each_vector(shape.key_columns, [&](std::int64_t c) {
    for (std::int64_t j = begin; j < end; ++j) {
      const float* d_score = gradient.d_scores + j;
      const float* d_overlap = gradient.d_overlap + j;
      Vec reach = set1(1.0F);
      Vec key = load(chunk.k + j * ld + c);
      float* d_own = gradient.d_q + j * ld + c;
      const Vec own = set1(d_score[j * shape.pair_stride]);
      store(d_own, fma(own, key, load(d_own)));
      Vec d_minus = fma(own, load(chunk.q + j * ld + c), load(gradient.d_k_minus + j * ld + c));
      for (std::int64_t i = j + 1; i < end; ++i) {
        const Vec factor = load(chunk.factor + i * ld + c);
        const Vec score = set1(d_score[i * shape.pair_stride]);
        reach = mul(reach, factor);
        key = mul(key, factor);
        float* d_q = gradient.d_q + i * ld + c;
        store(d_q, fma(score, key, load(d_q)));
        Vec row = mul(score, load(chunk.q + i * ld + c));
        if (shape.delta) {
          const Vec overlap = set1(d_overlap[i * shape.pair_stride]);
          float* d_plus = gradient.d_k_plus + i * ld + c;
          store(d_plus, fma(overlap, key, load(d_plus)));
          row = fma(overlap, load(chunk.k + i * ld + c), row);
        }
        d_minus = fma(reach, row, d_minus);
      }
      store(gradient.d_k_minus + j * ld + c, d_minus);
    }
  });
}

/// Inside the chunk, one decay per token and channel: the references of prepare_channel.
inline void pair_gradients_channel(const ChunkShape& shape, const Chunk& chunk, Scratch& scratch,
                                   GradientScratch& gradient) {
  const std::int64_t ld = shape.key_stride;
  const std::int64_t ldp = shape.pair_stride;
  const std::int64_t columns = shape.key_columns;
  alignas(64) float running[1024];
  for (std::int64_t begin = 0; begin < chunk.rows; begin += kSubChunk) {
    const std::int64_t count = std::min(kSubChunk, chunk.rows - begin);
    diagonal_gradients(shape, chunk, begin, count, gradient);
    if (begin == 0) continue;
    // reach: from every earlier key to the start of this sub-chunk.
    fill_one(running, columns);
    for (std::int64_t j = begin - 1; j >= 0; --j) {
      std::copy_n(running, columns, gradient.reach + j * ld);
      multiply_rows(chunk.k + j * ld, running, columns, scratch.keys + j * ld);
      multiply_rows(running, chunk.factor + j * ld, columns, running);
    }
    const auto through = [&](const float* d_pairs, float* d_rows, const float* rows_of, bool first) {
      const float* block = d_pairs + begin * ldp;
      multiply({block, ldp, 1}, row_major(scratch.keys, ld), {scratch.left, ld}, count, begin, columns);
      fill_one(running, columns);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t row = (begin + i) * ld;
        multiply_rows(running, chunk.factor + row, columns, running);
        add_product(scratch.left + i * ld, running, columns, d_rows + row);
        multiply_rows(rows_of + row, running, columns, scratch.left + i * ld);
      }
      multiply({block, 1, ldp}, row_major(scratch.left, ld), {gradient.product, ld, first ? Update::set : Update::add},
               begin, count, columns);
    };
    through(gradient.d_scores, gradient.d_q, chunk.q, true);
    if (shape.delta) through(gradient.d_overlap, gradient.d_k_plus, chunk.k, false);
    for (std::int64_t j = 0; j < begin; ++j) {
      add_product(gradient.product + j * ld, gradient.reach + j * ld, columns, gradient.d_k_minus + j * ld);
    }
  }
}

/// Z, dbeta, dR, dP, from dVN; dR is d_values and dP lands in d_overlap, with the decays of scalar ones.
inline void delta_gradients(const ChunkShape& shape, const Chunk& chunk, const KeptChunk& kept,
                            const RightMatrix& corrected_transposed, GradientScratch& gradient) {
  const std::int64_t ldv = shape.value_stride;
  const std::int64_t ldp = shape.pair_stride;
  const std::int64_t rows = chunk.rows;
  multiply({kept.inverse, 1, ldp}, row_major(gradient.d_corrected, ldv), {gradient.d_values, ldv}, rows, rows,
           shape.value_columns, Part::left_upper);
  for (std::int64_t i = 0; i < rows; ++i) {
    float* d_value = gradient.d_values + i * ldv;
    if (kept.unweighted != nullptr) {
      gradient.d_beta[i] = dot(d_value, kept.unweighted + i * ldv, shape.value_columns);
    }
    scale_row(d_value, chunk.beta[i], shape.value_columns, d_value);
  }
  multiply({gradient.d_values, ldv, 1}, corrected_transposed, {gradient.d_overlap, ldp}, rows, shape.value_dim, rows,
           Part::product_lower);
  mask_pairs(shape, gradient.d_overlap, shape.decay == DecayKind::channel ? nullptr : chunk.pair_decay, -1.0F, rows,
             false);
}

/// From the gradient of y = x * factor, factor = 1 / sqrt(x.x + epsilon), that of x: factor (dy - y (y.dy)).
/// y = unit * length.
inline void through_length(float* gradient, const float* length, float unit, float factor, std::int64_t columns) {
  const Vec along = set1(-unit * unit * dot(length, gradient, columns));
  each_vector(columns, [&](std::int64_t c) {
    store(gradient + c, mul(set1(factor), fma(along, load(length + c), load(gradient + c))));
  });
}

/// Writes dq, dk, dv, dbeta and, from the last row backwards, dg. `last` [key_columns]: what reaches G of the last row
/// through the exit state.
inline void store_gradients(const ChunkShape& shape, const HeadJob& job, const HeadGradients& gradients,
                            const Chunk& chunk, const float* last, GradientScratch& gradient) {
  const std::int64_t ld = shape.key_stride;
  alignas(64) float running[1024];
  alignas(64) float row[1024];
  const auto ahead = [](const OutputRows& rows, std::int64_t t, std::int64_t width) {
    prefetch_to_write(rows.row(std::max<std::int64_t>(t - kRowsAhead, 0)),
                      width * static_cast<std::int64_t>(size_of(rows.dtype)));
  };
  std::copy_n(last, shape.key_columns, running);
  for (std::int64_t i = chunk.rows - 1; i >= 0; --i) {
    const std::int64_t t = chunk.first + i;
    const float* d_q = gradient.d_q + i * ld;
    const float* d_plus = gradient.d_k_plus + i * ld;
    const float* d_minus = gradient.d_k_minus + i * ld;
    if (gradients.decay.data != nullptr) {
      each_vector(shape.key_columns, [&](std::int64_t c) {
        const Vec k = load(chunk.k + i * ld + c);
        Vec sum = fma(load(chunk.q + i * ld + c), load(d_q + c), load(running + c));
        sum = fma(k, sub(load(d_plus + c), load(d_minus + c)), sum);
        store(running + c, sum);
      });
      if (shape.decay == DecayKind::channel) {
        store_row(running, gradients.decay.dtype, shape.head_dim, gradients.decay.row(t));
      } else {
        fill_one(row, shape.key_columns);
        store_from_float(gradients.decay.row(t), gradients.decay.dtype, 0, dot(running, row, shape.key_columns));
      }
    }
    if (gradients.k.data != nullptr) {
      ahead(gradients.k, t, shape.head_dim);
      each_vector(shape.key_columns, [&](std::int64_t c) { store(row + c, add(load(d_plus + c), load(d_minus + c))); });
      if (shape.normalise) through_length(row, chunk.k + i * ld, 1.0F, chunk.k_length[i], shape.key_columns);
      store_row(row, gradients.k.dtype, shape.head_dim, gradients.k.row(t));
    }
    if (gradients.q.data != nullptr && i >= chunk.first_query) {
      ahead(gradients.q, t - job.first_query(), shape.head_dim);
      scale_row(d_q, shape.scale, shape.key_columns, row);
      if (shape.normalise && shape.scale != 0) {
        through_length(row, chunk.q + i * ld, 1 / shape.scale, chunk.q_length[i], shape.key_columns);
      }
      store_row(row, gradients.q.dtype, shape.head_dim, gradients.q.row(t - job.first_query()));
    }
    if (gradients.v.data != nullptr) {
      ahead(gradients.v, t, shape.value_dim);
      const float* d_value = (shape.delta ? gradient.d_values : gradient.d_corrected) + i * shape.value_stride;
      store_row(d_value, gradients.v.dtype, shape.value_dim, gradients.v.row(t));
    }
    if (gradients.beta.data != nullptr) {
      store_from_float(gradients.beta.row(t), gradients.beta.dtype, 0, gradient.d_beta[i]);
    }
  }
}

inline void load_output_gradients(const ChunkShape& shape, const HeadJob& job, const HeadGradients& gradients,
                                  const Chunk& chunk, float* out) {
  const std::int64_t bytes = shape.value_dim * static_cast<std::int64_t>(size_of(gradients.o.dtype));
  for (std::int64_t i = 0; i < chunk.rows; ++i) {
    float* row = out + i * shape.value_stride;
    if (i < chunk.first_query) {
      fill_zero(row, shape.value_columns);
      continue;
    }
    const std::int64_t n = chunk.first + i - job.first_query();
    prefetch_to_read(gradients.o.row(std::min(n + kRowsAhead, job.queries - 1)), bytes);
    load_row(gradients.o.row(n), gradients.o.dtype, shape.value_dim, shape.value_columns, 1.0F,
             out + i * shape.value_stride);
  }
}

/// out = rows of `gradient`, [value_dim], times S^T or dS'^T, whose transposed panels are `state`; every row and
/// channel times `decay` (as Chunk::start) and `sign`.
inline void through_state(const ChunkShape& shape, const float* gradient, const RightMatrix& state, const float* decay,
                          float sign, std::int64_t rows, float* out, Ahead& ahead) {
  const std::int64_t ld = shape.key_stride;
  if (shape.decay == DecayKind::channel) {
    multiply({gradient, shape.value_stride, 1}, state, {out, ld}, rows, shape.value_dim, shape.key_columns, Part::all,
             &ahead);
    const Vec factor = set1(sign);
    for (std::int64_t i = 0; i < rows; ++i) {
      each_vector(shape.key_columns, [&](std::int64_t c) {
        float* at = out + i * ld + c;
        store(at, mul(mul(factor, load(decay + i * ld + c)), load(at)));
      });
    }
    return;
  }
  alignas(64) float scale[128];
  for (std::int64_t i = 0; i < rows; ++i) scale[i] = sign * decay[i];
  multiply({gradient, shape.value_stride, 1}, state, {.data = out, .stride = ld, .scale = scale}, rows, shape.value_dim,
           shape.key_columns, Part::all, &ahead);
}

/// dVN.
inline void corrected_gradients(const ChunkShape& shape, const Chunk& chunk, Ahead& ahead, GradientScratch& gradient) {
  const std::int64_t ldv = shape.value_stride;
  const bool channel = shape.decay == DecayKind::channel;
  multiply({channel ? chunk.k_end : chunk.k, shape.key_stride, 1}, row_major(gradient.state, ldv),
           {.data = gradient.d_corrected, .stride = ldv, .scale = channel ? nullptr : chunk.end}, chunk.rows,
           shape.head_dim, shape.value_columns, Part::all, &ahead);
  if (chunk.first_query >= chunk.rows) return;
  multiply({chunk.scores, 1, shape.pair_stride}, row_major(gradient.d_output, ldv),
           {gradient.d_corrected, ldv, Update::add}, chunk.rows, chunk.rows, shape.value_columns, Part::left_upper);
}

void backward(const ChunkShape& shape, const HeadJob& job, const HeadGradients& gradients, const Chunk& chunk,
              const KeptChunk& kept, Scratch& scratch, GradientScratch& gradient) {
  const std::int64_t ld = shape.key_stride;
  const std::int64_t ldv = shape.value_stride;
  const std::int64_t rows = chunk.rows;
  const std::int64_t padded = (rows + 15) / 16 * 16;
  const bool queries = chunk.first_query < rows;
  const bool channel = shape.decay == DecayKind::channel;

  float* corrected = shape.delta ? kept.corrected : scratch.corrected;
  if (!shape.delta) load_values(shape, job, chunk, 0, shape.value_columns, corrected);
  for (std::int64_t i = rows; i < padded; ++i) fill_zero(corrected + i * ldv, shape.value_columns);
  if (queries) load_output_gradients(shape, job, gradients, chunk, gradient.d_output);
  corrected_gradients(shape, chunk, scratch.ahead, gradient);

  transpose_to_panels(corrected, ldv, padded, shape.value_columns, scratch.panels);
  const RightMatrix corrected_transposed{scratch.panels, 16, shape.value_columns * 16};
  if (queries) {
    multiply({gradient.d_output, ldv, 1}, corrected_transposed, {gradient.d_scores, shape.pair_stride}, rows,
             shape.value_dim, rows, Part::product_lower);
    mask_pairs(shape, gradient.d_scores, channel ? nullptr : chunk.pair_decay, 1.0F, rows, true);
  } else if (channel) {
    for (std::int64_t i = 0; i < rows; ++i) fill_zero(gradient.d_scores + i * shape.pair_stride, padded);
  }
  if (shape.delta) delta_gradients(shape, chunk, kept, corrected_transposed, gradient);

  // What reaches the decays through the exit state, then that state's gradient moves to the entry.
  alignas(64) float last[1024];
  fill_zero(last, shape.key_columns);
  const bool decays = gradients.decay.data != nullptr;
  for (std::int64_t d = 0; decays && d < shape.head_dim; ++d) {
    last[d] = chunk.total[d] * dot(kept.entry + d * ldv, gradient.state + d * ldv, shape.value_columns);
  }
  transpose_to_panels(gradient.state, ldv, shape.key_columns, shape.value_columns, scratch.panels);
  const RightMatrix transposed{scratch.panels, 16, shape.value_columns * 16};
  through_state(shape, corrected, transposed, chunk.end, 1.0F, rows, gradient.d_k_minus, scratch.ahead);
  for (std::int64_t i = 0; decays && i < rows; ++i) {
    add_product(chunk.k + i * ld, gradient.d_k_minus + i * ld, shape.key_columns, last);
  }
  if (queries) {
    multiply({chunk.q_start, 1, ld}, row_major(gradient.d_output, ldv), {gradient.state, ldv, Update::add, chunk.total},
             shape.head_dim, rows, shape.value_columns, Part::all, &scratch.ahead);
  } else {
    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
      scale_row(gradient.state + d * ldv, chunk.total[d], shape.value_columns, gradient.state + d * ldv);
    }
  }
  if (shape.delta) {
    multiply({chunk.k_start, 1, ld}, row_major(gradient.d_values, ldv), {gradient.state, ldv, Update::subtract},
             shape.head_dim, rows, shape.value_columns, Part::all, &scratch.ahead);
  }

  if (queries || shape.delta)
    transpose_to_panels(kept.entry, ldv, shape.key_columns, shape.value_columns, scratch.panels);
  if (queries) {
    through_state(shape, gradient.d_output, transposed, chunk.start, 1.0F, rows, gradient.d_q, scratch.ahead);
  } else {
    fill_zero(gradient.d_q, rows * ld);
  }
  if (shape.delta) {
    through_state(shape, gradient.d_values, transposed, chunk.start, -1.0F, rows, gradient.d_k_plus, scratch.ahead);
  } else {
    fill_zero(gradient.d_k_plus, rows * ld);
  }
  if (channel) {
    pair_gradients_channel(shape, chunk, scratch, gradient);
  } else {
    pair_gradients_scalar(shape, chunk, gradient);
  }
  store_gradients(shape, job, gradients, chunk, last, gradient);
}
