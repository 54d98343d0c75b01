// Linear attention over chosen tiles of keys, see tile_states.h. Included once per level.

/// phi of the rows [count][key_stride], zeros in the padding.
inline void map_features(const TileStateShape& shape, const TileRows& x, float* phi) {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  const float padding = shape.map == FeatureMap::relu ? 0.0F : minus_infinity;  // whose exponential is 0
  for (std::int64_t r = 0; r < x.count; ++r) {
    float* row = phi + r * shape.key_stride;
    load_row(x.rows[r], x.dtype, shape.head_dim, shape.key_columns, 1.0F, row);
    std::fill(row + shape.head_dim, row + shape.key_columns, padding);
    if (shape.map == FeatureMap::relu) {
      each_vector(shape.key_columns, [&](std::int64_t i) { store(row + i, at_least(zero(), load(row + i))); });
    } else if (shape.map == FeatureMap::elu) {
      each_vector(shape.key_columns, [&](std::int64_t i) {
        const Vec number = load(row + i);
        store(row + i, add(exp_of(at_most(zero(), number)), at_least(zero(), number)));
      });
    } else {
      Vec highest = set1(minus_infinity);
      each_vector(shape.key_columns, [&](std::int64_t i) { highest = at_least(highest, load(row + i)); });
      const Vec shift = set1(reduce_max(highest));
      Vec sum = zero();
      each_vector(shape.key_columns, [&](std::int64_t i) {
        const Vec power = exp_of(sub(load(row + i), shift));
        sum = add(sum, power);
        store(row + i, power);
      });
      scale_row(row, 1.0F / reduce_add(sum), shape.key_columns, row);
    }
  }
}

/// The gradient of x in place of that of phi(x).
inline void map_features_backward(const TileStateShape& shape, const float* phi, float* d_phi) {
  if (shape.map == FeatureMap::softmax) {
    const Vec mean = set1(dot(phi, d_phi, shape.key_columns));
    each_vector(shape.key_columns,
                [&](std::int64_t i) { store(d_phi + i, mul(load(phi + i), sub(load(d_phi + i), mean))); });
  } else if (shape.map == FeatureMap::elu) {  // x + 1 above 0, e^x below: the slope is 1, or phi
    each_vector(shape.key_columns,
                [&](std::int64_t i) { store(d_phi + i, mul(load(d_phi + i), at_most(set1(1.0F), load(phi + i)))); });
  } else {
    for (std::int64_t i = 0; i < shape.key_columns; ++i) d_phi[i] = phi[i] > 0 ? d_phi[i] : 0.0F;
  }
}

inline void load_values(const TileStateShape& shape, const TileRows& v, float* out) {
  for (std::int64_t r = 0; r < v.count; ++r) {
    load_row(v.rows[r], v.dtype, shape.value_dim, shape.value_columns, 1.0F, out + r * shape.value_stride);
  }
}

/// to += factor * a
inline void add_scaled(const float* a, float factor, std::int64_t columns, float* to) {
  const Vec f = set1(factor);
  each_vector(columns, [&](std::int64_t i) { store(to + i, fma(f, load(a + i), load(to + i))); });
}

/// phi and 1 / denominator of a tile of queries.
inline void prepare_queries(const TileStateShape& shape, const TileRows& q, const float* state,
                            const TileStateScratch& scratch) {
  map_features(shape, q, scratch.phi);
  for (std::int64_t r = 0; r < q.count; ++r) {
    const float denominator =
        shape.floor + dot(scratch.phi + r * shape.key_stride, state + shape.vector_at(), shape.key_columns);
    scratch.inverse[r] = denominator == 0 ? 0.0F : 1 / denominator;
  }
}

/// scratch.o = phi(Q) H / denominator.
inline void branch_output(const TileStateShape& shape, std::int64_t rows, const float* state,
                          const TileStateScratch& scratch) {
  multiply({scratch.phi, shape.key_stride, 1}, row_major(state, shape.value_stride),
           {.data = scratch.o, .stride = shape.value_stride, .scale = scratch.inverse}, rows, shape.head_dim,
           shape.value_columns);
}

