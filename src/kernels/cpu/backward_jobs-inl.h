// Backward: the jobs of the two schedules, query tiles and key tiles with their queries, and the sums of lanes.
// Included once per level.

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
