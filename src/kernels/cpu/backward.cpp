// Schedules the backward pass: query rows of every (sequence, kv head) dealt out over lanes with sums of their own for
// the gradients of keys and values, which are added in order.
#include "kernels/cpu/backward.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/packed_sources.h"
#include "kernels/cpu/schedule.h"
#include "kernels/cpu/selections.h"

namespace tessera::kernels {

namespace {

/// Lanes of a whole call, at least: as many threads find work. Fixed, so that results do not depend on the threads.
constexpr std::int64_t kLanes = 16;
/// Sums of the lanes of one (sequence, kv head) hold at most this much, unless a single lane needs more.
constexpr std::int64_t kMostLaneBytes = std::int64_t{1} << 30;
/// Query rows of a key-major job, as in the forward kernel.
constexpr std::int64_t kChunkRows = 4096;
/// Keys of a lane's sums that are cleared and added together.
constexpr std::int64_t kChunkKeys = 64;

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// Hands out 64-byte aligned pieces of a buffer; with a null buffer it only counts.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}
  template <class T>
  void take(T*& piece, std::int64_t count) {
    piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), 64));
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

std::int64_t zero_row_bytes(const BackwardShape& shape) {
  return 4 * std::max(shape.query_stride, shape.output_stride);
}

std::size_t carve(const BackwardShape& shape, std::byte* memory, BackwardScratch& own) {
  Carver carver(memory);
  constexpr std::int64_t slabs = kTileRows / 16;
  carver.take(own.q_rows, 16 * shape.query_stride);
  carver.take(own.o_rows, 16 * shape.output_stride);
  carver.take(own.zero_row, zero_row_bytes(shape));
  carver.take(own.q_panels, kTileRows * shape.query_stride);
  carver.take(own.o_panels, kTileRows * shape.output_stride);
  carver.take(own.q_values, slabs * shape.queries.v_panel);
  carver.take(own.o_values, slabs * shape.outputs.v_panel);
  carver.take(own.k_rows, kBlockKeys * shape.query_stride);
  carver.take(own.v_rows, kBlockKeys * shape.output_stride);
  carver.take(own.k_values, kBlockGroups * shape.queries.v_panel);
  carver.take(own.scores, kGroupKeys * kTileRows);
  carver.take(own.d_probabilities, kGroupKeys * kTileRows);
  carver.take(own.p_rows, kGroupKeys * kTileRows);
  carver.take(own.ds_rows, kGroupKeys * kTileRows);
  carver.take(own.ds_panels, kBlockKeys * kTileRows);
  carver.take(own.ds_turned, kBlockKeys * kTileRows);
  carver.take(own.d_q, kTileRows * shape.queries.value_columns);
  carver.take(own.spare_rows, (kGroupKeys + 1) * shape.row_floats);
  carver.take(own.delta, kTileRows);
  carver.take(own.shift, kTileRows);
  carver.take(own.slope, kTileRows);
  carver.take(own.query_scale, kTileRows);
  carver.take(own.inverse_sum, kTileRows);
  carver.take(own.weight_factor, kTileRows);
  carver.take(own.d_weight_factor, kTileRows);
  return carver.used();
}

TileShape value_shape(std::int64_t dim, bool pairs) {
  TileShape shape{};
  shape.value_dim = dim;
  shape.value_columns = round_up(dim, 16);
  shape.dtype = pairs ? DType::bf16 : DType::f32;
  shape.pair_product = pairs;
  shape.v_panel = shape.value_columns * kGroupKeys / (pairs ? 2 : 1);
  return shape;
}

BackwardShape shape_of_backward(const BackwardCall& backward, const LevelKernels& level) {
  const AttentionInputs& inputs = backward.call.inputs;
  const bool pairs = level.pairs_bf16 && inputs.q.dtype == DType::bf16 && inputs.k.dtype == DType::bf16 &&
                     backward.saved.d_o.dtype == DType::bf16;
  return backward_shape_of(backward.problem(), inputs.k.dtype, pairs);
}

BackwardRule backward_rule_of(const BackwardCall& backward) {
  constexpr float log2e = 1.4426950409F;
  const AttentionInputs& inputs = backward.call.inputs;
  BackwardRule rule{};
  rule.modified = inputs.modifiers.changes_scores();
  for (const KeySource& source : inputs.sources) rule.modified = rule.modified || !source.log_weight.empty();
  rule.weights = inputs.modifiers.weights;
  rule.to_natural = backward.problem().softmax_scale();
  rule.to_log2 = rule.modified ? log2e : rule.to_natural * log2e;
  rule.wants_bias = backward.gradients.d_key_bias.data != nullptr;
  for (const SourceGradients& source : backward.gradients.sources) {
    rule.wants_bias = rule.wants_bias || !source.d_log_weight.empty();
  }
  return rule;
}

