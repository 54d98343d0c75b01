// Attention by definition, in float64: every score of a row, a softmax over them, a weighted sum of the values.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "kernels/kernels.h"
#include "kernels/key_rows.h"
#include "kernels/softmax_state.h"

namespace tessera::kernels {

namespace {

/// Keys and values of one source for one (sequence, kv head).
struct Source {
  KeyRows k;
  KeyRows v;
  const float* log_weight = nullptr;  // [keys]
};

struct RowJob {
  std::int64_t sequence;
  std::int64_t q_head;
  std::int64_t block;
  std::int64_t tile;  // query tile within the block
};

std::vector<Source> sources_of(const Call& call, std::int64_t sequence, std::int64_t kv_head) {
  const Problem& problem = call.problem();
  std::vector<Source> sources;
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

double score_of(const Call& call, const RowJob& job, const Source& source, std::uint16_t source_index,
                const std::byte* q, std::int64_t key, std::int64_t key_position, std::int64_t query_position) {
  const Problem& problem = call.problem();
  const Modifiers& modifiers = call.inputs.modifiers;
  const std::byte* k = source.k.row(key);
  double dot = 0;
  for (std::int64_t d = 0; d < problem.head_dim; ++d) {
    dot += static_cast<double>(load_as_float(q, call.inputs.q.dtype, d)) * load_as_float(k, source.k.dtype, d);
  }
  double score = dot * static_cast<double>(problem.softmax_scale());
  if (!modifiers.query_scale.empty()) {
    const std::int64_t query = query_position - problem.q_offset_of(job.sequence);
    score *= modifiers.query_scale[static_cast<std::size_t>(problem.q_begin_of(job.sequence) + query)];
  }
  if (modifiers.softcap != 0) score = modifiers.softcap * std::tanh(score / modifiers.softcap);
  if (source_index == 0) {
    if (!modifiers.alibi_slopes.empty()) {
      const double slope = modifiers.alibi_slopes[static_cast<std::size_t>(job.q_head)];
      score += slope * static_cast<double>(key_position - query_position);
    }
    score += call.key_bias(job.sequence, job.q_head, key_position);
  }
  if (source.log_weight != nullptr) score += source.log_weight[key];
  return score;
}

/// Weight of a score where rows are no softmax.
double weight_of(const Call& call, const RowJob& job, std::int64_t query, double score) {
  const Modifiers& modifiers = call.inputs.modifiers;
  const double own = std::max(score, 0.0) + std::log1p(std::exp(-std::fabs(score)));
  if (modifiers.weights == RowWeights::softplus) return own;
  const auto row = static_cast<std::size_t>(call.lse_index(job.sequence, job.q_head, query));
  return std::pow(std::max(0.0, modifiers.weight_factors[row] * own - modifiers.weight_offset), modifiers.weight_power);
}

/// One query row: `place` is its index among the block's queries.
void attend_row(const Call& call, const RowJob& job, const std::vector<Source>& sources, std::int64_t place) {
  const Plan& plan = call.plan;
  const Problem& problem = call.problem();
  const auto block = static_cast<std::size_t>(job.block);
  const auto* q_order =
      plan.query_order.empty() || plan.query_order[block].empty() ? nullptr : &plan.query_order[block];
  const auto* k_order = plan.key_order.empty() || plan.key_order[block].empty() ? nullptr : &plan.key_order[block];
  const std::int64_t query = q_order ? (*q_order)[static_cast<std::size_t>(place)] : place;
  const std::int64_t query_position = problem.q_offset_of(job.sequence) + query;
  const std::byte* q = call.query_row(call.inputs.q, job.sequence, job.q_head, query);
  const std::int64_t row_in_tile = place % plan.tile_q;

  float* dumped = nullptr;
  if (call.outputs.scores.data != nullptr) {
    dumped = reinterpret_cast<float*>(call.outputs.scores.row(job.sequence, job.q_head, query));
  }
  SoftmaxState<double> state;
  std::vector<double> output(static_cast<std::size_t>(problem.value_dim), 0.0);
  for (const PlanEntry& entry : plan.row(plan.row_begin[block] + job.tile)) {
    const Plan::KeyRange range = plan.keys_of(entry, job.block);
    const Source& source = sources[entry.source];
    for (std::int64_t i = 0; i < range.count; ++i) {
      const std::int64_t key_place =
          entry.kind == EntryKind::gather ? plan.tokens[static_cast<std::size_t>(range.begin + i)] : range.begin + i;
      const std::int64_t key =
          k_order && entry.source == 0 ? (*k_order)[static_cast<std::size_t>(key_place)] : key_place;
      if (!allowed(plan, entry, row_in_tile, i, query_position, key, range.count)) continue;
      double weight = 0;
      const double score = score_of(call, job, source, entry.source, q, key, key, query_position);
      if (dumped != nullptr && entry.source == 0) dumped[key] = static_cast<float>(score);
      double factor = 1;
      if (call.inputs.modifiers.weights == RowWeights::softmax) {
        factor = state.add(score, weight);
      } else {
        weight = weight_of(call, job, query, score);
        state.maximum = 0;
        state.sum += weight;
      }
      const std::byte* v = source.v.row(key);
      for (std::size_t d = 0; d < output.size(); ++d) {
        output[d] = output[d] * factor + weight * load_as_float(v, source.v.dtype, static_cast<std::int64_t>(d));
      }
    }
  }
  if (!call.inputs.modifiers.sink_logits.empty() && state.sum != 0) {
    double weight = 0;
    const double factor = state.add(call.inputs.modifiers.sink_logits[static_cast<std::size_t>(job.q_head)], weight);
    for (double& x : output) x *= factor;
  }
  std::byte* o = call.query_row(call.outputs.o, job.sequence, job.q_head, query);
  for (std::size_t d = 0; d < output.size(); ++d) {
    const double value = state.sum == 0 ? 0.0 : output[d] / state.sum;
    store_from_float(o, call.outputs.o.dtype, static_cast<std::int64_t>(d), static_cast<float>(value));
  }
  if (!call.outputs.lse.empty()) {
    call.outputs.lse[static_cast<std::size_t>(call.lse_index(job.sequence, job.q_head, query))] =
        static_cast<float>(state.log_sum_exp());
  }
}

}  // namespace

void run_reference(const Call& call) {
  const Plan& plan = call.plan;
  const Problem& problem = call.problem();
  std::vector<RowJob> jobs;
  for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const std::int64_t block = plan.block_of(sequence, head);
      const std::int64_t tiles = (plan.queries_of(block) + plan.tile_q - 1) / plan.tile_q;
      for (std::int64_t tile = tiles; tile-- > 0;) jobs.push_back({sequence, head, block, tile});
    }
  }
  parallel_for(static_cast<std::int64_t>(jobs.size()), call.threads, [&](std::int64_t i, int) {
    const RowJob& job = jobs[static_cast<std::size_t>(i)];
    const std::vector<Source> sources = sources_of(call, job.sequence, job.q_head / problem.group());
    const std::int64_t end = std::min((job.tile + 1) * plan.tile_q, plan.queries_of(job.block));
    for (std::int64_t place = job.tile * plan.tile_q; place < end; ++place) attend_row(call, job, sources, place);
  });
}

}  // namespace tessera::kernels
