// Query-major: one tile of query rows walks the keys of its plan row. Included once per level.

/// One query row as the product reads it: floats times the scale, or bf16 words.
inline void stage_query(const TileShape& shape, const ScoreRule& rule, const std::byte* row, DType dtype,
                        std::int64_t q_stride, std::uint32_t* out) {
  if (!shape.pair_product) {
    auto* floats = reinterpret_cast<float*>(out);
    const std::int64_t whole = shape.head_dim / kLanes * kLanes;
    with_dtype(dtype, [&](auto type) {
      for (std::int64_t d = 0; d < whole; d += kLanes) {
        store(floats + d, mul(load_storage<decltype(type)::value>(row, d), set1(rule.query_factor)));
      }
    });
    for (std::int64_t d = whole; d < q_stride; ++d) {
      floats[d] = d < shape.head_dim ? load_as_float(row, dtype, d) * rule.query_factor : 0.0F;
    }
    return;
  }
  // Pair products: bf16 as they are, but for the sign (or a scale of 0).
  auto* half = reinterpret_cast<std::uint16_t*>(out);
  std::fill(half + shape.head_dim, half + 2 * q_stride, std::uint16_t{0});
  std::memcpy(half, row, static_cast<std::size_t>(shape.head_dim) * sizeof(std::uint16_t));
  if (rule.query_factor == 1) return;
  for (std::int64_t d = 0; d < shape.head_dim; ++d) half[d] = float_to_bf16(bf16_to_float(half[d]) * rule.query_factor);
}

/// Writes a finished row: output / sum and log-sum-exp, with the sink logit in the denominator. Returns the latter.
inline float finish_row(const Call& call, const TileShape& shape, const ScoreRule& rule, std::int64_t sequence,
                        std::int64_t head, std::int64_t query, float maximum, float sum, float* output) {
  constexpr float ln2 = 0.69314718056F;
  const AttentionOutputs& outputs = call.outputs;
  std::byte* row = call.query_row(outputs.o, sequence, head, query);
  float lse = kMinusInfinity;
  float inverse = 0;
  // Weights that are no softmax may all but vanish; the inverse of a denormal sum would be infinite.
  if (!(sum < std::numeric_limits<float>::min())) {
    lse = maximum * rule.to_log2 * ln2 + std::log(sum);
    inverse = 1 / sum;
    if (!call.inputs.modifiers.sink_logits.empty()) {
      const float sink = call.inputs.modifiers.sink_logits.data()[head];
      const float highest = std::max(lse, sink);
      const float joint = highest + std::log(std::exp(lse - highest) + std::exp(sink - highest));
      inverse *= std::exp(lse - joint);
      lse = joint;
    }
  }
  if (!outputs.lse.empty()) outputs.lse.data()[call.lse_index(sequence, head, query)] = lse;
  const std::int64_t whole = shape.value_dim / kLanes * kLanes;
  for (std::int64_t c = 0; c < whole; c += kLanes) {
    const Vec value = mul(load(output + c), set1(inverse));
    if (outputs.o.dtype == DType::f32) {
      store(reinterpret_cast<float*>(row) + c, value);
    } else if (outputs.o.dtype == DType::bf16) {
      store_bf16(reinterpret_cast<std::uint16_t*>(row) + c, value);
    } else {
      store_f16(reinterpret_cast<std::uint16_t*>(row) + c, value);
    }
  }
  for (std::int64_t c = whole; c < shape.value_dim; ++c) store_from_float(row, outputs.o.dtype, c, output[c] * inverse);
  return lse;
}