/// One job of either kernel with the pairs it computes, for dealing out.
struct Job {
  TileJob tile;
  KeyMajorJob chunk;
  std::int64_t work = 0;
  std::int64_t block = 0;
  std::int64_t first_row = 0;  ///< rows of the plan that it runs
  std::int64_t end_row = 0;
  std::int64_t first_query = 0;
};

std::int64_t keys_in_row(const Plan& plan, std::int64_t row, std::int64_t block) {
  std::int64_t keys = 0;
  for (const PlanEntry& entry : plan.row(row)) keys += plan.keys_of(entry, block).count;
  return keys;
}

/// Query tiles of one (sequence, kv head): those of all heads of a plan row together while they fit a tile.
std::vector<Job> tile_jobs(const Plan& plan, std::int64_t sequence, std::int64_t kv_head) {
  const Problem& problem = plan.problem;
  const std::int64_t first_head = kv_head * problem.group();
  const std::int64_t end_head = first_head + problem.group();
  const std::int64_t shared = heads_per_row(plan);
  const std::int64_t most_heads = std::clamp(kTileRows / plan.tile_q, std::int64_t{1}, shared);
  std::vector<Job> jobs;
  for (std::int64_t head = first_head; head < end_head;) {
    const std::int64_t shared_end = std::min(end_head, head - (head - first_head) % shared + shared);
    const std::int64_t heads = std::min(most_heads, shared_end - head);
    const std::int64_t block = plan.block_of(sequence, head);
    const std::int64_t queries = plan.queries_of(block);
    for (std::int64_t place = 0; place < queries; place += plan.tile_q) {
      const std::int64_t row = plan.row_begin[static_cast<std::size_t>(block)] + place / plan.tile_q;
      Job job;
      job.tile = {sequence, block, row, head, heads, place, std::min(plan.tile_q, queries - place), 0};
      job.work = keys_in_row(plan, row, block) * job.tile.rows();
      job.block = block;
      job.first_row = row;
      job.end_row = row + 1;
      job.first_query = place;
      jobs.push_back(job);
    }
    head += heads;
  }
  return jobs;
}

std::vector<Job> chunk_jobs(const Plan& plan, std::int64_t sequence, std::int64_t kv_head) {
  const Problem& problem = plan.problem;
  const std::int64_t heads = heads_per_row(plan);
  const std::int64_t chunk = std::max<std::int64_t>(1, kChunkRows / heads / plan.tile_q) * plan.tile_q;
  std::vector<Job> jobs;
  for (std::int64_t head = kv_head * problem.group(); head < (kv_head + 1) * problem.group(); head += heads) {
    const std::int64_t block = plan.block_of(sequence, head);
    const std::int64_t queries = problem.q_len_of(sequence);
    for (std::int64_t q = 0; q < queries; q += chunk) {
      Job job;
      job.chunk = {sequence, block, head, heads, q, std::min(chunk, queries - q)};
      const std::int64_t first = plan.row_begin[static_cast<std::size_t>(block)] + q / plan.tile_q;
      const std::int64_t rows = (job.chunk.queries + plan.tile_q - 1) / plan.tile_q;
      for (std::int64_t r = first; r < first + rows; ++r) job.work += keys_in_row(plan, r, block);
      job.block = block;
      job.first_row = first;
      job.end_row = first + rows;
      job.first_query = q;
      jobs.push_back(job);
    }
  }
  return jobs;
}

/// Lanes [first, end) that hold sums of a chunk of keys.
struct LaneRange {
  std::int64_t first = 0;
  std::int64_t end = 0;
};

/// One (sequence, kv head) of a wave.
struct PairWork {
  std::int64_t sequence;
  std::int64_t kv_head;
  std::vector<std::int64_t> source_begin;  // first key of each source in the sums; last: all keys
  std::vector<std::vector<Job>> lanes;
  std::vector<LaneRange> chunks;  // of kChunkKeys of the sums
  std::size_t first_float = 0;    // of its lanes in the wave's sums
  std::int64_t lane_floats = 0;
  std::int64_t keys() const { return source_begin.back(); }
};

