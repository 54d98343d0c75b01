#include "methods/recurrent_attention.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "recurrent/operators.h"

namespace tessera {

namespace {

/// A float tensor and its view.
struct OwnRows {
  std::vector<float> values;
  MutableTensorView view;

  explicit OwnRows(const std::array<std::int64_t, 4>& shape)
      : values(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3])),
        view(mutable_view_of(values.data(), DType::f32, shape)) {}
};

/// Tokens of one sequence on a tensor's token axis.
struct TokenRange {
  std::int64_t batch = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
};

/// "4 or 2", or "4" when both are.
std::string either(std::int64_t a, std::int64_t b) {
  return a == b ? fmt::format("{}", a) : fmt::format("{} or {}", a, b);
}

/// What a call adds to the states.
struct CallTokens {
  std::vector<std::int64_t> skip;  ///< per sequence: keys that its state has seen
  std::int64_t shift = 0;          ///< uniform batches: the common skip, by which k and v are cut
  std::int64_t tokens = 0;         ///< length of the token axis after the cut
};

void check_call(std::string_view method, const Problem& problem, const AttentionInputs& inputs) {
  require(inputs.sources.empty(), "{}: {} key sources are given; a recurrence reads none", method,
          inputs.sources.size());
  require(!inputs.modifiers.changes_scores() && inputs.modifiers.sink_logits.empty(),
          "{}: modifiers are given; a recurrence has no scores and no softmax to change", method);
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    require(problem.causal || problem.q_len_of(s) <= 1,
            "{}: the problem is not causal; a recurrence sees only what precedes a query", method);
    require(problem.q_len_of(s) <= problem.kv_len_of(s),
            "{}: sequence {} has {} queries and {} keys; expected a key for every query", method, s,
            problem.q_len_of(s), problem.kv_len_of(s));
  }
}

CallTokens tokens_of(std::string_view method, const Problem& problem, const RecurrentMethodState::Layer* layer) {
  CallTokens call;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const std::int64_t queries = problem.q_len_of(s);
    const std::int64_t keys = problem.kv_len_of(s);
    const std::int64_t seen = layer == nullptr ? 0 : layer->states.tokens(0)[static_cast<std::size_t>(s)];
    const std::int64_t before = queries == keys || seen == 0 ? 0 : seen;
    require(before == 0 || before == keys - queries,
            "{}: the state of sequence {} has seen {} tokens, but {} of its {} keys precede the queries", method, s,
            seen, keys - queries, keys);
    const std::int64_t offset = problem.q_offset_of(s);
    require(queries == 0 || offset == keys - queries || (queries == keys && offset == seen),
            "{}: the first query of sequence {} has position {}; expected {}, on the key of the same token", method, s,
            offset, keys - queries);
    call.skip.push_back(before);
  }
  call.tokens = problem.kv_len;
  if (!problem.variable_length()) {
    require(std::equal(call.skip.begin() + 1, call.skip.end(), call.skip.begin()),
            "{}: the states of the batch have seen different numbers of tokens; give a variable-length batch", method);
    call.shift = call.skip.front();
    call.tokens -= call.shift;
  }
  return call;
}

/// Keys or values of the added tokens without the pages.
TensorView without_pages(const Problem& problem, const PageTable& pages, const TensorView& pool, std::int64_t first,
                         std::int64_t tokens, std::vector<std::byte>& storage) {
  const auto row_bytes = static_cast<std::size_t>(pool.dim()) * size_of(pool.dtype);
  storage.resize(static_cast<std::size_t>(problem.batch * pool.heads() * tokens) * row_bytes);
  std::byte* out = storage.data();
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    for (std::int64_t h = 0; h < pool.heads(); ++h) {
      for (std::int64_t t = first; t < first + tokens; ++t, out += row_bytes) {
        const std::int32_t page =
            pages.table[static_cast<std::size_t>(s * pages.pages_per_sequence + t / pages.page_size)];
        std::memcpy(out, pool.row(page, h, t % pages.page_size), row_bytes);
      }
    }
  }
  return view_of(storage.data(), pool.dtype, {problem.batch, pool.heads(), tokens, pool.dim()});
}

TensorView cut(TensorView view, std::int64_t first) {
  if (first > 0) view.data = view.row(0, 0, first);
  view.shape[2] -= first;
  return view;
}

