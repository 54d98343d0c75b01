// Gradients by definition, in float64: every pair of every row adds its share to sums that are rounded once.
#include <cmath>
#include <vector>

#include "kernels/backward.h"
#include "kernels/reference/row.h"

namespace tessera::kernels {

namespace {

/// Sums of one tensor: [batch][heads][tokens][dim].
class Sums {
 public:
  explicit Sums(const std::array<std::int64_t, 4>& shape)
      : shape_(shape), sums_(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]), 0.0) {}
  double* row(std::int64_t b, std::int64_t h, std::int64_t n) {
    return sums_.data() + ((b * shape_[1] + h) * shape_[2] + n) * shape_[3];
  }
  void write(const MutableTensorView& view) {
    if (view.data == nullptr) return;
    for (std::int64_t b = 0; b < shape_[0]; ++b) {
      for (std::int64_t h = 0; h < shape_[1]; ++h) {
        for (std::int64_t n = 0; n < shape_[2]; ++n) {
          for (std::int64_t d = 0; d < shape_[3]; ++d) {
            store_from_float(view.row(b, h, n), view.dtype, d, static_cast<float>(row(b, h, n)[d]));
          }
        }
      }
    }
  }
  void write(std::span<float> out) {
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(sums_[i]);
  }

 private:
  std::array<std::int64_t, 4> shape_;
  std::vector<double> sums_;
};

/// Sums of one key source; log-weights count as a tensor of dim 1.
struct SourceSums {
  Sums k;
  Sums v;
  Sums log_weight;
};

struct AllSums {
  Sums q;
  Sums key_bias;
  Sums sink_logits;
  std::vector<SourceSums> sources;
};

double dot(const std::byte* a, DType a_type, const std::byte* b, DType b_type, std::int64_t count) {
  double sum = 0;
  for (std::int64_t d = 0; d < count; ++d) {
    sum += static_cast<double>(load_as_float(a, a_type, d)) * load_as_float(b, b_type, d);
  }
  return sum;
}

void add_row(const BackwardCall& backward, const ReferenceRow& row, const std::vector<ReferenceSource>& sources,
             AllSums& sums) {
  const Call& call = backward.call;
  const Problem& problem = call.problem();
  const SavedForward& saved = backward.saved;
  const std::int64_t query = query_of(call, row);
  const std::int64_t index = call.lse_index(row.sequence, row.q_head, query);
  const double lse = saved.lse[static_cast<std::size_t>(index)];
  if (std::isinf(lse) && lse < 0) return;  // no keys
  const std::byte* q = call.query_row(call.inputs.q, row.sequence, row.q_head, query);
  const std::byte* o = call.query_row(saved.o, row.sequence, row.q_head, query);
  const std::byte* d_o = call.query_row(saved.d_o, row.sequence, row.q_head, query);
  const double delta = dot(o, saved.o.dtype, d_o, saved.d_o.dtype, problem.value_dim) - backward.d_lse(index);
  const std::int64_t batch = problem.tensor_batch_of(row.sequence);
  const std::int64_t kv_head = row.q_head / problem.group();
  double* d_q = sums.q.row(batch, row.q_head, problem.q_begin_of(row.sequence) + query);
  double d_factor = 0;
  for (const ReferencePair& pair : pairs_of(call, row, sources)) {
    const ReferenceSource& source = sources[pair.source];
    const bool raw = pair.source == 0;
    const std::int64_t b = raw ? batch : row.sequence;
    const std::int64_t key = raw ? problem.kv_begin_of(row.sequence) + pair.key : pair.key;
    const std::byte* k = source.k.row(pair.key);
    const std::byte* v = source.v.row(pair.key);
    double p = std::exp(pair.score - lse);
    double slope = p;
    const double d_p = dot(d_o, saved.d_o.dtype, v, source.v.dtype, problem.value_dim);
    if (call.inputs.modifiers.weights != RowWeights::softmax) {
      const ReferenceWeight weight = weight_of(call, row, pair.score);
      p = weight.weight * std::exp(-lse);
      slope = weight.slope * std::exp(-lse);
      d_factor += weight.by_factor * std::exp(-lse) * (d_p - delta);
    }
    const double d_score = slope * (d_p - delta);
    SourceSums& own = sums.sources[pair.source];
    double* d_v = own.v.row(b, kv_head, key);
    for (std::int64_t d = 0; d < problem.value_dim; ++d) d_v[d] += p * load_as_float(d_o, saved.d_o.dtype, d);
    double* d_k = own.k.row(b, kv_head, key);
    for (std::int64_t d = 0; d < problem.head_dim; ++d) {
      d_q[d] += d_score * pair.slope * load_as_float(k, source.k.dtype, d);
      d_k[d] += d_score * pair.slope * load_as_float(q, call.inputs.q.dtype, d);
    }
    if (!raw) {
      own.log_weight.row(b, kv_head, key)[0] += d_score;
    } else if (backward.gradients.d_key_bias.data != nullptr) {
      const std::int64_t bias_batch = backward.gradients.d_key_bias.shape[0] == 1 ? 0 : row.sequence;
      sums.key_bias.row(bias_batch, bias_head_of(backward, row.q_head), key)[0] += d_score;
    }
  }
  if (!backward.gradients.d_weight_factors.empty()) {
    backward.gradients.d_weight_factors[static_cast<std::size_t>(index)] = static_cast<float>(d_factor);
  }
  if (!call.inputs.modifiers.sink_logits.empty()) {
    const double sink = call.inputs.modifiers.sink_logits[static_cast<std::size_t>(row.q_head)];
    sums.sink_logits.row(0, 0, row.q_head)[0] -= std::exp(sink - lse) * delta;
  }
}

}  // namespace

void run_reference_backward(const BackwardCall& call) {
  const AttentionInputs& inputs = call.call.inputs;
  const Problem& problem = call.problem();
  const Plan& plan = call.call.plan;
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  AllSums sums{Sums({batch, problem.q_heads, problem.q_len, problem.head_dim}),
               Sums(call.gradients.d_key_bias.shape),
               Sums({1, 1, problem.q_heads, 1}),
               {}};
  sums.sources.push_back({Sums({batch, problem.kv_heads, problem.kv_len, problem.head_dim}),
                          Sums({batch, problem.kv_heads, problem.kv_len, problem.value_dim}), Sums({0, 0, 0, 0})});
  for (const KeySource& source : inputs.sources) {
    sums.sources.push_back(
        {Sums(source.k.shape), Sums(source.v.shape), Sums({problem.batch, problem.kv_heads, source.k.tokens(), 1})});
  }
  for (std::int64_t sequence = 0; sequence < problem.batch; ++sequence) {
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      const std::int64_t block = plan.block_of(sequence, head);
      const auto sources = reference_sources(call.call, sequence, head / problem.group());
      for (std::int64_t place = 0; place < plan.queries_of(block); ++place) {
        add_row(call, {sequence, head, block, place}, sources, sums);
      }
    }
  }
  const Gradients& gradients = call.gradients;
  sums.q.write(gradients.d_q);
  sums.key_bias.write(gradients.d_key_bias);
  sums.sink_logits.write(gradients.d_sink_logits);
  sums.sources[0].k.write(gradients.d_k);
  sums.sources[0].v.write(gradients.d_v);
  for (std::size_t i = 0; i < gradients.sources.size(); ++i) {
    sums.sources[i + 1].k.write(gradients.sources[i].d_k);
    sums.sources[i + 1].v.write(gradients.sources[i].d_v);
    sums.sources[i + 1].log_weight.write(gradients.sources[i].d_log_weight);
  }
}

}  // namespace tessera::kernels
