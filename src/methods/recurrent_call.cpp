#include "methods/recurrent_call.h"

#include <algorithm>
#include <cstring>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "recurrent/operators.h"

namespace tessera {

namespace {

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
    call.seen.push_back(seen);
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

RecurrentCall::RecurrentCall(const RecurrentLayer& called_layer, const Problem& called_problem,
                             const AttentionInputs& inputs, const PlanContext& context, const GateRule& rule,
                             RecurrentMethodState::Layer* kept)
    : layer(called_layer),
      problem(called_problem),
      threads(context.run.threads),
      added((check_call(layer.method, problem, inputs), tokens_of(layer.method, problem, kept))),
      side(layer.method, problem, inputs, added.shift, added.tokens),
      tokens(added_tokens(problem, added)),
      queries(added_queries(problem)),
      recurrent(recurrent_problem(layer, problem, added)),
      options(layer.options) {
  for (const std::int64_t seen : added.seen) {
    require(seen == 0 || !side.has("initial_state"),
            "{}: side input 'initial_state' is given to a state that has seen {} tokens", layer.method, seen);
  }
  given.q = inputs.q;
  if (inputs.pages.used()) {
    given.k = without_pages(problem, inputs.pages, inputs.k, added.shift, added.tokens, storage_[0]);
    given.v = without_pages(problem, inputs.pages, inputs.v, added.shift, added.tokens, storage_[1]);
  } else {
    given.k = cut(inputs.k, added.shift);
    given.v = cut(inputs.v, added.shift);
  }
  rule.make(side, gates);
  given.decay = gates.decay;
  given.beta = gates.beta;
  for (std::size_t s = 0; s < tokens.size() && convolves("conv_q"); ++s) {
    require(queries[s].count == tokens[s].count,
            "{}: conv_q needs the query of every token that the call adds; sequence {} has {} for {} tokens",
            layer.method, s, queries[s].count, tokens[s].count);
  }
  streams_.reserve(3);
  replace(given.q, "conv_q", queries, kept);
  replace(given.k, "conv_k", tokens, kept);
  replace(given.v, "conv_v", tokens, kept);
  options.threads = threads;
  options.isa = context.run.isa;
  if (context.run.kernel == KernelKind::reference) options.form = RecurrentForm::reference;
}

void RecurrentCall::replace(TensorView& view, const char* name, const std::vector<TokenRange>& ranges,
                            RecurrentMethodState::Layer* kept) {
  if (convolves(name)) {
    streams_.push_back(convolved(name, view, ranges, side, kept, threads));
  } else if (activates(name)) {
    streams_.push_back(transformed(view, ranges, threads, [&](float* rows, std::int64_t, std::int64_t, std::int64_t n) {
      std::transform(rows, rows + n * view.dim(), rows, recurrent::silu);
    }));
  } else {
    return;
  }
  view = streams_.back().view;
}

std::vector<float> RecurrentCall::initial_states() const {
  return side.has("initial_state") ? side.states("initial_state") : std::vector<float>();
}

std::vector<float> norm_weights(const RecurrentCall& call) {
  if (call.layer.norm == OutputNorm::none || !call.side.has("norm_weight")) return {};
  const bool full = call.layer.norm == OutputNorm::full;
  return call.side.vector("norm_weight", (full ? call.problem.q_heads : 1) * call.problem.value_dim);
}

void finish_outputs(RecurrentCall& call, const OwnRows& o, const MutableTensorView& target) {
  const RecurrentLayer& layer = call.layer;
  const Problem& problem = call.problem;
  const std::int64_t heads = problem.q_heads;
  const std::int64_t dim = problem.value_dim;
  const bool full = layer.norm == OutputNorm::full;
  const std::vector<float> weights = norm_weights(call);
  const TensorView* gate = call.side.optional_rows("output_gate", dim);
  const std::vector<TokenRange>& queries = call.queries;
  const std::vector<TokenRange>& tokens = call.tokens;
  for (std::size_t s = 0; s < queries.size(); ++s) {
    parallel_for(queries[s].count, call.threads, [&](std::int64_t n, int) {
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

}  // namespace tessera