/// Neighbouring queries to the same lane: these read the same keys, whose sums then stay in the cache, and windows and
/// causal rows touch part of the keys only. Empty where the lanes' shares would be uneven.
std::vector<std::vector<Job>> deal_in_order(std::vector<Job> jobs, std::int64_t lanes) {
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.first_query < b.first_query; });
  std::int64_t total = 0;
  for (const Job& job : jobs) total += job.work;
  std::vector<std::vector<Job>> dealt(static_cast<std::size_t>(lanes));
  std::vector<std::int64_t> load(static_cast<std::size_t>(lanes), 0);
  std::int64_t before = 0;
  for (const Job& job : jobs) {
    const double middle = static_cast<double>(before) + static_cast<double>(job.work) / 2;
    const auto lane = total == 0 ? 0
                                 : std::min(lanes - 1, static_cast<std::int64_t>(middle * static_cast<double>(lanes) /
                                                                                 static_cast<double>(total)));
    dealt[static_cast<std::size_t>(lane)].push_back(job);
    load[static_cast<std::size_t>(lane)] += job.work;
    before += job.work;
  }
  const std::int64_t most = *std::max_element(load.begin(), load.end());
  constexpr double uneven = 1.125;
  if (static_cast<double>(most * lanes) > uneven * static_cast<double>(total)) return {};
  return dealt;
}

/// Longest job first, each to the lane with the least work.
std::vector<std::vector<Job>> deal_by_length(std::vector<Job> jobs, std::int64_t lanes) {
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.work > b.work; });
  std::vector<std::vector<Job>> dealt(static_cast<std::size_t>(lanes));
  std::vector<std::int64_t> load(static_cast<std::size_t>(lanes), 0);
  for (const Job& job : jobs) {
    const auto least = std::min_element(load.begin(), load.end()) - load.begin();
    dealt[static_cast<std::size_t>(least)].push_back(job);
    load[static_cast<std::size_t>(least)] += job.work;
  }
  return dealt;
}

std::vector<std::vector<Job>> deal(const std::vector<Job>& jobs, std::int64_t lanes) {
  std::vector<std::vector<Job>> dealt = deal_in_order(jobs, lanes);
  return dealt.empty() ? deal_by_length(jobs, lanes) : dealt;
}

/// For every chunk of the sums, the lanes from the first to the last that add to it.
std::vector<LaneRange> lanes_of_chunks(const Plan& plan, const PairWork& work) {
  std::vector<LaneRange> chunks(static_cast<std::size_t>((work.keys() + kChunkKeys - 1) / kChunkKeys));
  for (std::size_t l = 0; l < work.lanes.size(); ++l) {
    const auto lane = static_cast<std::int64_t>(l);
    const auto mark = [&](std::int64_t first, std::int64_t count) {
      for (std::int64_t c = first / kChunkKeys; c * kChunkKeys < first + count; ++c) {
        LaneRange& range = chunks[static_cast<std::size_t>(c)];
        if (range.end == 0) range.first = lane;
        range.end = lane + 1;
      }
    };
    for (const Job& job : work.lanes[l]) {
      const bool reordered = !plan.key_order.empty() && !plan.key_order[static_cast<std::size_t>(job.block)].empty();
      for (std::int64_t row = job.first_row; row < job.end_row; ++row) {
        for (const PlanEntry& entry : plan.row(row)) {
          const Plan::KeyRange keys = plan.keys_of(entry, job.block);
          const std::int64_t begin = work.source_begin[entry.source];
          if (entry.source == 0 && reordered) {
            mark(0, work.source_begin[1]);
          } else if (entry.kind == EntryKind::gather) {
            for (std::int64_t i = 0; i < keys.count; ++i) {
              mark(begin + plan.tokens[static_cast<std::size_t>(keys.begin + i)], 1);
            }
          } else {
            mark(begin + keys.begin, keys.count);
          }
        }
      }
    }
  }
  return chunks;
}

class Backward {
 public:
  Backward(const BackwardCall& backward, const LevelKernels& level, bool key_major)
      : backward_(backward),
        call_(backward.call),
        level_(level),
        kernels_(level.backward()),
        key_major_(key_major),
        shape_(shape_of_backward(backward, level)),
        rule_(backward_rule_of(backward)),
        scratch_(call_, shape_.keys, false),
        own_bytes_(backward_scratch_bytes(shape_)),
        own_memory_(call_.workspace, own_bytes_ * static_cast<std::size_t>(call_.threads)),
        own_(static_cast<std::size_t>(call_.threads)) {
    for (std::size_t t = 0; t < own_.size(); ++t) {
      place_backward_scratch(shape_, own_memory_.data() + t * own_bytes_, own_[t]);
    }
    const Problem& problem = call_.problem();
    const std::int64_t heads = heads_per_row(call_.plan);
    chunk_floats_ = std::max<std::int64_t>(heads * call_.plan.tile_q, kChunkRows) * shape_.queries.value_columns;
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    const auto rows = static_cast<std::size_t>(batch * problem.q_heads * problem.q_len);
    deltas_.resize(rows);
    shifts_.resize(rows);
    rows_ = {deltas_.data(), shifts_.data()};
  }