std::vector<TokenRange> added_tokens(const Problem& problem, const CallTokens& call) {
  std::vector<TokenRange> ranges;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const std::int64_t skip = problem.variable_length() ? call.skip[static_cast<std::size_t>(s)] : 0;
    ranges.push_back({problem.tensor_batch_of(s), problem.kv_begin_of(s) + skip,
                      problem.variable_length() ? problem.kv_len_of(s) - skip : call.tokens});
  }
  return ranges;
}

std::vector<TokenRange> added_queries(const Problem& problem) {
  std::vector<TokenRange> ranges;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    ranges.push_back({problem.tensor_batch_of(s), problem.q_begin_of(s), problem.q_len_of(s)});
  }
  return ranges;
}

/// q, k or v as float after body(rows, sequence, head, count), rows [count][dim] of one sequence and head.
template <class Body>
OwnRows transformed(const TensorView& view, const std::vector<TokenRange>& ranges, int threads, const Body& body) {
  OwnRows out(view.shape);
  const auto sequences = static_cast<std::int64_t>(ranges.size());
  parallel_for(sequences * view.heads(), threads, [&](std::int64_t i, int) {
    const TokenRange& range = ranges[static_cast<std::size_t>(i / view.heads())];
    const std::int64_t head = i % view.heads();
    if (range.count == 0) return;
    auto* rows = reinterpret_cast<float*>(out.view.row(range.batch, head, range.first));
    for (std::int64_t t = 0; t < range.count; ++t) {
      to_float(view.row(range.batch, head, range.first + t), view.dtype, view.dim(), rows + t * view.dim());
    }
    body(rows, i / view.heads(), head, range.count);
  });
  return out;
}

/// Convolution of one stream; its tail lives in the state of the layer, or only in this call.
OwnRows convolved(std::string_view name, const TensorView& view, const std::vector<TokenRange>& ranges,
                  const SideReader& side, RecurrentMethodState::Layer* layer, int threads) {
  std::int64_t width = 0;
  const std::vector<float> weights = side.convolution(name, view.heads(), view.dim(), width);
  const std::int64_t tail_size = (width - 1) * view.dim();
  std::vector<float> own;
  std::vector<float>& tails = layer == nullptr ? own : layer->tails[std::string(name)];
  const auto wanted = static_cast<std::size_t>(static_cast<std::int64_t>(ranges.size()) * view.heads() * tail_size);
  require(tails.empty() || tails.size() == wanted, "{}: the state holds rows for another width or shape", name);
  tails.resize(wanted);
  return transformed(
      view, ranges, threads, [&](float* rows, std::int64_t sequence, std::int64_t head, std::int64_t count) {
        const auto at = static_cast<std::size_t>((sequence * view.heads() + head) * tail_size);
        const std::span<float> tail = std::span(tails).subspan(at, static_cast<std::size_t>(tail_size));
        const std::int64_t size = width * view.dim();
        recurrent::short_convolution(
            rows, count, view.dim(),
            std::span(weights).subspan(static_cast<std::size_t>(head * size), static_cast<std::size_t>(size)), tail,
            rows);
      });
}

