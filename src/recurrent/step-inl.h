// The recurrent form, token by token. Included once per level.
//
// A stripe of value columns stays in the first cache while the tokens pass: each token reads it once for the prediction
// and once more to write it and to read the output.

constexpr int kStripeVectors = 2;
constexpr std::int64_t kStripe = kStripeVectors * kLanes;

/// One token on a stripe of the state with rows of `stride`; `v` and `o` have kStripe numbers.
template <int vectors>
inline void step_stripe(const ChunkShape& shape, const float* q, const float* k, const float* factor, float beta,
                        float* state, std::int64_t stride, const float* v, float* o) {
  Vec written[vectors];
  for (int i = 0; i < vectors; ++i) written[i] = load(v + i * kLanes);
  if (shape.delta) {
    Vec predicted[vectors];
    for (int i = 0; i < vectors; ++i) predicted[i] = zero();
    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
      const Vec key = set1(k[d] * factor[d]);
      for (int i = 0; i < vectors; ++i) predicted[i] = fma(key, load(state + d * stride + i * kLanes), predicted[i]);
    }
    for (int i = 0; i < vectors; ++i) written[i] = mul(set1(beta), sub(written[i], predicted[i]));
  }
  Vec output[vectors];
  for (int i = 0; i < vectors; ++i) output[i] = zero();
  for (std::int64_t d = 0; d < shape.head_dim; ++d) {
    const Vec decay = set1(factor[d]);
    const Vec key = set1(k[d]);
    const Vec query = set1(q[d]);
    for (int i = 0; i < vectors; ++i) {
      float* at = state + d * stride + i * kLanes;
      const Vec value = fma(key, written[i], mul(decay, load(at)));
      store(at, value);
      output[i] = fma(query, value, output[i]);
    }
  }
  for (int i = 0; i < vectors; ++i) store(o + i * kLanes, output[i]);
}

/// q, k, exp(g) and beta of one token as floats.
struct TokenRows {
  alignas(64) float q[1024];
  alignas(64) float k[1024];
  alignas(64) float factor[1024];
  float beta;
};

inline void load_token(const ChunkShape& shape, const HeadJob& job, std::int64_t t, TokenRows& rows) {
  if (t >= job.first_query()) {
    load_row(job.q.row(t - job.first_query()), job.q.dtype, shape.head_dim, shape.key_columns,
             shape.normalise ? 1.0F : shape.scale, rows.q);
    if (shape.normalise) normalise_row(rows.q, shape.key_columns, shape.scale);
  } else {
    fill_zero(rows.q, shape.key_columns);
  }
  load_row(job.k.row(t), job.k.dtype, shape.head_dim, shape.key_columns, 1.0F, rows.k);
  if (shape.normalise) normalise_row(rows.k, shape.key_columns, 1.0F);
  rows.beta = shape.delta ? load_as_float(job.beta.row(t), job.beta.dtype, 0) : 1.0F;
  if (shape.decay == DecayKind::channel) {
    load_row(job.decay.row(t), job.decay.dtype, shape.head_dim, shape.key_columns, 1.0F, rows.factor);
    each_vector(shape.key_columns, [&](std::int64_t c) { store(rows.factor + c, exp_of(load(rows.factor + c))); });
    return;
  }
  const float g = shape.decay == DecayKind::scalar ? load_as_float(job.decay.row(t), job.decay.dtype, 0) : 0.0F;
  const Vec factor = exp_of(set1(g));
  each_vector(shape.key_columns, [&](std::int64_t c) { store(rows.factor + c, factor); });
}

void step(const ChunkShape& shape, const HeadJob& job, float* state, std::int64_t first, std::int64_t last,
          Scratch& scratch) {
  TokenRows rows;
  alignas(64) float v[kStripe];
  alignas(64) float o[kStripe];
  const std::int64_t columns = std::min(last, shape.value_dim);
  for (std::int64_t t = 0; t < job.tokens; ++t) {
    load_token(shape, job, t, rows);
    for (std::int64_t column = first; column < columns; column += kStripe) {
      const std::int64_t width = std::min(kStripe, columns - column);
      load_row(column_of(job.v, t, column), job.v.dtype, width, kStripe, 1.0F, v);
      if (width == kStripe) {
        step_stripe<kStripeVectors>(shape, rows.q, rows.k, rows.factor, rows.beta, state + column, shape.value_dim, v,
                                    o);
      } else {  // the stripe would reach into the next row
        float* stripe = scratch.state;
        for (std::int64_t d = 0; d < shape.head_dim; ++d) {
          load_row(reinterpret_cast<const std::byte*>(state + d * shape.value_dim + column), DType::f32, width, kStripe,
                   1.0F, stripe + d * kStripe);
        }
        step_stripe<kStripeVectors>(shape, rows.q, rows.k, rows.factor, rows.beta, stripe, kStripe, v, o);
        for (std::int64_t d = 0; d < shape.head_dim; ++d) {
          std::copy_n(stripe + d * kStripe, width, state + d * shape.value_dim + column);
        }
      }
      if (t >= job.first_query()) {
        store_row(o, job.o.dtype, width, column_of(job.o, t - job.first_query(), column));
      }
    }
  }
}
