#include "kernels/int8_attention.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "kernels/kernels.h"
#include "kernels/key_rows.h"
#include "kernels/quantised_rows.h"

namespace tessera::kernels {

namespace {

constexpr float kLog2E = 1.4426950409F;
/// Keys whose sums are gathered at once; fixed, so that threads do not change a sum.
constexpr std::int64_t kChunk = 256;
/// Longest key tile: products of a tile stay exact in 32 bits, scores of a job in the cache.
constexpr std::int64_t kMostTile = 4096;

void check_plan(const Plan& plan, const AttentionInputs& inputs) {
  require(!inputs.modifiers.changes_scores() && inputs.modifiers.sink_logits.empty(),
          "8-bit attention knows no modifiers of scores; expected none");
  require(plan.tile_k <= kMostTile, "8-bit attention: key tiles of {} keys; expected at most {}", plan.tile_k,
          kMostTile);
  for (std::int64_t block = 0; block + 1 < static_cast<std::int64_t>(plan.row_begin.size()); ++block) {
    for (std::int64_t row = plan.row_begin[block]; row < plan.row_begin[block + 1]; ++row) {
      for (const PlanEntry& entry : plan.row(row)) {
        bool whole = entry.source == 0 && entry.mask == EntryMask::none && entry.kind != EntryKind::gather;
        if (whole) {
          const Plan::KeyRange keys = plan.keys_of(entry, block);
          const std::int64_t end = keys.begin + keys.count;
          whole = keys.begin % plan.tile_k == 0 && (end % plan.tile_k == 0 || end == plan.source_keys(0, block));
        }
        require(whole, "8-bit attention runs plans of whole tiles of raw keys without masks");
      }
    }
  }
}

void check_outputs(const Problem& problem, const AttentionOutputs& outputs) {
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  const std::array<std::int64_t, 4> shape{batch, problem.q_heads, problem.q_len, problem.value_dim};
  require(outputs.o.data != nullptr && is_attention_dtype(outputs.o.dtype) && outputs.o.shape == shape &&
              outputs.o.strides[3] == 1,
          "o is {} [{}]; expected f32, bf16 or f16 [{}]", name_of(outputs.o.dtype), fmt::join(outputs.o.shape, ", "),
          fmt::join(shape, ", "));
  require(outputs.lse.empty() || static_cast<std::int64_t>(outputs.lse.size()) == batch * shape[1] * shape[2],
          "lse has {} elements; expected 0 or {}", outputs.lse.size(), batch * shape[1] * shape[2]);
  require(outputs.scores.data == nullptr, "8-bit attention writes no scores");
}

/// Keys and values of one (sequence, head) as bytes, in the order of the plan.
struct Int8Keys {
  QuantisedRows k;
  std::vector<float> mean;          ///< [head_dim]: taken off the keys
  std::vector<float> value_scales;  ///< [value_columns], 1 behind value_dim
  AlignedBuffer v;
  std::int64_t value_columns = 0;
  // Whose they are.
  std::int64_t sequence = -1;
  std::int64_t kv_head = -1;
  std::int64_t block = -1;