/// left [rows][value_dim] times H^T, to [rows][key_stride].
inline void multiply_by_transposed_state(const TileStateShape& shape, const float* left, std::int64_t rows,
                                         const float* state, float* to, const TileStateScratch& scratch) {
  transpose_to_panels(state, shape.value_stride, shape.key_columns, shape.value_columns, scratch.panels);
  multiply({left, shape.value_stride, 1}, {scratch.panels, 16, 16 * shape.value_columns},
           {.data = to, .stride = shape.key_stride}, rows, shape.value_dim, shape.key_columns);
}

void key_state(const TileStateShape& shape, const TileRows& k, const TileRows& v, float* state,
               const TileStateScratch& scratch) {
  map_features(shape, k, scratch.phi);
  load_values(shape, v, scratch.o);
  multiply({scratch.phi, 1, shape.key_stride}, row_major(scratch.o, shape.value_stride),
           {.data = state, .stride = shape.value_stride}, shape.key_columns, k.count, shape.value_columns);
  float* sums = state + shape.vector_at();
  fill_zero(sums, shape.key_columns);
  for (std::int64_t r = 0; r < k.count; ++r) {
    add_scaled(scratch.phi + r * shape.key_stride, 1.0F, shape.key_columns, sums);
  }
}

void sum_states(const StateSums& job, std::int64_t first, std::int64_t last) {
  constexpr int vectors = kSumFloats / kLanes;
  constexpr std::int64_t together = 16;  // sums of sums: the error does not grow with the number of states
  bool complement = false;
  for (std::int64_t s = 0; s < job.sums; ++s) complement = complement || job.lists[s].all_but;
  for (std::int64_t at = first; at < last; at += kSumFloats) {
    Vec total[vectors];
#pragma GCC unroll 16
    for (Vec& x : total) x = zero();
    for (std::int64_t group = 0; complement && group < job.count; group += together) {
      Vec part[vectors];
#pragma GCC unroll 16
      for (Vec& x : part) x = zero();
      for (std::int64_t t = group; t < std::min(job.count, group + together); ++t) {
        const float* from = job.states + t * job.state_floats + at;
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) part[v] = add(part[v], load(from + v * kLanes));
      }
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) total[v] = add(total[v], part[v]);
    }
    for (std::int64_t s = 0; s < job.sums; ++s) {
      const StateList list = job.lists[s];
      Vec sum[vectors];
#pragma GCC unroll 16
      for (Vec& x : sum) x = zero();
      for (std::int64_t t = 0; t < list.count; ++t) {
        const float* from = job.states + list.states[t] * job.state_floats + at;
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sum[v] = add(sum[v], load(from + v * kLanes));
      }
      float* to = job.out + s * job.state_floats + at;
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        if (list.all_but) sum[v] = sub(total[v], sum[v]);
        if (job.add) sum[v] = add(load(to + v * kLanes), sum[v]);
        store(to + v * kLanes, sum[v]);
      }
    }
  }
}

void query_tile(const TileStateShape& shape, const TileRows& q, const float* state, const Projection& projection,
                const TileOutputRows& to, const TileStateScratch& scratch) {
  prepare_queries(shape, q, state, scratch);
  branch_output(shape, q.count, state, scratch);
  multiply({scratch.o, shape.value_stride, 1}, row_major(projection.weight, shape.value_stride),
           {.data = scratch.d_o, .stride = shape.value_stride}, q.count, shape.value_dim, shape.value_columns);
  for (std::int64_t r = 0; r < q.count; ++r) {
    float* sum = scratch.d_o + r * shape.value_stride;
    load_row(to.rows[r], to.dtype, shape.value_dim, shape.value_columns, 1.0F, scratch.o);
    each_vector(shape.value_columns, [&](std::int64_t i) {
      store(sum + i, add(load(scratch.o + i), add(load(sum + i), load(projection.bias + i))));
    });
    store_row(sum, to.dtype, shape.value_dim, to.rows[r]);
  }
}

