// The backward pass of recurrent methods: through norm and gate of the outputs, the recurrence, and what made its
// inputs.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "methods/recurrent_call.h"
#include "recurrent/operators.h"

namespace tessera {

namespace {

/// Tokens whose shares of a weight's gradient are summed at once; fixed, so that threads do not change the sum.
constexpr std::int64_t kChunk = 64;

void check_backward(const RecurrentLayer& layer, const Problem& problem, const AttentionInputs& inputs,
                    const SavedForward& saved, const Gradients& gradients, const PlanContext& context) {
  const std::array<std::int64_t, 4> o_shape{problem.variable_length() ? 1 : problem.batch, problem.q_heads,
                                            problem.q_len, problem.value_dim};
  require(!inputs.pages.used(), "{}: keys and values lie in pages; the backward pass needs them in one tensor",
          layer.method);
  require(saved.d_o.data != nullptr && is_attention_dtype(saved.d_o.dtype) && saved.d_o.shape == o_shape &&
              saved.d_o.strides[3] == 1,
          "{}: d_o is {} [{}]; expected f32, bf16 or f16 [{}]", layer.method, name_of(saved.d_o.dtype),
          fmt::join(saved.d_o.shape, ", "), fmt::join(o_shape, ", "));
  for (const auto& [name, wanted, of] : {std::tuple{"d_q", &gradients.d_q, &inputs.q},
                                         {"d_k", &gradients.d_k, &inputs.k},
                                         {"d_v", &gradients.d_v, &inputs.v}}) {
    require(wanted->data == nullptr ||
                (is_attention_dtype(wanted->dtype) && wanted->shape == of->shape && wanted->strides[3] == 1),
            "{}: {} is {} [{}]; expected f32, bf16 or f16 [{}]", layer.method, name, name_of(wanted->dtype),
            fmt::join(wanted->shape, ", "), fmt::join(of->shape, ", "));
  }
  const auto* state = dynamic_cast<const RecurrentMethodState*>(context.state);
  if (state == nullptr) return;
  const auto kept = state->layers.find(context.layer);
  if (kept == state->layers.end() || kept->second.states.shape().head_dim == 0) return;
  const std::span<const std::int64_t> seen = kept->second.states.tokens(0);
  for (std::size_t s = 0; s < seen.size() && static_cast<std::int64_t>(s) < problem.batch; ++s) {
    require(seen[s] == 0 || seen[s] == problem.kv_len_of(static_cast<std::int64_t>(s)),
            "{}: the state of sequence {} has seen {} tokens, but the call has {}; expected a call that began with a "
            "fresh state (give an earlier one as side input 'initial_state')",
            layer.method, s, seen[s], problem.kv_len_of(static_cast<std::int64_t>(s)));
  }
}

/// One row of all heads on its way back through gate and norm; everything in [heads * value_dim].
struct OutputRow {
  std::vector<double> x;      ///< output of the recurrence, then normalised
  std::vector<double> slope;  ///< gradient, from that of the layer's output to that of the recurrence's
};

/// From the gradients of normalised numbers those of x, where `x` holds the normalised ones and factor = 1 / rms.
void through_norm(std::span<double> slope, std::span<const double> x, double factor) {
  double along = 0;
  for (std::size_t i = 0; i < x.size(); ++i) along += slope[i] * x[i];
  along /= static_cast<double>(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) slope[i] = factor * (slope[i] - x[i] * along);
}

/// Scales to a mean square of 1 and returns the factor.
double normalise(std::span<double> x, double epsilon) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  const double factor = 1 / std::sqrt(squares / static_cast<double>(x.size()) + epsilon);
  for (double& value : x) value *= factor;
  return factor;
}

/// Through the output gate of one token; writes the gate's gradient, summed over the heads that share it.
void row_through_gate(const RecurrentCall& call, const TensorView& gate, const MutableTensorView& d_gate,
                      std::int64_t batch, std::int64_t token, const std::vector<float>& weights, OutputRow& row) {
  const std::int64_t dim = call.problem.value_dim;
  const std::int64_t group = call.problem.q_heads / gate.heads();
  const bool silu = call.layer.output_gate == GateCurve::silu;
  for (std::int64_t shared = 0; shared < gate.heads(); ++shared) {
    const std::byte* gates = gate.row(batch, shared, token);
    for (std::int64_t d = 0; d < dim; ++d) {
      const double x = load_as_float(gates, gate.dtype, d);
      const double sigmoid = 1 / (1 + std::exp(-x));
      const double slope = sigmoid * (silu ? 1 + x * (1 - sigmoid) : 1 - sigmoid);
      double sum = 0;
      for (std::int64_t h = shared * group; h < (shared + 1) * group; ++h) {
        const auto i = static_cast<std::size_t>(h * dim + d);
        const double y = row.x[i] * (weights.empty() ? 1.0 : static_cast<double>(weights[i % weights.size()]));
        sum += row.slope[i] * y * slope;
        row.slope[i] *= silu ? x * sigmoid : sigmoid;
      }
      if (d_gate.data != nullptr) {
        store_from_float(d_gate.row(batch, shared, token), d_gate.dtype, d, static_cast<float>(sum));
      }
    }
  }
}

/// Gradients of the recurrence's outputs `o` from those of the layer's; writes those of gate and norm weights.
OwnRows unfinished_outputs(RecurrentCall& call, const OwnRows& o, const TensorView& d_o, const Gradients& gradients) {
  const RecurrentLayer& layer = call.layer;
  const std::int64_t heads = call.problem.q_heads;
  const std::int64_t dim = call.problem.value_dim;
  const auto width = static_cast<std::size_t>(heads * dim);
  const bool full = layer.norm == OutputNorm::full;
  const std::size_t per_norm = full ? width : static_cast<std::size_t>(dim);
  const std::vector<float> weights = norm_weights(call);
  const TensorView* gate = call.side.optional_rows("output_gate", dim);
  const MutableTensorView d_gate = call.side.gradient_rows(gradients, "output_gate", dim);
  OwnRows d_raw(o.view.shape);
  std::vector<double> d_weights(weights.size(), 0.0);
  for (std::size_t s = 0; s < call.queries.size(); ++s) {
    const TokenRange& queries = call.queries[s];
    const std::int64_t chunks = (queries.count + kChunk - 1) / kChunk;
    std::vector<std::vector<double>> parts(static_cast<std::size_t>(chunks), std::vector<double>(weights.size(), 0.0));
    const auto row_back = [&](std::int64_t n, OutputRow& row, std::vector<double>& part) {
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::byte* from = d_o.row(queries.batch, h, queries.first + n);
        for (std::int64_t d = 0; d < dim; ++d) {
          const auto i = static_cast<std::size_t>(h * dim + d);
          row.x[i] = load_as_float(o.view.row(queries.batch, h, queries.first + n), DType::f32, d);
          row.slope[i] = load_as_float(from, d_o.dtype, d);
        }
      }
      std::vector<double> factors;
      for (std::size_t i = 0; layer.norm != OutputNorm::none && i < width; i += per_norm) {
        factors.push_back(normalise(std::span(row.x).subspan(i, per_norm), static_cast<double>(layer.norm_epsilon)));
      }
      const std::int64_t token = call.tokens[s].first + call.tokens[s].count - queries.count + n;
      if (gate != nullptr) row_through_gate(call, *gate, d_gate, queries.batch, token, weights, row);
      for (std::size_t i = 0; !weights.empty() && i < width; ++i) {
        part[i % weights.size()] += row.slope[i] * row.x[i];
        row.slope[i] *= static_cast<double>(weights[i % weights.size()]);
      }
      for (std::size_t i = 0; i < factors.size(); ++i) {
        through_norm(std::span(row.slope).subspan(i * per_norm, per_norm),
                     std::span<const double>(row.x).subspan(i * per_norm, per_norm), factors[i]);
      }
      for (std::int64_t h = 0; h < heads; ++h) {
        for (std::int64_t d = 0; d < dim; ++d) {
          store_from_float(d_raw.view.row(queries.batch, h, queries.first + n), DType::f32, d,
                           static_cast<float>(row.slope[static_cast<std::size_t>(h * dim + d)]));
        }
      }
    };
    parallel_for(chunks, call.threads, [&](std::int64_t c, int) {
      OutputRow row{std::vector<double>(width), std::vector<double>(width)};
      for (std::int64_t n = c * kChunk; n < std::min((c + 1) * kChunk, queries.count); ++n) {
        row_back(n, row, parts[static_cast<std::size_t>(c)]);
      }
    });
    for (const std::vector<double>& part : parts) {
      for (std::size_t i = 0; i < part.size(); ++i) d_weights[i] += part[i];
    }
  }
  if (!weights.empty()) write_side_gradient(gradients, "norm_weight", d_weights);
  return d_raw;
}