  ByteKeys view() const {
    return {.tile = k.tile,
            .stride = k.stride,
            .keys = k.rows,
            .key_words = k.words,
            .value_columns = value_columns,
            .k = reinterpret_cast<const std::uint32_t*>(k.panels.data()),
            .k_scales = k.scales.data(),
            .k_sums = k.shift_sums.data(),
            .v = reinterpret_cast<const std::uint32_t*>(v.data()),
            .spoilt = k.spoilt.data()};
  }
};

bool finite(const float* row, std::int64_t count) {
  float difference = 0;
  for (std::int64_t d = 0; d < count; ++d) difference += row[d] - row[d];
  return difference == 0;
}

/// Mean of the finite rows, and the largest magnitude of every column of theirs.
struct ColumnStatistics {
  std::vector<float> mean;
  std::vector<float> largest;
};

ColumnStatistics column_statistics(const KeyRows& rows, std::int64_t count, std::int64_t dim, int threads) {
  const std::int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<std::vector<double>> sums(static_cast<std::size_t>(chunks));
  std::vector<std::vector<float>> largest(static_cast<std::size_t>(chunks));
  std::vector<std::int64_t> finite_rows(static_cast<std::size_t>(chunks), 0);
  parallel_for(chunks, threads, [&](std::int64_t c, int) {
    const auto i = static_cast<std::size_t>(c);
    sums[i].assign(static_cast<std::size_t>(dim), 0.0);
    largest[i].assign(static_cast<std::size_t>(dim), 0.0F);
    std::vector<float> row(static_cast<std::size_t>(dim));
    for (std::int64_t j = c * kChunk; j < std::min(count, (c + 1) * kChunk); ++j) {
      to_float(rows.row(j), rows.dtype, dim, row.data());
      if (!finite(row.data(), dim)) continue;
      ++finite_rows[i];
      for (std::size_t d = 0; d < row.size(); ++d) {
        sums[i][d] += static_cast<double>(row[d]);
        largest[i][d] = std::max(largest[i][d], std::abs(row[d]));
      }
    }
  });
  ColumnStatistics result{std::vector<float>(static_cast<std::size_t>(dim)),
                          std::vector<float>(static_cast<std::size_t>(dim), 0.0F)};
  std::int64_t total = 0;
  for (const std::int64_t n : finite_rows) total += n;
  for (std::size_t d = 0; d < result.mean.size(); ++d) {
    double sum = 0;
    for (std::size_t c = 0; c < sums.size(); ++c) {
      sum += sums[c][d];
      result.largest[d] = std::max(result.largest[d], largest[c][d]);
    }
    result.mean[d] = static_cast<float>(sum / static_cast<double>(std::max<std::int64_t>(1, total)));
  }
  return result;
}

/// Values as bytes of one scale per column, four keys to a word.
void quantise_values(const ByteKernels& kernels, const KeyRows& rows, std::span<const std::int32_t> order,
                     std::int64_t dim, int threads, Int8Keys& keys) {
  const ColumnStatistics columns = column_statistics(rows, keys.k.rows, dim, threads);
  keys.value_columns = (dim + 15) / 16 * 16;
  keys.value_scales.assign(static_cast<std::size_t>(keys.value_columns), 1.0F);
  for (std::size_t d = 0; d < columns.largest.size(); ++d) {
    const float scale = columns.largest[d] / kLevels8;
    if (scale >= std::numeric_limits<float>::min()) keys.value_scales[d] = scale;
  }
  const std::int64_t tile_bytes = keys.k.stride * keys.value_columns;
  const std::int64_t panel_bytes = keys.k.stride * 16;
  keys.v = AlignedBuffer(static_cast<std::size_t>(keys.k.tiles() * tile_bytes));
  parallel_for(keys.k.tiles(), threads, [&](std::int64_t t, int) {
    std::vector<float> row(static_cast<std::size_t>(keys.value_columns), 0.0F);
    std::vector<std::uint8_t> bytes(row.size());
    auto* tile = reinterpret_cast<std::uint8_t*>(keys.v.data()) + t * tile_bytes;
    std::memset(tile, 0, static_cast<std::size_t>(tile_bytes));
    for (std::int64_t j = 0; j < std::min(keys.k.tile, keys.k.rows - t * keys.k.tile); ++j) {
      const std::int64_t place = t * keys.k.tile + j;
      to_float(rows.row(order.empty() ? place : order[static_cast<std::size_t>(place)]), rows.dtype, dim, row.data());
      if (!finite(row.data(), dim)) {
        keys.k.spoilt[static_cast<std::size_t>(t)] = 1;
        continue;
      }
      kernels.to_bytes(row.data(), keys.value_scales.data(), keys.value_columns, 0, bytes.data());
      std::uint8_t* to = tile + j / 4 * 64 + j % 4;
      for (std::int64_t panel = 0; panel < keys.value_columns / 16; ++panel, to += panel_bytes) {
        for (std::int64_t d = 0; d < 16; ++d) to[d * 4] = bytes[static_cast<std::size_t>(panel * 16 + d)];
      }
    }
  });
}

/// Memory of one thread.
struct Worker {
  ByteRowBlock queries;
  std::vector<float> mean_scores;  ///< what the mean of the keys gave every score of a row
  std::vector<float> scores;
  std::vector<std::uint8_t> probabilities;
  std::vector<float> output;
  std::array<float, kByteRows> maximum{};
  std::array<float, kByteRows> sum{};
  std::vector<std::int32_t> tiles;