void query_tile_backward(const TileStateShape& shape, const QueryTileGradient& tile, const Projection& projection,
                         const TileStateScratch& scratch) {
  const std::int64_t rows = tile.q.count;
  const std::int64_t columns = shape.key_columns;
  float* z = tile.state + shape.vector_at();
  prepare_queries(shape, tile.q, tile.state, scratch);
  load_values(shape, tile.d_o, scratch.d_o);
  if (tile.d_weight != nullptr) {
    branch_output(shape, rows, tile.state, scratch);
    multiply({scratch.o, 1, shape.value_stride}, row_major(scratch.d_o, shape.value_stride),
             {.data = tile.d_weight, .stride = shape.value_stride, .update = Update::add}, shape.value_dim, rows,
             shape.value_columns);
  }
  multiply({scratch.d_o, shape.value_stride, 1}, row_major(projection.transposed, shape.value_stride),
           {.data = scratch.d_o_in, .stride = shape.value_stride}, rows, shape.value_dim, shape.value_columns);
  multiply_by_transposed_state(shape, scratch.d_o_in, rows, tile.state, scratch.d_phi, scratch);
  fill_zero(scratch.vector, columns);
  for (std::int64_t r = 0; r < rows; ++r) {
    float* phi = scratch.phi + r * shape.key_stride;
    float* d_phi = scratch.d_phi + r * shape.key_stride;
    const float* d_o = scratch.d_o + r * shape.value_stride;
    const float inverse = scratch.inverse[r];
    const float delta = inverse * dot(phi, d_phi, columns);
    tile.shares[r] += delta + dot(d_o, projection.bias, shape.value_columns);
    if (tile.d_bias != nullptr) add_scaled(d_o, 1.0F, shape.value_columns, tile.d_bias);
    add_scaled(z, -delta, columns, d_phi);
    scale_row(d_phi, inverse, columns, d_phi);
    map_features_backward(shape, phi, d_phi);
    store_row(d_phi, DType::f32, shape.head_dim, reinterpret_cast<std::byte*>(tile.d_q + r * shape.head_dim));
    scale_row(phi, inverse, columns, phi);
    add_scaled(phi, -delta, columns, scratch.vector);
  }
  multiply({scratch.phi, 1, shape.key_stride}, row_major(scratch.d_o_in, shape.value_stride),
           {.data = tile.state, .stride = shape.value_stride}, columns, rows, shape.value_columns);
  std::memcpy(z, scratch.vector, static_cast<std::size_t>(columns) * sizeof(float));
}

void key_tile_backward(const TileStateShape& shape, const TileRows& k, const TileRows& v, const float* state,
                       float* d_k, float* d_v, const TileStateScratch& scratch) {
  map_features(shape, k, scratch.phi);
  multiply({scratch.phi, shape.key_stride, 1}, row_major(state, shape.value_stride),
           {.data = scratch.o, .stride = shape.value_stride}, k.count, shape.head_dim, shape.value_columns);
  for (std::int64_t r = 0; r < k.count; ++r) {
    store_row(scratch.o + r * shape.value_stride, DType::f32, shape.value_dim,
              reinterpret_cast<std::byte*>(d_v + r * shape.value_dim));
  }
  load_values(shape, v, scratch.d_o);
  multiply_by_transposed_state(shape, scratch.d_o, k.count, state, scratch.d_phi, scratch);
  for (std::int64_t r = 0; r < k.count; ++r) {
    float* d_phi = scratch.d_phi + r * shape.key_stride;
    add_scaled(state + shape.vector_at(), 1.0F, shape.key_columns, d_phi);
    map_features_backward(shape, scratch.phi + r * shape.key_stride, d_phi);
    store_row(d_phi, DType::f32, shape.head_dim, reinterpret_cast<std::byte*>(d_k + r * shape.head_dim));
  }
}
