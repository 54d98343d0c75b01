#include "methods/recurrent_attention.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/recurrent_call.h"
#include "recurrent/operators.h"

namespace tessera {

void make_betas(SideReader& side, BetaGate gate, RecurrentGates& gates) {
  gates.beta = side.rows("beta", 1);
  if (gate == BetaGate::none) return;
  const TensorView raw = gates.beta;
  for (std::int64_t b = 0; b < raw.batch(); ++b) {
    for (std::int64_t h = 0; h < raw.heads(); ++h) {
      for (std::int64_t n = 0; n < raw.tokens(); ++n) {
        const float beta = recurrent::sigmoid(load_as_float(raw.row(b, h, n), raw.dtype, 0));
        gates.beta_values.push_back(gate == BetaGate::twice_sigmoid ? 2 * beta : beta);
      }
    }
  }
  gates.beta = view_of(gates.beta_values.data(), DType::f32, raw.shape);
}

void make_decays(SideReader& side, std::int64_t q_heads, std::int64_t width, int threads, const DecayCurve& curve,
                 RecurrentGates& gates) {
  const TensorView& raw = side.rows("g", width);
  const std::vector<float> a_log = side.per_head("A_log", 1, 0);
  const std::vector<float> bias = side.per_head("dt_bias", width, 0);
  const std::array<std::int64_t, 4> shape{raw.batch(), q_heads, raw.tokens(), width};
  gates.decay_values.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
  const MutableTensorView out = mutable_view_of(gates.decay_values.data(), DType::f32, shape);
  parallel_for(shape[0] * q_heads, threads, [&](std::int64_t i, int) {
    const std::int64_t h = i % q_heads;
    for (std::int64_t n = 0; n < shape[2]; ++n) {
      const std::byte* row = raw.row(i / q_heads, h * raw.heads() / q_heads, n);
      for (std::int64_t d = 0; d < width; ++d) {
        const float g = curve.value(load_as_float(row, raw.dtype, d), bias[static_cast<std::size_t>(h * width + d)],
                                    a_log[static_cast<std::size_t>(h)]);
        store_from_float(out.row(i / q_heads, h, n), DType::f32, d, g);
      }
    }
  });
  gates.decay = out;
}

void backward_betas(SideReader& side, BetaGate gate, const TensorView& d_beta, const Gradients& gradients) {
  const MutableTensorView target = side.gradient_rows(gradients, "beta", 1);
  if (target.data == nullptr) return;
  const TensorView& raw = side.rows("beta", 1);
  for (std::int64_t b = 0; b < raw.batch(); ++b) {
    for (std::int64_t h = 0; h < raw.heads(); ++h) {
      for (std::int64_t n = 0; n < raw.tokens(); ++n) {
        float slope = 1;
        if (gate != BetaGate::none) {
          const float beta = recurrent::sigmoid(load_as_float(raw.row(b, h, n), raw.dtype, 0));
          slope = (gate == BetaGate::twice_sigmoid ? 2 : 1) * beta * (1 - beta);
        }
        store_from_float(target.row(b, h, n), target.dtype, 0,
                         slope * load_as_float(d_beta.row(b, h, n), DType::f32, 0));
      }
    }
  }
}

void backward_decays(SideReader& side, std::int64_t q_heads, std::int64_t width, int threads, const DecayCurve& curve,
                     const TensorView& d_decay, const Gradients& gradients) {
  const TensorView& raw = side.rows("g", width);
  const std::vector<float> a_log = side.per_head("A_log", 1, 0);
  const std::vector<float> bias = side.per_head("dt_bias", width, 0);
  const MutableTensorView d_raw = side.gradient_rows(gradients, "g", width);
  std::vector<double> d_a_log(static_cast<std::size_t>(q_heads), 0.0);
  std::vector<double> d_bias(static_cast<std::size_t>(q_heads * width), 0.0);
  const std::int64_t group = q_heads / raw.heads();
  // A head of `g` at a time: its query heads add to the same numbers.
  parallel_for(raw.heads(), threads, [&](std::int64_t shared, int) {
    std::vector<float> row(static_cast<std::size_t>(width));
    for (std::int64_t b = 0; b < raw.batch(); ++b) {
      for (std::int64_t n = 0; n < raw.tokens(); ++n) {
        std::fill(row.begin(), row.end(), 0.0F);
        for (std::int64_t h = shared * group; h < (shared + 1) * group; ++h) {
          for (std::int64_t d = 0; d < width; ++d) {
            const auto at = static_cast<std::size_t>(h * width + d);
            const DecayCurve::Slopes slopes = curve.slopes(load_as_float(raw.row(b, shared, n), raw.dtype, d), bias[at],
                                                           a_log[static_cast<std::size_t>(h)]);
            const double by_decay = load_as_float(d_decay.row(b, h, n), DType::f32, d);
            d_a_log[static_cast<std::size_t>(h)] += by_decay * slopes.by_a_log;
            d_bias[at] += by_decay * slopes.by_raw;
            row[static_cast<std::size_t>(d)] += static_cast<float>(by_decay * slopes.by_raw);
          }
        }
        if (d_raw.data == nullptr) continue;
        for (std::int64_t d = 0; d < width; ++d) {
          store_from_float(d_raw.row(b, shared, n), d_raw.dtype, d, row[static_cast<std::size_t>(d)]);
        }
      }
    }
  });
  write_side_gradient(gradients, "A_log", d_a_log);
  write_side_gradient(gradients, "dt_bias", d_bias);
}

DecayCurve softplus_curve() {
  return {.value = recurrent::softplus_decay, .slopes = [](double a, double bias, double a_log) {
            const double x = a + bias;
            const double rate = -std::exp(a_log);
            return DecayCurve::Slopes{rate / (1 + std::exp(-x)),
                                      rate * (std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))))};
          }};
}

