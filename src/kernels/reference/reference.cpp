// Attention by definition, in float64: every score of a row, a softmax over them, a weighted sum of the values.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <vector>

#include "core/parallel.h"
#include "kernels/kernels.h"
#include "kernels/reference/row.h"

namespace tessera::kernels {

namespace {

struct RowJob {
  std::int64_t sequence;
  std::int64_t q_head;
  std::int64_t block;
  std::int64_t tile;  // query tile within the block
};

bool allowed(const Plan& plan, const PlanEntry& entry, std::int64_t row_in_tile, std::int64_t key_in_entry,
             std::int64_t query_position, std::int64_t key_position, std::int64_t entry_keys) {
  if (entry.mask == EntryMask::none) return true;
  if (entry.mask == EntryMask::band) {
    const Window& band = plan.bands[static_cast<std::size_t>(entry.mask_index)];
    return (band.left < 0 || key_position >= query_position - band.left) &&
           (band.right < 0 || key_position <= query_position + band.right);
  }
  const std::int64_t words = (entry_keys + 63) / 64;
  const std::int64_t word = entry.mask_index + row_in_tile * words + key_in_entry / 64;
  return (plan.mask_words[static_cast<std::size_t>(word)] >> (key_in_entry % 64) & 1U) != 0;
}

ReferencePair pair_of(const Call& call, const ReferenceRow& row, const ReferenceSource& source,
                      std::uint16_t source_index, const std::byte* q, std::int64_t key, std::int64_t query_position) {
  const Problem& problem = call.problem();
  const Modifiers& modifiers = call.inputs.modifiers;
  const std::byte* k = source.k.row(key);
  double dot = 0;
  for (std::int64_t d = 0; d < problem.head_dim; ++d) {
    dot += static_cast<double>(load_as_float(q, call.inputs.q.dtype, d)) * load_as_float(k, source.k.dtype, d);
  }
  ReferencePair pair{source_index, key, dot * static_cast<double>(problem.softmax_scale()),
                     static_cast<double>(problem.softmax_scale())};
  if (!modifiers.query_scale.empty()) {
    const std::int64_t query = query_position - problem.q_offset_of(row.sequence);
    const double own = modifiers.query_scale[static_cast<std::size_t>(problem.q_begin_of(row.sequence) + query)];
    pair.score *= own;
    pair.slope *= own;
  }
  if (modifiers.softcap != 0) {
    const double bent = std::tanh(pair.score / modifiers.softcap);
    pair.score = modifiers.softcap * bent;
    pair.slope *= 1 - bent * bent;
  }
  if (source_index == 0) {
    if (!modifiers.alibi_slopes.empty()) {
      const double slope = modifiers.alibi_slopes[static_cast<std::size_t>(row.q_head)];
      pair.score += slope * static_cast<double>(key - query_position);
    }
    pair.score += call.key_bias(row.sequence, row.q_head, key);
  }
  if (source.log_weight != nullptr) pair.score += source.log_weight[key];
  return pair;
}

/// body(pair) for all pairs of the row.
template <class Body>
void for_each_pair(const Call& call, const ReferenceRow& row, const std::vector<ReferenceSource>& sources,
                   const Body& body) {
  const Plan& plan = call.plan;
  const Problem& problem = call.problem();
  const auto block = static_cast<std::size_t>(row.block);
  const auto* k_order = plan.key_order.empty() || plan.key_order[block].empty() ? nullptr : &plan.key_order[block];
  const std::int64_t query = query_of(call, row);
  const std::int64_t query_position = problem.q_offset_of(row.sequence) + query;
  const std::byte* q = call.query_row(call.inputs.q, row.sequence, row.q_head, query);
  for (const PlanEntry& entry : plan.row(plan.row_begin[block] + row.place / plan.tile_q)) {
    const Plan::KeyRange range = plan.keys_of(entry, row.block);
    for (std::int64_t i = 0; i < range.count; ++i) {
      const std::int64_t key_place =
          entry.kind == EntryKind::gather ? plan.tokens[static_cast<std::size_t>(range.begin + i)] : range.begin + i;
      const std::int64_t key =
          k_order && entry.source == 0 ? (*k_order)[static_cast<std::size_t>(key_place)] : key_place;
      if (!allowed(plan, entry, row.place % plan.tile_q, i, query_position, key, range.count)) continue;
      if (row.skipped != nullptr && (*row.skipped)[static_cast<std::size_t>(key / plan.tile_k)] != 0) continue;
      body(pair_of(call, row, sources[entry.source], entry.source, q, key, query_position));
    }
  }
}

}  // namespace

std::vector<ReferenceSource> reference_sources(const Call& call, std::int64_t sequence, std::int64_t kv_head) {
  const Problem& problem = call.problem();
  std::vector<ReferenceSource> sources;
  sources.push_back({key_rows_of(problem, call.inputs.k, call.inputs.pages, sequence, kv_head),
                     key_rows_of(problem, call.inputs.v, call.inputs.pages, sequence, kv_head), nullptr});
  for (const KeySource& source : call.inputs.sources) {
    const float* weights = source.log_weight.empty()
                               ? nullptr
                               : source.log_weight.data() + (sequence * problem.kv_heads + kv_head) * source.k.tokens();
    sources.push_back({key_rows_of(source.k, sequence, kv_head), key_rows_of(source.v, sequence, kv_head), weights});
  }
  return sources;
}

std::int64_t query_of(const Call& call, const ReferenceRow& row) {
  const auto& orders = call.plan.query_order;
  const auto block = static_cast<std::size_t>(row.block);
  if (orders.empty() || orders[block].empty()) return row.place;
  return orders[block][static_cast<std::size_t>(row.place)];
}

std::vector<ReferencePair> pairs_of(const Call& call, const ReferenceRow& row,
                                    const std::vector<ReferenceSource>& sources) {
  std::vector<ReferencePair> pairs;
  for_each_pair(call, row, sources, [&](const ReferencePair& pair) { pairs.push_back(pair); });
  return pairs;
}

ReferenceWeight weight_of(const Call& call, const ReferenceRow& row, double score) {
  const Modifiers& modifiers = call.inputs.modifiers;
  const double own = std::max(score, 0.0) + std::log1p(std::exp(-std::fabs(score)));
  const double slope = 1 / (1 + std::exp(-score));
  if (modifiers.weights == RowWeights::softplus) return {own, slope, 0};
  const auto index = static_cast<std::size_t>(call.lse_index(row.sequence, row.q_head, query_of(call, row)));
  const double factor = modifiers.weight_factors[index];
  const double base = factor * own - modifiers.weight_offset;
  if (base <= 0) return {0, 0, 0};
  const double by_base = modifiers.weight_power * std::pow(base, modifiers.weight_power - 1);
  return {std::pow(base, modifiers.weight_power), by_base * factor * slope, by_base * own};
}

ReferenceOutput attend_row(const Call& call, const ReferenceRow& row, const std::vector<ReferenceSource>& sources) {
  SoftmaxState<double> state;
  std::vector<double> output(static_cast<std::size_t>(call.problem().value_dim), 0.0);
  const MutableTensorView& scores = call.outputs.scores;
  float* dumped = nullptr;
  if (scores.data != nullptr) {
    dumped = reinterpret_cast<float*>(scores.row(row.sequence, row.q_head, query_of(call, row)));
  }
  for_each_pair(call, row, sources, [&](const ReferencePair& pair) {
    if (dumped != nullptr && pair.source == 0) dumped[pair.key] = static_cast<float>(pair.score);
    double weight = 0;
    double factor = 1;
    if (call.inputs.modifiers.weights == RowWeights::softmax) {
      factor = state.add(pair.score, weight);
    } else {
      weight = weight_of(call, row, pair.score).weight;
      state.maximum = 0;
      state.sum += weight;
    }
    const KeyRows& values = sources[pair.source].v;
    const std::byte* v = values.row(pair.key);
    for (std::size_t d = 0; d < output.size(); ++d) {
      output[d] = output[d] * factor + weight * load_as_float(v, values.dtype, static_cast<std::int64_t>(d));
    }
  });
  const double maximum = state.maximum;
  if (!call.inputs.modifiers.sink_logits.empty() && state.sum != 0) {
    double weight = 0;
    const double factor = state.add(call.inputs.modifiers.sink_logits[static_cast<std::size_t>(row.q_head)], weight);
    for (double& x : output) x *= factor;
  }
  for (double& x : output) x = state.sum == 0 ? 0.0 : x / state.sum;
  return {std::move(output), state.log_sum_exp(), maximum};
}

namespace {

/// Key tiles that the online skip leaves out for query places [first, end), entry by entry; adds to `skipped_pairs`.
std::vector<std::uint8_t> skipped_tiles(const Call& call, const ReferenceRow& like, std::int64_t first,
                                        std::int64_t end, const std::vector<ReferenceSource>& sources,
                                        std::int64_t& skipped_pairs) {
  const Plan& plan = call.plan;
  const Problem& problem = call.problem();
  const std::int64_t keys = problem.kv_len_of(like.sequence);
  const double distance = call.online_skip.distance / std::numbers::log2e;
  std::vector<std::uint8_t> skipped(static_cast<std::size_t>((keys + plan.tile_k - 1) / plan.tile_k), 0);
  std::vector<double> peak(static_cast<std::size_t>(end - first), -std::numeric_limits<double>::infinity());
  for (const PlanEntry& entry : plan.row(plan.row_begin[static_cast<std::size_t>(like.block)] + first / plan.tile_q)) {
    for (std::int64_t tile = entry.begin; tile < entry.begin + entry.count; ++tile) {
      const std::int64_t tile_end = std::min((tile + 1) * plan.tile_k, keys);
      bool skip = entry.mask == EntryMask::none && tile_end < keys;
      std::vector<double> own = peak;
      for (std::int64_t place = first; place < end; ++place) {
        const ReferenceRow row{like.sequence, like.q_head, like.block, place};
        const std::int64_t query = query_of(call, row);
        const std::byte* q = call.query_row(call.inputs.q, like.sequence, like.q_head, query);
        const std::int64_t position = problem.q_offset_of(like.sequence) + query;
        const auto r = static_cast<std::size_t>(place - first);
        for (std::int64_t key = tile * plan.tile_k; key < tile_end; ++key) {
          if (!allowed(plan, entry, place % plan.tile_q, key - entry.begin * plan.tile_k, position, key, 0)) continue;
          const double score = pair_of(call, row, sources[0], 0, q, key, position).score;
          if (score > own[r]) own[r] = score;
          // Written so that NaN and a row without keys before this tile keep it.
          if (!(score - peak[r] <= -distance) && score != -std::numeric_limits<double>::infinity()) skip = false;
        }
      }
      if (skip) {
        skipped[static_cast<std::size_t>(tile)] = 1;
        skipped_pairs += (end - first) * (tile_end - tile * plan.tile_k);
      } else {
        peak = own;
      }
    }
  }
  return skipped;
}

/// Raises the largest probabilities of the row's query tile.
void note_tile_maxima(const Call& call, const ReferenceRow& row, const std::vector<ReferenceSource>& sources,
                      double lse) {
  const std::int64_t tile = row.place / call.plan.tile_q;
  auto* out = reinterpret_cast<float*>(call.outputs.tile_maximum.row(row.sequence, row.q_head, tile));
  for_each_pair(call, row, sources, [&](const ReferencePair& pair) {
    if (pair.source != 0) return;
    const auto p = static_cast<float>(std::exp(pair.score - lse));
    float& best = out[pair.key / call.plan.tile_k];
    if (!(p <= best)) best = std::isnan(best) ? best : p;
  });
}

}  // namespace

std::int64_t run_reference(const Call& call) {
  const Plan& plan = call.plan;
  const Problem& problem = call.problem();
  struct TileOfRows {
    std::int64_t sequence;
    std::int64_t q_head;
    std::int64_t block;
    std::int64_t tile;  // query tile within the block
  };
  std::vector<TileOfRows> jobs;
  for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const std::int64_t block = plan.block_of(sequence, head);
      const std::int64_t tiles = (plan.queries_of(block) + plan.tile_q - 1) / plan.tile_q;
      for (std::int64_t tile = tiles; tile-- > 0;) jobs.push_back({sequence, head, block, tile});
    }
  }
  std::vector<std::int64_t> skipped_pairs(jobs.size(), 0);
  parallel_for(static_cast<std::int64_t>(jobs.size()), call.threads, [&](std::int64_t i, int) {
    const TileOfRows& job = jobs[static_cast<std::size_t>(i)];
    const auto sources = reference_sources(call, job.sequence, job.q_head / problem.group());
    const std::int64_t first = job.tile * plan.tile_q;
    const std::int64_t end = std::min(first + plan.tile_q, plan.queries_of(job.block));
    const bool tile_maxima = call.outputs.tile_maximum.data != nullptr;
    if (tile_maxima) {
      auto* out = reinterpret_cast<float*>(call.outputs.tile_maximum.row(job.sequence, job.q_head, job.tile));
      std::fill_n(out, call.outputs.tile_maximum.shape[3], 0.0F);
    }
    std::vector<std::uint8_t> skipped;
    for (std::int64_t place = first; place < end; ++place) {
      ReferenceRow row{job.sequence, job.q_head, job.block, place};
      if (call.online_skip.used()) {
        if ((place - first) % call.online_skip.rows == 0) {
          skipped = skipped_tiles(call, row, place, std::min(place + call.online_skip.rows, end), sources,
                                  skipped_pairs[static_cast<std::size_t>(i)]);
        }
        row.skipped = &skipped;
      }
      const ReferenceOutput result = attend_row(call, row, sources);
      const std::int64_t query = query_of(call, row);
      std::byte* o = call.query_row(call.outputs.o, job.sequence, job.q_head, query);
      for (std::size_t d = 0; d < result.output.size(); ++d) {
        store_from_float(o, call.outputs.o.dtype, static_cast<std::int64_t>(d), static_cast<float>(result.output[d]));
      }
      if (!call.outputs.lse.empty()) {
        call.outputs.lse[static_cast<std::size_t>(call.lse_index(job.sequence, job.q_head, query))] =
            static_cast<float>(result.lse);
      }
      if (!call.outputs.row_maximum.empty()) {
        call.outputs.row_maximum[static_cast<std::size_t>(call.lse_index(job.sequence, job.q_head, query))] =
            static_cast<float>(result.maximum);
      }
      if (tile_maxima) note_tile_maxima(call, row, sources, result.lse);
    }
  });
  return std::accumulate(skipped_pairs.begin(), skipped_pairs.end(), std::int64_t{0});
}

}  // namespace tessera::kernels