/// Norm, its weights and the output gate, on float outputs [B, heads, Nq, Dv].
void finish_outputs(const RecurrentLayer& layer, const Problem& problem, const CallTokens& call, SideReader& side,
                    const OwnRows& o, const MutableTensorView& target, int threads) {
  const std::int64_t heads = problem.q_heads;
  const std::int64_t dim = problem.value_dim;
  const bool full = layer.norm == OutputNorm::full;
  std::vector<float> weights;
  if (layer.norm != OutputNorm::none && side.has("norm_weight")) {
    weights = side.vector("norm_weight", full ? heads * dim : dim);
  }
  const TensorView* gate = side.optional_rows("output_gate", dim);
  const std::vector<TokenRange> queries = added_queries(problem);
  const std::vector<TokenRange> tokens = added_tokens(problem, call);
  for (std::size_t s = 0; s < queries.size(); ++s) {
    parallel_for(queries[s].count, threads, [&](std::int64_t n, int) {
      std::vector<float> row(static_cast<std::size_t>(heads * dim));
      for (std::int64_t h = 0; h < heads; ++h) {
        to_float(o.view.row(queries[s].batch, h, queries[s].first + n), DType::f32, dim, row.data() + h * dim);
        const auto own = std::span(row).subspan(static_cast<std::size_t>(h * dim), static_cast<std::size_t>(dim));
        if (layer.norm == OutputNorm::head) recurrent::rms_normalise(own, layer.norm_epsilon);
      }
      if (full) recurrent::rms_normalise(row, layer.norm_epsilon);
      for (std::size_t i = 0; i < row.size(); ++i) {
        if (!weights.empty()) row[i] *= weights[full ? i : i % static_cast<std::size_t>(dim)];
      }
      const std::int64_t token = tokens[s].first + tokens[s].count - queries[s].count + n;
      for (std::int64_t h = 0; h < heads; ++h) {
        if (gate != nullptr) {
          const std::byte* gates = gate->row(queries[s].batch, h * gate->heads() / heads, token);
          for (std::int64_t d = 0; d < dim; ++d) {
            const float x = load_as_float(gates, gate->dtype, d);
            row[static_cast<std::size_t>(h * dim + d)] *=
                layer.output_gate == GateCurve::silu ? recurrent::silu(x) : recurrent::sigmoid(x);
          }
        }
        from_float(row.data() + h * dim, dim, target.dtype, target.row(queries[s].batch, h, queries[s].first + n));
      }
    });
  }
}

/// The layer's entry of the caller's state, made on its first call; null without a state.
RecurrentMethodState::Layer* layer_state(std::string_view method, const Problem& problem, const PlanContext& context) {
  if (context.state == nullptr) return nullptr;
  auto* state = dynamic_cast<RecurrentMethodState*>(context.state);
  require(state != nullptr, "{}: the state is of another method; expected one from new_state()", method);
  const RecurrentState::Shape shape{.layers = 1,
                                    .sequences = problem.batch,
                                    .heads = problem.q_heads,
                                    .head_dim = problem.head_dim,
                                    .value_dim = problem.value_dim};
  RecurrentMethodState::Layer& layer = state->layers[context.layer];
  if (layer.states.shape().head_dim == 0) layer.states = RecurrentState(shape);
  const RecurrentState::Shape& kept = layer.states.shape();
  require(kept == shape,
          "{}: the state of layer {} is for {} sequences, {} heads, {} x {}; this call has {}, {}, {} x {}", method,
          context.layer, kept.sequences, kept.heads, kept.head_dim, kept.value_dim, shape.sequences, shape.heads,
          shape.head_dim, shape.value_dim);
  return &layer;
}

RecurrentProblem recurrent_problem(const RecurrentLayer& layer, const Problem& problem, const CallTokens& call) {
  RecurrentProblem recurrent;
  recurrent.batch = problem.batch;
  recurrent.heads = recurrent.q_heads = problem.q_heads;
  recurrent.k_heads = recurrent.v_heads = problem.kv_heads;
  recurrent.head_dim = problem.head_dim;
  recurrent.value_dim = problem.value_dim;
  recurrent.kv_len = call.tokens;
  recurrent.q_len = problem.q_len;
  recurrent.scale = problem.scale;
  if (!recurrent.scale && layer.default_scale != 0) recurrent.scale = layer.default_scale;
  recurrent.normalise = layer.normalise;
  if (problem.variable_length()) {
    recurrent.cu_seqlens_q = problem.cu_seqlens_q;
    recurrent.cu_seqlens_k = problem.cu_seqlens_k;
    recurrent.skip = call.skip;
  }
  return recurrent;
}

}  // namespace

SideReader::SideReader(std::string_view method, const Problem& problem, const AttentionInputs& inputs,
                       std::int64_t first, std::int64_t tokens)
    : method_(method),
      problem_(problem),
      inputs_(inputs),
      first_(first),
      tokens_(tokens),
      batch_(problem.variable_length() ? 1 : problem.batch) {}