DecayCurve bounded_curve(double lower_bound) {
  return {.value = [bound = static_cast<float>(lower_bound)](
                       float a, float bias, float a_log) { return recurrent::bounded_decay(a, bias, a_log, bound); },
          .slopes =
              [lower_bound](double a, double bias, double a_log) {
                const double rate = std::exp(a_log);
                const double s = 1 / (1 + std::exp(-rate * (a + bias)));
                const double by_argument = lower_bound * s * (1 - s);
                return DecayCurve::Slopes{by_argument * rate, by_argument * rate * (a + bias)};
              }};
}

RunReport attend_recurrent(const RecurrentLayer& layer, const Problem& problem, const AttentionInputs& inputs,
                           const AttentionOutputs& outputs, const PlanContext& context, const GateRule& rule) {
  const auto start = std::chrono::steady_clock::now();
  const std::array<std::int64_t, 4> o_shape{problem.variable_length() ? 1 : problem.batch, problem.q_heads,
                                            problem.q_len, problem.value_dim};
  require(outputs.o.shape == o_shape, "o has shape [{}]; expected [{}]", fmt::join(outputs.o.shape, ", "),
          fmt::join(o_shape, ", "));
  require(outputs.lse.empty() || static_cast<std::int64_t>(outputs.lse.size()) == o_shape[0] * o_shape[1] * o_shape[2],
          "lse has {} elements; expected 0 or {}", outputs.lse.size(), o_shape[0] * o_shape[1] * o_shape[2]);
  RecurrentMethodState::Layer* kept = layer_state(layer.method, problem, context);
  RecurrentCall call(layer, problem, inputs, context, rule, kept);
  std::vector<float> initial = call.initial_states();
  std::span<float> states = initial;
  if (kept != nullptr) {
    states = kept->states.layer(0);
    std::copy(initial.begin(), initial.end(), states.begin());
  }
  if (call.finishes()) {
    const OwnRows o(o_shape);
    run_recurrent(call.recurrent, call.given, states, o.view, call.options);
    finish_outputs(call, o, outputs.o);
  } else {
    run_recurrent(call.recurrent, call.given, states, outputs.o, call.options);
  }
  if (kept != nullptr) {
    for (std::size_t s = 0; s < call.tokens.size(); ++s) kept->states.tokens(0)[s] += call.tokens[s].count;
  }
  std::fill(outputs.lse.begin(), outputs.lse.end(), 0.0F);

  RunReport report;
  report.kernel = context.run.kernel == KernelKind::reference ? KernelKind::reference : KernelKind::automatic;
  report.isa = call.options.isa.value_or(default_isa());
  report.threads = thread_count(call.threads);
  report.flops = recurrent_flops(call.recurrent, call.given.beta.data != nullptr, call.options.chunk);
  report.kernel_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return report;
}

std::vector<SideInputInfo> convolution_side_inputs() {
  using enum SideAxis;
  std::vector<SideInputInfo> side;
  for (const auto& [name, of, heads, dim] : {std::tuple{"conv_q", "queries", q_heads, head_dim},
                                             {"conv_k", "keys", kv_heads, head_dim},
                                             {"conv_v", "values", kv_heads, value_dim}}) {
    side.push_back({.name = name,
                    .axes = {heads, width, dim},
                    .minimum = -0.5,
                    .maximum = 0.5,
                    .required = false,
                    .description = std::string("weights of a causal depthwise convolution with SiLU over the ") + of +
                                   ", the newest token last"});
  }
  return side;
}

std::vector<SideInputInfo> output_side_inputs(std::string_view curve) {
  using enum SideAxis;
  return {{.name = "norm_weight",
           .axes = {value_dim},
           .minimum = 0.5,
           .maximum = 1.5,
           .required = false,
           .description = "weights of the norm of the outputs; [Hq * Dv] with norm=full"},
          {.name = "output_gate",
           .axes = {batch, q_heads, SideAxis::tokens, value_dim},
           .minimum = -1,
           .maximum = 1,
           .required = false,
           .description = "outputs are multiplied by " + std::string(curve) + "(output_gate), after the norm"}};
}

SideInputInfo initial_state_side_input() {
  using enum SideAxis;
  return {.name = "initial_state",
          .axes = {batch, q_heads, head_dim, value_dim},
          .minimum = -0.5,
          .maximum = 0.5,
          .required = false,
          .description = "states before the first token, one per sequence; only for a state that has seen nothing"};
}

}  // namespace tessera