  std::size_t run() {
    const Problem& problem = call_.problem();
    number_rows();
    add_sink_gradients();
    if (key_major_) {
      chunk_memory_ =
          BorrowedBuffer(call_.workspace, static_cast<std::size_t>(chunk_floats_ * call_.threads) * sizeof(float));
    }
    const std::int64_t pairs = problem.batch * problem.kv_heads;
    std::size_t most = 0;
    for (std::int64_t pair = 0; pair < pairs;) {
      std::vector<PairWork> wave;
      std::int64_t lanes = 0;
      std::size_t floats = 0;
      for (; pair < pairs && (lanes == 0 || lanes < std::max<std::int64_t>(kLanes, call_.threads)); ++pair) {
        wave.push_back(work_of(pair / problem.kv_heads, pair % problem.kv_heads, pairs));
        wave.back().first_float = floats;
        lanes += static_cast<std::int64_t>(wave.back().lanes.size());
        floats += wave.back().lanes.size() * static_cast<std::size_t>(wave.back().lane_floats);
      }
      run_wave(wave, floats);
      most = std::max(most, floats * sizeof(float));
    }
    return most + scratch_.bytes() + own_.size() * own_bytes_;
  }

 private:
  void number_rows() {
    const Problem& problem = call_.problem();
    constexpr std::int64_t chunk = 256;
    for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
      const std::int64_t queries = problem.q_len_of(sequence);
      const std::int64_t chunks = (queries + chunk - 1) / chunk;
      parallel_for(chunks * problem.q_heads, call_.threads, [&](std::int64_t i, int) {
        const std::int64_t first = i % chunks * chunk;
        kernels_.backward_row_numbers(backward_, sequence, i / chunks, first, std::min(first + chunk, queries), rows_);
      });
    }
  }

  void add_sink_gradients() {
    const std::span<float> out = backward_.gradients.d_sink_logits;
    const Problem& problem = call_.problem();
    for (std::size_t head = 0; head < out.size(); ++head) {
      const double sink = call_.inputs.modifiers.sink_logits[head];
      double sum = 0;
      for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
        for (std::int64_t query = 0; query < problem.q_len_of(sequence); ++query) {
          const auto index =
              static_cast<std::size_t>(call_.lse_index(sequence, static_cast<std::int64_t>(head), query));
          const double lse = backward_.saved.lse[index];
          if (!(std::isinf(lse) && lse < 0)) sum -= std::exp(sink - lse) * static_cast<double>(deltas_[index]);
        }
      }
      out[head] = static_cast<float>(sum);
    }
  }

  PairWork work_of(std::int64_t sequence, std::int64_t kv_head, std::int64_t pairs) const {
    PairWork work;
    work.sequence = sequence;
    work.kv_head = kv_head;
    work.source_begin = {0, call_.problem().kv_len_of(sequence)};
    for (const KeySource& source : call_.inputs.sources) {
      work.source_begin.push_back(work.keys() + source.k.tokens());
    }
    work.lane_floats = work.keys() * shape_.row_floats;
    if (rule_.wants_bias) work.lane_floats += work.keys() * call_.problem().group();
    work.lane_floats = round_up(work.lane_floats, 16);
    std::vector<Job> jobs =
        key_major_ ? chunk_jobs(call_.plan, sequence, kv_head) : tile_jobs(call_.plan, sequence, kv_head);
    const std::int64_t fit = kMostLaneBytes / std::max<std::int64_t>(1, work.lane_floats * 4);
    const std::int64_t wanted = std::min((kLanes + pairs - 1) / pairs, static_cast<std::int64_t>(jobs.size()));
    work.lanes = deal(jobs, std::max<std::int64_t>(1, std::min(wanted, fit)));
    work.chunks = lanes_of_chunks(call_.plan, work);
    return work;
  }

  void run_wave(const std::vector<PairWork>& wave, std::size_t floats) {
    const BorrowedBuffer memory(call_.workspace, floats * sizeof(float));
    auto* sums = reinterpret_cast<float*>(memory.data());
    std::vector<PackedSources::Pair> pairs;
    pairs.reserve(wave.size());
    for (const PairWork& work : wave) pairs.push_back({work.sequence, work.kv_head});
    const PackedSources sources(call_, shape_.keys, level_, std::move(pairs), {});
    struct LaneOfPair {
      std::size_t pair;
      std::size_t lane;
    };
    std::vector<LaneOfPair> lanes;
    for (std::size_t i = 0; i < wave.size(); ++i) {
      for (std::size_t l = 0; l < wave[i].lanes.size(); ++l) lanes.push_back({i, l});
    }
    parallel_for(static_cast<std::int64_t>(lanes.size()), call_.threads, [&](std::int64_t i, int thread) {
      const LaneOfPair& at = lanes[static_cast<std::size_t>(i)];
      run_lane(wave[at.pair], at.lane, sources.of(at.pair), sums, thread);
    });
    for (const PairWork& work : wave) write_keys(work, sums + work.first_float);
  }

  void run_lane(const PairWork& work, std::size_t index, const PackedSource* sources, float* sums, int thread) {
    BackwardLane lane{};
    lane.keys = sums + work.first_float + index * static_cast<std::size_t>(work.lane_floats);
    lane.source_begin = work.source_begin.data();
    lane.bias_stride = work.keys();
    const std::int64_t key_floats = work.keys() * shape_.row_floats;
    for (std::size_t c = 0; c < work.chunks.size(); ++c) {
      const auto own_lane = static_cast<std::int64_t>(index);
      if (own_lane < work.chunks[c].first || own_lane >= work.chunks[c].end) continue;
      const std::int64_t first = static_cast<std::int64_t>(c) * kChunkKeys;
      std::fill_n(lane.keys + first * shape_.row_floats, std::min(kChunkKeys, work.keys() - first) * shape_.row_floats,
                  0.0F);
    }
    if (rule_.wants_bias) {
      lane.bias = lane.keys + key_floats;
      std::fill_n(lane.bias, work.lane_floats - key_floats, 0.0F);
    }
    const BackwardJobContext context{backward_, shape_, rule_, sources, rows_, lane};
    const auto own = static_cast<std::size_t>(thread);
    for (const Job& job : work.lanes[index]) {
      if (key_major_) {
        const Selections selections(call_.plan, job.chunk);
        auto* d_q = reinterpret_cast<float*>(chunk_memory_.data()) + thread * chunk_floats_;
        kernels_.backward_key_major(context, job.chunk, selections.view(), scratch_.of(thread), own_[own], d_q);
      } else {
        kernels_.backward_tile(context, job.tile, scratch_.of(thread), own_[own]);
      }
    }
  }

  /// Adds the lanes of a pair and writes the gradients of its keys.
  void write_keys(const PairWork& work, const float* sums) {
    const Problem& problem = call_.problem();
    const Gradients& gradients = backward_.gradients;
    const std::vector<float> nothing(static_cast<std::size_t>(shape_.row_floats), 0.0F);
    constexpr std::int64_t chunk = 64;
    for (std::size_t s = 0; s + 1 < work.source_begin.size(); ++s) {
      const bool raw = s == 0;
      if (!raw && gradients.sources.empty()) break;
      const MutableTensorView& d_k = raw ? gradients.d_k : gradients.sources[s - 1].d_k;
      const MutableTensorView& d_v = raw ? gradients.d_v : gradients.sources[s - 1].d_v;
      const std::int64_t batch = raw ? problem.tensor_batch_of(work.sequence) : work.sequence;
      const std::int64_t begin = raw ? problem.kv_begin_of(work.sequence) : 0;
      const std::int64_t keys = work.source_begin[s + 1] - work.source_begin[s];
      parallel_for((keys + chunk - 1) / chunk, call_.threads, [&](std::int64_t c, int) {
        for (std::int64_t key = c * chunk; key < std::min(keys, (c + 1) * chunk); ++key) {
          const std::int64_t at = work.source_begin[s] + key;
          const LaneRange& range = work.chunks[static_cast<std::size_t>(at / kChunkKeys)];
          const std::int64_t lanes = std::max<std::int64_t>(1, range.end - range.first);
          const float* row =
              range.end == 0 ? nothing.data() : sums + range.first * work.lane_floats + at * shape_.row_floats;
          if (d_k.data != nullptr) {
            kernels_.sum_lanes(row, lanes, work.lane_floats, rule_.to_natural, problem.head_dim, d_k.dtype,
                               d_k.row(batch, work.kv_head, begin + key));
          }
          if (d_v.data != nullptr) {
            kernels_.sum_lanes(row + shape_.queries.value_columns, lanes, work.lane_floats, 1.0F, problem.value_dim,
                               d_v.dtype, d_v.row(batch, work.kv_head, begin + key));
          }
        }
      });
    }
    if (rule_.wants_bias) write_bias(work, sums);
  }

  void write_bias(const PairWork& work, const float* sums) {
    const Problem& problem = call_.problem();
    const Gradients& gradients = backward_.gradients;
    const auto lanes = static_cast<std::int64_t>(work.lanes.size());
    const auto sum_of = [&](std::int64_t head, std::int64_t key) {
      const float* bias = sums + work.keys() * shape_.row_floats + head * work.keys() + key;
      float sum = 0;
      for (std::int64_t lane = 0; lane < lanes; ++lane) sum += bias[lane * work.lane_floats];
      return sum;
    };
    for (std::int64_t head = 0; head < problem.group(); ++head) {
      if (gradients.d_key_bias.data != nullptr) {
        const std::int64_t batch = gradients.d_key_bias.shape[0] == 1 ? 0 : work.sequence;
        const std::int64_t bias_head = bias_head_of(backward_, work.kv_head * problem.group() + head);
        for (std::int64_t key = 0; key < work.source_begin[1]; ++key) {
          std::byte* to = gradients.d_key_bias.row(batch, bias_head, problem.kv_begin_of(work.sequence) + key);
          *reinterpret_cast<float*>(to) += sum_of(head, key);
        }
      }
      for (std::size_t s = 0; s < gradients.sources.size(); ++s) {
        const std::span<float> out = gradients.sources[s].d_log_weight;
        const std::int64_t begin = work.source_begin[s + 1];
        const std::int64_t keys = work.source_begin[s + 2] - begin;
        for (std::int64_t key = 0; !out.empty() && key < keys; ++key) {
          const std::int64_t at = (work.sequence * problem.kv_heads + work.kv_head) * keys + key;
          out[static_cast<std::size_t>(at)] += sum_of(head, begin + key);
        }
      }
    }
  }

  const BackwardCall& backward_;
  const Call& call_;
  const LevelKernels& level_;
  const BackwardKernels& kernels_;
  bool key_major_;
  BackwardShape shape_;
  BackwardRule rule_;
  ThreadScratch scratch_;
  std::size_t own_bytes_;
  BorrowedBuffer own_memory_;
  std::vector<BackwardScratch> own_;
  std::int64_t chunk_floats_ = 0;
  BorrowedBuffer chunk_memory_;
  std::vector<float> deltas_;
  std::vector<float> shifts_;
  BackwardRows rows_{};
};

}  // namespace