const TensorView* SideReader::optional_rows(std::string_view name, std::int64_t width) {
  const TensorView* given = inputs_.find_side(name);
  if (given == nullptr) return nullptr;
  TensorView view = *given;
  // Files leave out leading axes: [B, heads, N] arrives as [1, B, heads, N].
  if (width == 1 && view.shape[0] == 1 && view.shape[3] != 1 && view.shape[1] == batch_) {
    view.shape = {view.shape[1], view.shape[2], view.shape[3], 1};
    view.strides = {view.strides[1], view.strides[2], view.strides[3], 1};
  } else if (width == 1 && view.shape == std::array<std::int64_t, 4>{1, batch_, problem_.q_heads, 1}) {
    view.shape = {batch_, problem_.q_heads, 1, 1};
    view.strides = {view.strides[1], view.strides[2], view.strides[3], 1};
  }
  const bool heads = view.heads() == problem_.q_heads || view.heads() == problem_.kv_heads;
  const bool length = view.tokens() == first_ + tokens_ || view.tokens() == tokens_;
  require(is_attention_dtype(view.dtype), "{}: side input '{}' has dtype {}; expected f32, bf16 or f16", method_, name,
          name_of(view.dtype));
  require(view.data != nullptr && view.batch() == batch_ && heads && length && view.dim() == width &&
              (view.strides[3] == 1 || width == 1),
          "{}: side input '{}' has shape [{}]; expected [{}, {}, {}, {}] (batch, heads, tokens, dim)", method_, name,
          fmt::join(given->shape, ", "), batch_, either(problem_.q_heads, problem_.kv_heads),
          either(first_ + tokens_, tokens_), width);
  if (view.tokens() != tokens_) view = cut(view, first_);
  return &views_.insert_or_assign(std::string(name), view).first->second;
}

const TensorView& SideReader::rows(std::string_view name, std::int64_t width) {
  const TensorView* view = optional_rows(name, width);
  require(view != nullptr,
          "{}: side input '{}' is missing; expected a tensor [{}, {}, {}, {}] (batch, heads, tokens, dim)", method_,
          name, batch_, problem_.q_heads, tokens_, width);
  return *view;
}

std::vector<float> SideReader::numbers(std::string_view name, const std::array<std::int64_t, 4>& shape) const {
  const TensorView* view = inputs_.find_side(name);
  require(view != nullptr, "{}: side input '{}' is missing", method_, name);
  require(is_attention_dtype(view->dtype), "{}: side input '{}' has dtype {}; expected f32, bf16 or f16", method_, name,
          name_of(view->dtype));
  require(view->shape == shape && (view->strides[3] == 1 || shape[3] == 1),
          "{}: side input '{}' has shape [{}]; expected [{}]", method_, name, fmt::join(view->shape, ", "),
          fmt::join(shape, ", "));
  std::vector<float> values;
  for (std::int64_t h = 0; h < shape[1]; ++h) {
    for (std::int64_t n = 0; n < shape[2]; ++n) {
      for (std::int64_t d = 0; d < shape[3]; ++d) {
        values.push_back(load_as_float(view->row(0, h, n), view->dtype, d));
      }
    }
  }
  return values;
}

std::vector<float> SideReader::vector(std::string_view name, std::int64_t size) const {
  return numbers(name, {1, 1, 1, size});
}

std::vector<float> SideReader::per_head(std::string_view name, std::int64_t width, float fallback) const {
  if (!has(name)) return std::vector<float>(static_cast<std::size_t>(problem_.q_heads * width), fallback);
  return width == 1 ? vector(name, problem_.q_heads) : numbers(name, {1, 1, problem_.q_heads, width});
}

std::vector<float> SideReader::convolution(std::string_view name, std::int64_t heads, std::int64_t dim,
                                           std::int64_t& width) const {
  const TensorView* view = inputs_.find_side(name);
  require(view != nullptr, "{}: side input '{}' is missing", method_, name);
  width = view->tokens();
  require(width >= 1 && width <= 64, "{}: side input '{}' has shape [{}]; expected [{}, width, {}] with width 1 to 64",
          method_, name, fmt::join(view->shape, ", "), heads, dim);
  return numbers(name, {1, heads, width, dim});
}

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

void make_decays(SideReader& side, std::int64_t q_heads, std::int64_t width, int threads,
                 const std::function<float(float, float, float)>& curve, RecurrentGates& gates) {
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
        const float g = curve(load_as_float(row, raw.dtype, d), bias[static_cast<std::size_t>(h * width + d)],
                              a_log[static_cast<std::size_t>(h)]);
        store_from_float(out.row(i / q_heads, h, n), DType::f32, d, g);
      }
    }
  });
  gates.decay = out;
}