/// Sets the per-row fields of the scratch and stages the queries of rows [first, first + rows) of a job.
inline void stage_rows(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                       std::int64_t first, std::int64_t rows, TileScratch& scratch) {
  const Plan& plan = call.plan;
  const auto& orders = plan.query_order;
  const std::int32_t* order =
      orders.empty() || orders.data()[job.block].empty() ? nullptr : orders.data()[job.block].data();
  const std::int64_t offset = call.problem().q_offset_of(job.sequence);
  const std::int64_t first_in_tile = job.first_place % plan.tile_q;
  std::int64_t head = job.first_head + first / job.places;
  std::int64_t in_job = first % job.places;
  for (std::int64_t r = 0; r < rows; ++r, ++in_job) {
    if (in_job == job.places) {
      in_job = 0;
      ++head;
    }
    const std::int64_t place = job.first_place + in_job;
    const std::int64_t query = order != nullptr ? order[place] : place;
    scratch.query[r] = static_cast<std::int32_t>(query);
    scratch.position[r] = static_cast<std::int32_t>(offset + query);
    scratch.head[r] = static_cast<std::int32_t>(head);
    scratch.row_in_tile[r] = static_cast<std::int32_t>(first_in_tile + in_job);
    scratch.q_rows[r] = scratch.q + r * scratch.q_stride;
    scratch.output_rows[r] = scratch.output + r * shape.value_columns;
    scratch.maximum[r] = rule.first_maximum();
    scratch.shift[r] = 0;
    scratch.sum[r] = 0;
    stage_query(shape, rule, call.query_row(call.inputs.q, job.sequence, head, query), call.inputs.q.dtype,
                scratch.q_stride, scratch.q + r * scratch.q_stride);
  }
  std::memset(scratch.output, 0, static_cast<std::size_t>(rows * shape.value_columns) * sizeof(float));
}

/// Writes the by-products of a finished row: its largest score, and the largest probabilities of its query tile.
inline void finish_maxima(const Call& call, const ScoreRule& rule, const TileJob& job, const TileScratch& scratch,
                          std::int64_t row, float lse) {
  const AttentionOutputs& outputs = call.outputs;
  const float to_natural = rule.to_log2 * std::numbers::ln2_v<float>;
  if (!outputs.row_maximum.empty()) {
    outputs.row_maximum.data()[call.lse_index(job.sequence, scratch.head[row], scratch.query[row])] =
        scratch.row_peak[row] * to_natural;
  }
  if (scratch.tile_peak == nullptr) return;
  const std::int64_t tile = job.first_place / call.plan.tile_q;
  auto* out = reinterpret_cast<float*>(outputs.tile_maximum.row(job.sequence, scratch.head[row], tile));
  const float* peaks = scratch.tile_peak + row * scratch.tile_peak_count;
  for (std::int64_t t = 0; t < scratch.tile_peak_count; ++t) {
    if (peaks[t] == kMinusInfinity) continue;
    const float p = std::exp(peaks[t] * to_natural - lse);
    if (!(p <= out[t])) out[t] = std::isnan(out[t]) ? out[t] : p;
  }
}

void attend_tile(const Call& call, const TileShape& shape, const ScoreRule& rule, const TileJob& job,
                 const PackedSource* sources, TileScratch& scratch) {
  with_product(shape, [&](auto product) {
    for (std::int64_t head = job.first_head; scratch.tile_peak != nullptr && head < job.first_head + job.heads;
         ++head) {
      auto* tiles = reinterpret_cast<float*>(
          call.outputs.tile_maximum.row(job.sequence, head, job.first_place / call.plan.tile_q));
      std::fill_n(tiles, scratch.tile_peak_count, 0.0F);
    }
    for (std::int64_t first = 0; first < job.rows(); first += kTileRows) {
      const std::int64_t rows = std::min(kTileRows, job.rows() - first);
      stage_rows(call, shape, rule, job, first, rows, scratch);
      std::fill_n(scratch.row_peak, rows, kMinusInfinity);
      if (scratch.tile_peak != nullptr) {
        std::fill_n(scratch.tile_peak, rows * scratch.tile_peak_count, kMinusInfinity);
      }
      const auto flush = [&] { process_block<decltype(product)>(call, shape, rule, job, sources, scratch, rows); };
      GroupCollector<decltype(flush)> groups(call, shape, job.block, sources, scratch, flush);
      groups.set_positions(*std::min_element(scratch.position, scratch.position + rows),
                           *std::max_element(scratch.position, scratch.position + rows));
      groups.add_row(call.plan.entry_begin.data()[job.plan_row], call.plan.entry_begin.data()[job.plan_row + 1]);
      for (std::int64_t r = 0; r < rows; ++r) {
        const float lse = finish_row(call, shape, rule, job.sequence, scratch.head[r], scratch.query[r],
                                     scratch.maximum[r], scratch.sum[r], scratch.output_rows[r]);
        if (call.follows_maxima()) finish_maxima(call, rule, job, scratch, r, lse);
      }
    }
  });
}