BackwardShape backward_shape_of(const Problem& problem, DType key_dtype, bool pair_product) {
  BackwardShape shape{};
  shape.keys = tile_shape_of(problem, key_dtype, pair_product);
  shape.keys.value_dim = shape.keys.value_columns = shape.keys.v_panel = 0;
  shape.queries = value_shape(problem.head_dim, pair_product);
  shape.outputs = value_shape(problem.value_dim, pair_product);
  shape.pair_product = pair_product;
  shape.query_words = pair_product ? (problem.head_dim + 1) / 2 : problem.head_dim;
  shape.output_words = pair_product ? (problem.value_dim + 1) / 2 : problem.value_dim;
  shape.query_stride = round_up(shape.query_words, 16);
  shape.output_stride = round_up(shape.output_words, 16);
  shape.row_floats = shape.queries.value_columns + shape.outputs.value_columns;
  return shape;
}

std::size_t backward_scratch_bytes(const BackwardShape& shape) {
  BackwardScratch unused{};
  return carve(shape, nullptr, unused);
}

void place_backward_scratch(const BackwardShape& shape, std::byte* memory, BackwardScratch& scratch) {
  carve(shape, memory, scratch);
  std::fill_n(scratch.spare_rows, (kGroupKeys + 1) * shape.row_floats, 0.0F);
  std::fill_n(scratch.zero_row, zero_row_bytes(shape), std::byte{0});
  std::fill_n(scratch.d_q, kTileRows * shape.queries.value_columns, 0.0F);
}

std::size_t run_cpu_backward(const BackwardCall& backward, const LevelKernels& level, bool key_major) {
  return Backward(backward, level, key_major).run();
}

}  // namespace tessera::kernels