  Worker(std::int64_t tile_q, std::int64_t head_dim, std::int64_t value_dim, std::int64_t stride)
      : queries(tile_q, head_dim),
        mean_scores(static_cast<std::size_t>(tile_q)),
        scores(static_cast<std::size_t>(kByteRows * stride)),
        probabilities(scores.size()),
        output(static_cast<std::size_t>(kByteRows * ((value_dim + 15) / 16 * 16))) {}
  ByteScratch scratch() { return {scores.data(), probabilities.data(), output.data(), maximum.data(), sum.data()}; }
};

class Int8Attention {
 public:
  Int8Attention(const Call& call, const ByteKernels& kernels) : call_(call), kernels_(kernels) {}

  void run() {
    const Problem& problem = call_.problem();
    clear_uncovered_rows(call_);
    const std::int64_t stride = (call_.plan.tile_k + 15) / 16 * 16;
    std::vector<Worker> workers;
    workers.reserve(static_cast<std::size_t>(call_.threads));
    for (int i = 0; i < call_.threads; ++i) {
      workers.emplace_back(call_.plan.tile_q, problem.head_dim, problem.value_dim, stride);
    }
    for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
      for (std::int64_t head = 0; head < problem.q_heads; ++head) {
        const std::int64_t block = call_.plan.block_of(sequence, head);
        ready_keys(sequence, head / problem.group(), block);
        const std::int64_t tiles = (call_.plan.queries_of(block) + call_.plan.tile_q - 1) / call_.plan.tile_q;
        parallel_for(tiles, call_.threads, [&](std::int64_t tile, int thread) {
          run_tile(sequence, head, block, tile, workers[static_cast<std::size_t>(thread)]);
        });
      }
    }
  }

 private:
  std::span<const std::int32_t> key_order(std::int64_t block) const {
    const auto& orders = call_.plan.key_order;
    return orders.empty() ? std::span<const std::int32_t>() : orders[static_cast<std::size_t>(block)];
  }

  void ready_keys(std::int64_t sequence, std::int64_t kv_head, std::int64_t block) {
    const std::span<const std::int32_t> order = key_order(block);
    if (keys_.sequence == sequence && keys_.kv_head == kv_head && std::ranges::equal(order, key_order(keys_.block))) {
      return;  // heads of a group that share an order share the bytes
    }
    const Problem& problem = call_.problem();
    const std::int64_t count = problem.kv_len_of(sequence);
    const KeyRows k = key_rows_of(problem, call_.inputs.k, call_.inputs.pages, sequence, kv_head);
    const KeyRows v = key_rows_of(problem, call_.inputs.v, call_.inputs.pages, sequence, kv_head);
    keys_.sequence = sequence;
    keys_.kv_head = kv_head;
    keys_.block = block;
    keys_.mean = column_statistics(k, count, problem.head_dim, call_.threads).mean;
    keys_.k = quantise_rows(kernels_, count, problem.head_dim, call_.plan.tile_k, kLevels8, call_.threads,
                            [&](std::int64_t place, float* row) {
                              const std::int64_t key = order.empty() ? place : order[static_cast<std::size_t>(place)];
                              to_float(k.row(key), k.dtype, problem.head_dim, row);
                              for (std::size_t d = 0; d < keys_.mean.size(); ++d) row[d] -= keys_.mean[d];
                            });
    quantise_values(kernels_, v, order, problem.value_dim, call_.threads, keys_);
  }