RunReport attend_recurrent(const RecurrentLayer& layer, const Problem& problem, const AttentionInputs& inputs,
                           const AttentionOutputs& outputs, const PlanContext& context, const MakeGates& make_gates) {
  const auto start = std::chrono::steady_clock::now();
  const int threads = context.run.threads;
  check_call(layer.method, problem, inputs);
  const std::array<std::int64_t, 4> o_shape{problem.variable_length() ? 1 : problem.batch, problem.q_heads,
                                            problem.q_len, problem.value_dim};
  require(outputs.o.shape == o_shape, "o has shape [{}]; expected [{}]", fmt::join(outputs.o.shape, ", "),
          fmt::join(o_shape, ", "));
  require(outputs.lse.empty() || static_cast<std::int64_t>(outputs.lse.size()) == o_shape[0] * o_shape[1] * o_shape[2],
          "lse has {} elements; expected 0 or {}", outputs.lse.size(), o_shape[0] * o_shape[1] * o_shape[2]);
  RecurrentMethodState::Layer* kept = layer_state(layer.method, problem, context);
  const CallTokens call = tokens_of(layer.method, problem, kept);
  SideReader side(layer.method, problem, inputs, call.shift, call.tokens);

  RecurrentInputs given;
  std::array<std::vector<std::byte>, 2> storage;
  given.q = inputs.q;
  if (inputs.pages.used()) {
    given.k = without_pages(problem, inputs.pages, inputs.k, call.shift, call.tokens, storage[0]);
    given.v = without_pages(problem, inputs.pages, inputs.v, call.shift, call.tokens, storage[1]);
  } else {
    given.k = cut(inputs.k, call.shift);
    given.v = cut(inputs.v, call.shift);
  }
  RecurrentGates gates;
  make_gates(side, gates);
  given.decay = gates.decay;
  given.beta = gates.beta;

  std::vector<OwnRows> streams;
  streams.reserve(3);
  const auto replace = [&](TensorView& view, const char* name, const std::vector<TokenRange>& ranges, bool activated) {
    if (layer.convolutions && side.has(name)) {
      streams.push_back(convolved(name, view, ranges, side, kept, threads));
    } else if (activated) {
      streams.push_back(
          transformed(view, ranges, threads, [&](float* rows, std::int64_t, std::int64_t, std::int64_t n) {
            std::transform(rows, rows + n * view.dim(), rows, recurrent::silu);
          }));
    } else {
      return;
    }
    view = streams.back().view;
  };
  const std::vector<TokenRange> tokens = added_tokens(problem, call);
  const std::vector<TokenRange> queries = added_queries(problem);
  for (std::size_t s = 0; s < tokens.size() && layer.convolutions && side.has("conv_q"); ++s) {
    require(queries[s].count == tokens[s].count,
            "{}: conv_q needs the query of every token that the call adds; sequence {} has {} for {} tokens",
            layer.method, s, queries[s].count, tokens[s].count);
  }
  replace(given.q, "conv_q", queries, layer.silu);
  replace(given.k, "conv_k", tokens, layer.silu);
  replace(given.v, "conv_v", tokens, false);

  const RecurrentProblem recurrent = recurrent_problem(layer, problem, call);
  RecurrentOptions options = layer.options;
  options.threads = threads;
  options.isa = context.run.isa;
  if (context.run.kernel == KernelKind::reference) options.form = RecurrentForm::reference;
  const std::span<float> states = kept == nullptr ? std::span<float>() : kept->states.layer(0);
  if (layer.norm != OutputNorm::none || side.has("output_gate")) {
    const OwnRows o(o_shape);
    run_recurrent(recurrent, given, states, o.view, options);
    finish_outputs(layer, problem, call, side, o, outputs.o, threads);
  } else {
    run_recurrent(recurrent, given, states, outputs.o, options);
  }
  if (kept != nullptr) {
    for (std::size_t s = 0; s < tokens.size(); ++s) kept->states.tokens(0)[s] += tokens[s].count;
  }
  std::fill(outputs.lse.begin(), outputs.lse.end(), 0.0F);

  RunReport report;
  report.kernel = context.run.kernel == KernelKind::reference ? KernelKind::reference : KernelKind::automatic;
  report.isa = options.isa.value_or(default_isa());
  report.threads = thread_count(threads);
  report.flops = recurrent_flops(recurrent, given.beta.data != nullptr, options.chunk);
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

}  // namespace tessera
