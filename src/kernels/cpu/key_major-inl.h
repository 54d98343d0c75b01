// Key-major: many query rows with few rows per plan row (per-query block selection). One key tile at a time is
// multiplied with all the queries of the job that selected it, so that its packing is paid once; the rows' softmax
// states and outputs wait in accumulators meanwhile. Included once per level.

void attend_key_major(const Call& call, const TileShape& shape, const ScoreRule& rule, const KeyMajorJob& job,
                      const SelectionsByTile& selected, const PackedSource* sources, TileScratch& scratch,
                      float* accumulators) {
  const Plan& plan = call.plan;
  const std::int64_t rows = job.queries * job.heads;
  auto* q = reinterpret_cast<std::uint32_t*>(accumulators);  // [queries][heads][q_stride]
  float* output = accumulators + rows * scratch.q_stride;    // [queries][heads][value_columns]
  float* maximum = output + rows * shape.value_columns;      // [queries][heads]
  float* sum = maximum + rows;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::byte* row =
        call.query_row(call.inputs.q, job.sequence, job.first_head + r % job.heads, job.first_query + r / job.heads);
    stage_query(shape, rule, row, call.inputs.q.dtype, scratch.q_stride, q + r * scratch.q_stride);
    maximum[r] = rule.first_maximum();
    sum[r] = 0;
  }
  std::memset(output, 0, static_cast<std::size_t>(rows * shape.value_columns) * sizeof(float));

  const TileJob as_tile{job.sequence, job.block, 0, job.first_head, job.heads, job.first_query, job.queries, 0};
  const std::int64_t offset = call.problem().q_offset_of(job.sequence);
  const std::int64_t plan_row = plan.row_begin.data()[job.block] + job.first_query / plan.tile_q;
  const auto entry_of = [&](const Selection& s) -> const PlanEntry& {
    return plan.entries.data()[plan.entry_begin.data()[plan_row + s.plan_row] + s.entry];
  };

  with_product(shape, [&](auto product) {
    const Selection* first = nullptr;  // the selections of one tile that share a mask
    const Selection* last = nullptr;
    const auto flush = [&] {
      std::int64_t count = 0;
      std::int64_t accumulator[kTileRows];
      const auto process = [&] {
        process_block<decltype(product)>(call, shape, rule, as_tile, sources, scratch, count);
        for (std::int64_t r = 0; r < count; ++r) {
          maximum[accumulator[r]] = scratch.maximum[r];
          sum[accumulator[r]] = scratch.sum[r];
        }
        count = 0;
      };
      for (const Selection* s = first; s != last; ++s) {
        const std::int64_t begin = s->plan_row * plan.tile_q;
        const std::int64_t end = std::min(begin + plan.tile_q, job.queries);
        for (std::int64_t r = begin * job.heads; r < end * job.heads; ++r) {
          scratch.q_rows[count] = q + r * scratch.q_stride;
          scratch.output_rows[count] = output + r * shape.value_columns;
          scratch.maximum[count] = maximum[r];
          scratch.shift[count] = maximum[r] == kMinusInfinity ? 0.0F : -maximum[r] * rule.to_log2;
          scratch.sum[count] = sum[r];
          scratch.position[count] = static_cast<std::int32_t>(offset + job.first_query + r / job.heads);
          scratch.query[count] = static_cast<std::int32_t>(job.first_query + r / job.heads);
          scratch.head[count] = static_cast<std::int32_t>(job.first_head + r % job.heads);
          scratch.row_in_tile[count] = static_cast<std::int32_t>(r / job.heads % plan.tile_q);
          accumulator[count] = r;
          if (++count == kTileRows) process();
        }
      }
      if (count > 0) process();
    };
    GroupCollector<decltype(flush)> groups(call, shape, job.block, sources, scratch, flush);
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

  for (std::int64_t r = 0; r < rows; ++r) {
    finish_row(call, shape, rule, job.sequence, job.first_head + r % job.heads, job.first_query + r / job.heads,
               maximum[r], sum[r], output + r * shape.value_columns);
  }
}