  void run_tile(std::int64_t sequence, std::int64_t head, std::int64_t block, std::int64_t tile, Worker& worker) const {
    const Problem& problem = call_.problem();
    const Plan& plan = call_.plan;
    const std::int64_t first = tile * plan.tile_q;
    const std::int64_t rows = std::min(plan.tile_q, plan.queries_of(block) - first);
    const auto* order = plan.query_order.empty() || plan.query_order[static_cast<std::size_t>(block)].empty()
                            ? nullptr
                            : &plan.query_order[static_cast<std::size_t>(block)];
    const auto query_of = [&](std::int64_t r) {
      return order == nullptr ? first + r : (*order)[static_cast<std::size_t>(first + r)];
    };
    for (std::int64_t r = 0; r < rows; ++r) {
      float* row = worker.queries.row(r);
      to_float(call_.query_row(call_.inputs.q, sequence, head, query_of(r)), call_.inputs.q.dtype, problem.head_dim,
               row);
      double dot = 0;
      for (std::size_t d = 0; d < keys_.mean.size(); ++d) dot += static_cast<double>(row[d]) * keys_.mean[d];
      worker.mean_scores[static_cast<std::size_t>(r)] = static_cast<float>(dot) * problem.softmax_scale();
    }
    const float scale = worker.queries.quantise(kernels_, rows, kLevels8, kByteShift);
    worker.tiles.clear();
    for (const PlanEntry& entry : plan.row(plan.row_begin[static_cast<std::size_t>(block)] + tile)) {
      const Plan::KeyRange keys = plan.keys_of(entry, block);
      for (std::int64_t j = keys.begin; j < keys.begin + keys.count; j += plan.tile_k) {
        worker.tiles.push_back(static_cast<std::int32_t>(j / plan.tile_k));
      }
    }
    const ByteKeys keys = keys_.view();
    for (std::int64_t done = 0; done < rows; done += kByteRows) {
      const ByteRows job{.rows = std::min(kByteRows, rows - done),
                         .q = worker.queries.bytes.data() + done * worker.queries.stride,
                         .q_stride = worker.queries.stride,
                         .to_log2 = scale * problem.softmax_scale() * kLog2E};
      std::fill(worker.output.begin(), worker.output.end(), 0.0F);
      worker.maximum.fill(-std::numeric_limits<float>::infinity());
      worker.sum.fill(0.0F);
      kernels_.attend(keys, job, worker.tiles.data(), static_cast<std::int64_t>(worker.tiles.size()), worker.scratch());
      for (std::int64_t r = 0; r < job.rows; ++r) write_row(sequence, head, query_of(done + r), done + r, r, worker);
    }
  }

  void write_row(std::int64_t sequence, std::int64_t head, std::int64_t query, std::int64_t row, std::int64_t place,
                 Worker& worker) const {
    const Problem& problem = call_.problem();
    const auto r = static_cast<std::size_t>(place);
    float sum = worker.sum[r];
    if (worker.queries.spoilt[static_cast<std::size_t>(row)] != 0 && !worker.tiles.empty()) {
      sum = std::numeric_limits<float>::quiet_NaN();
    }
    float* output = worker.output.data() + place * keys_.value_columns;
    for (std::int64_t d = 0; d < problem.value_dim; ++d) {
      output[d] = sum == 0 ? 0.0F : output[d] * keys_.value_scales[static_cast<std::size_t>(d)] / sum;
    }
    from_float(output, problem.value_dim, call_.outputs.o.dtype,
               call_.query_row(call_.outputs.o, sequence, head, query));
    if (call_.outputs.lse.empty()) return;
    call_.outputs.lse[static_cast<std::size_t>(call_.lse_index(sequence, head, query))] =
        sum == 0 ? -std::numeric_limits<float>::infinity()
                 : worker.maximum[r] / kLog2E + std::log(sum) + worker.mean_scores[static_cast<std::size_t>(row)];
  }

  const Call& call_;
  const ByteKernels& kernels_;
  Int8Keys keys_;
};

}  // namespace

RunReport run_int8(const Plan& plan, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const RunOptions& options) {
  check_inputs(plan.problem, inputs);
  check_plan(plan, inputs);
  check_outputs(plan.problem, outputs);
  const auto start = std::chrono::steady_clock::now();
  RunReport report;
  report.kernel = options.kernel;
  report.isa = options.isa.value_or(default_isa());
  report.threads = thread_count(options.threads);
  const Call call{plan, inputs, outputs, report.threads, options.workspace_bytes, options.workspace};
  Int8Attention(call, byte_kernels_of(report.isa)).run();
  report.kernel_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace tessera::kernels