/// Derivative of x * sigmoid(x).
double silu_slope(double x) {
  const double sigmoid = 1 / (1 + std::exp(-x));
  return sigmoid * (1 + x * (1 - sigmoid));
}

/// Gradients of a stream before SiLU, from those after it.
void through_silu(const TensorView& x, const OwnRows& d_y, const MutableTensorView& d_x, int threads) {
  parallel_for(x.batch() * x.heads(), threads, [&](std::int64_t i, int) {
    const std::int64_t b = i / x.heads();
    const std::int64_t h = i % x.heads();
    for (std::int64_t n = 0; n < x.tokens(); ++n) {
      for (std::int64_t d = 0; d < x.dim(); ++d) {
        const double slope = silu_slope(load_as_float(x.row(b, h, n), x.dtype, d));
        store_from_float(
            d_x.row(b, h, n), d_x.dtype, d,
            static_cast<float>(slope * static_cast<double>(load_as_float(d_y.view.row(b, h, n), DType::f32, d))));
      }
    }
  });
}

/// Gradients of a stream and of its weights [heads][width][dim] before a convolution with SiLU, whose rows before the
/// first are 0.
void through_convolution(const char* name, const TensorView& x, const std::vector<TokenRange>& ranges,
                         const RecurrentCall& call, const OwnRows& d_y, const MutableTensorView& d_x,
                         const Gradients& gradients) {
  std::int64_t width = 0;
  const std::int64_t dim = x.dim();
  const std::vector<float> weights = call.side.convolution(name, x.heads(), dim, width);
  std::vector<double> d_weights(weights.size(), 0.0);
  parallel_for(x.heads(), call.threads, [&](std::int64_t h, int) {
    const float* w = weights.data() + h * width * dim;
    double* d_w = d_weights.data() + h * width * dim;
    for (const TokenRange& range : ranges) {
      std::vector<float> rows(static_cast<std::size_t>(range.count * dim));
      std::vector<double> d_sum(rows.size());  // gradients of what goes into SiLU
      for (std::int64_t t = 0; t < range.count; ++t) {
        to_float(x.row(range.batch, h, range.first + t), x.dtype, dim, rows.data() + t * dim);
        const std::byte* slopes = d_y.view.row(range.batch, h, range.first + t);
        for (std::int64_t c = 0; c < dim; ++c) {
          double sum = 0;
          for (std::int64_t m = std::max<std::int64_t>(0, width - 1 - t); m < width; ++m) {
            sum += static_cast<double>(w[m * dim + c]) * rows[static_cast<std::size_t>((t - width + 1 + m) * dim + c)];
          }
          const double slope = silu_slope(sum) * static_cast<double>(load_as_float(slopes, DType::f32, c));
          d_sum[static_cast<std::size_t>(t * dim + c)] = slope;
          for (std::int64_t m = std::max<std::int64_t>(0, width - 1 - t); m < width; ++m) {
            d_w[m * dim + c] +=
                slope * static_cast<double>(rows[static_cast<std::size_t>((t - width + 1 + m) * dim + c)]);
          }
        }
      }
      for (std::int64_t t = 0; d_x.data != nullptr && t < range.count; ++t) {
        for (std::int64_t c = 0; c < dim; ++c) {
          double sum = 0;
          for (std::int64_t m = 0; m < width; ++m) {
            const std::int64_t later = t + width - 1 - m;
            if (later < range.count) {
              sum += static_cast<double>(w[m * dim + c]) * d_sum[static_cast<std::size_t>(later * dim + c)];
            }
          }
          store_from_float(d_x.row(range.batch, h, range.first + t), d_x.dtype, c, static_cast<float>(sum));
        }
      }
    }
  });
  write_side_gradient(gradients, name, d_weights);
}

/// A stream of the recurrence on the way back: its gradient goes straight to the caller's tensor, or waits in floats
/// for the step that made the stream.
class StreamGradient {
 public:
  StreamGradient(const RecurrentCall& call, const char* name, const TensorView& raw, const MutableTensorView& wanted,
                 const Gradients& gradients)
      : call_(call), name_(name), raw_(raw), wanted_(wanted) {
    const bool needed = wanted.data != nullptr || wants_side_gradient(gradients, name);
    if (needed && (call.convolves(name) || call.activates(name))) own_.emplace_back(raw.shape);
  }
  MutableTensorView target() const { return own_.empty() ? wanted_ : own_.front().view; }
  void finish(const std::vector<TokenRange>& ranges, const Gradients& gradients) const {
    if (own_.empty()) return;
    if (call_.convolves(name_)) {
      through_convolution(name_, raw_, ranges, call_, own_.front(), wanted_, gradients);
    } else {
      through_silu(raw_, own_.front(), wanted_, call_.threads);
    }
  }

 private:
  const RecurrentCall& call_;
  const char* name_;
  const TensorView& raw_;
  MutableTensorView wanted_;
  std::vector<OwnRows> own_;  // at most one
};

}  // namespace

RunReport backward_recurrent(const RecurrentLayer& layer, const Problem& problem, const AttentionInputs& inputs,
                             const SavedForward& saved, const Gradients& gradients, const PlanContext& context,
                             const GateRule& rule) {
  const auto start = std::chrono::steady_clock::now();
  check_backward(layer, problem, inputs, saved, gradients, context);
  RecurrentCall call(layer, problem, inputs, context, rule, nullptr);
  clear_side_gradients(layer.method, inputs, gradients);
  const std::vector<float> initial = call.initial_states();

  TensorView d_o = saved.d_o;
  std::vector<OwnRows> d_raw;
  if (call.finishes()) {
    const OwnRows o(saved.d_o.shape);
    std::vector<float> states = initial;
    run_recurrent(call.recurrent, call.given, states, o.view, call.options);
    d_raw.push_back(unfinished_outputs(call, o, saved.d_o, gradients));
    d_o = d_raw.front().view;
  }

  const StreamGradient q(call, "conv_q", inputs.q, gradients.d_q, gradients);
  const StreamGradient k(call, "conv_k", inputs.k, gradients.d_k, gradients);
  const StreamGradient v(call, "conv_v", inputs.v, gradients.d_v, gradients);
  RecurrentGradients wanted;
  wanted.q = q.target();
  wanted.k = k.target();
  wanted.v = v.target();
  std::vector<OwnRows> gates;
  gates.reserve(2);
  GateGradients gate_gradients;
  const bool decays = std::any_of(rule.decay_sides.begin(), rule.decay_sides.end(),
                                  [&](std::string_view name) { return wants_side_gradient(gradients, name); });
  if (decays && call.given.decay.data != nullptr) {
    gate_gradients.decay = wanted.decay = gates.emplace_back(call.given.decay.shape).view;
  }
  if (wants_side_gradient(gradients, "beta") && call.given.beta.data != nullptr) {
    gate_gradients.beta = wanted.beta = gates.emplace_back(call.given.beta.shape).view;
  }
  std::vector<float> d_initial(wants_side_gradient(gradients, "initial_state") ? initial.size() : 0);
  wanted.initial_state = d_initial;
  run_recurrent_backward(call.recurrent, call.given, initial, d_o, {}, wanted, call.options);

  q.finish(call.queries, gradients);
  k.finish(call.tokens, gradients);
  v.finish(call.tokens, gradients);
  if (rule.backward) rule.backward(call.side, gate_gradients, gradients);
  if (!d_initial.empty()) write_side_gradient(gradients, "initial_state", {d_initial.begin(), d_initial.end()});

  RunReport report;
  report.kernel = context.run.kernel == KernelKind::reference ? KernelKind::reference : KernelKind::automatic;
  report.isa = call.options.isa.value_or(default_isa());
  report.threads = thread_count(call.threads);
  // A convention: every product has two gradients and counts once more as computed again, though q S and A VN, of which
  // only the outputs are made, are not.
  report.flops = 3 * recurrent_flops(call.recurrent, call.given.beta.data != nullptr, call.options.chunk);
  report.kernel_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace tessera
