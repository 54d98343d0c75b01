#include "recurrent/memory.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "recurrent/padding.h"

namespace tessera::recurrent {

namespace {

void check_tensor(const TensorView& tensor, std::string_view name, const std::array<std::int64_t, 4>& expected) {
  require(tensor.data != nullptr, "{} has no data", name);
  require(is_attention_dtype(tensor.dtype), "{} has dtype {}; expected f32, bf16 or f16", name, name_of(tensor.dtype));
  require(tensor.shape == expected, "{} has shape [{}]; expected [{}] (batch, heads, tokens, dim)", name,
          fmt::join(tensor.shape, ", "), fmt::join(expected, ", "));
  require(tensor.strides[3] == 1 || tensor.shape[3] == 1, "{} has stride {} on its last axis; expected 1", name,
          tensor.strides[3]);
  const auto alignment = reinterpret_cast<std::uintptr_t>(tensor.data) % size_of(tensor.dtype);
  require(alignment == 0, "{} is not aligned to its {}-byte elements", name, size_of(tensor.dtype));
}

void check_offsets(const std::vector<std::int64_t>& offsets, std::string_view name, std::int64_t batch,
                   std::int64_t tokens) {
  require(static_cast<std::int64_t>(offsets.size()) == batch + 1, "{} has {} entries; expected batch {} + 1", name,
          offsets.size(), batch);
  require(offsets.front() == 0 && offsets.back() == tokens && std::is_sorted(offsets.begin(), offsets.end()),
          "{} is [{}]; expected offsets from 0 to {} that do not decrease", name, fmt::join(offsets, ", "), tokens);
}

}  // namespace

ChunkShape chunk_shape(const RecurrentProblem& problem, const RecurrentInputs& inputs,
                       const RecurrentOptions& options) {
  ChunkShape shape;
  shape.head_dim = problem.head_dim;
  shape.value_dim = problem.value_dim;
  shape.key_columns = padded_columns(problem.head_dim);
  shape.value_columns = padded_columns(problem.value_dim);
  shape.key_stride = padded_stride(shape.key_columns);
  shape.value_stride = padded_stride(shape.value_columns);
  shape.pair_stride = padded_stride(options.chunk);
  shape.chunk = options.chunk;
  shape.scale = problem.scale.value_or(1.0F / std::sqrt(static_cast<float>(problem.head_dim)));
  shape.delta = inputs.beta.data != nullptr;
  shape.normalise = problem.normalise;
  shape.product_on_diagonal = options.product_on_diagonal;
  if (inputs.decay.data != nullptr) {
    shape.decay = inputs.decay.dim() == 1 ? DecayKind::scalar : DecayKind::channel;
  }
  return shape;
}

void place(const ChunkShape& shape, bool for_gradient, Arena& arena, Chunk& chunk) {
  const std::int64_t keys = shape.chunk * shape.key_stride;
  const std::int64_t pairs = shape.chunk * shape.pair_stride;
  chunk.q = arena.take(keys);
  chunk.k = arena.take(keys);
  chunk.q_start = arena.take(keys);
  chunk.k_start = arena.take(keys);
  chunk.k_end = arena.take(keys);
  chunk.total = arena.take(shape.key_stride);
  chunk.scores = arena.take(pairs);
  chunk.overlap = arena.take(pairs);
  chunk.inverse = arena.take(pairs);
  chunk.beta = arena.take(shape.chunk);
  chunk.q_length = arena.take(shape.chunk);
  chunk.k_length = arena.take(shape.chunk);
  chunk.factor = arena.take(keys);
  chunk.pair_decay = arena.take(pairs);
  chunk.start = arena.take(for_gradient ? keys : 0);
  chunk.end = arena.take(for_gradient ? keys : 0);
}

void place(const ChunkShape& shape, Arena& arena, Scratch& scratch) {
  const std::int64_t widest = std::max(shape.key_columns, shape.value_columns);
  scratch.panels = arena.take(std::max(shape.chunk, shape.key_columns) * widest);
  scratch.left = arena.take(2 * kSubChunk * shape.key_stride);
  scratch.keys = arena.take(std::max(shape.chunk, kSubChunk) * shape.key_stride);
  scratch.values = arena.take(shape.chunk * shape.value_stride);
  scratch.corrected = arena.take(shape.chunk * shape.value_stride);
  scratch.output = arena.take(shape.chunk * shape.value_stride);
  scratch.state = arena.take(std::max(state_floats(shape), shape.key_columns * 64));
  scratch.bad_decay = 0;
}

void place(const ChunkShape& shape, Arena& arena, GradientScratch& scratch) {
  const std::int64_t keys = shape.chunk * shape.key_stride;
  const std::int64_t values = shape.chunk * shape.value_stride;
  const std::int64_t pairs = shape.chunk * shape.pair_stride;
  scratch.state = arena.take(state_floats(shape));
  scratch.d_output = arena.take(values);
  scratch.d_corrected = arena.take(values);
  scratch.d_values = arena.take(values);
  scratch.d_scores = arena.take(pairs);
  scratch.d_overlap = arena.take(pairs);
  scratch.d_q = arena.take(keys);
  scratch.d_k_plus = arena.take(keys);
  scratch.d_k_minus = arena.take(keys);
  scratch.d_k_end = arena.take(keys);
  scratch.reach = arena.take(keys);
  scratch.product = arena.take(keys);
  scratch.d_beta = arena.take(shape.chunk);
}

void place(const ChunkShape& shape, bool beta, Arena& arena, KeptChunk& kept) {
  kept = {};
  kept.entry = arena.take(state_floats(shape));
  if (!shape.delta) return;
  kept.inverse = arena.take(shape.chunk * shape.pair_stride);
  kept.corrected = arena.take(shape.chunk * shape.value_stride);
  if (beta) kept.unweighted = arena.take(shape.chunk * shape.value_stride);
}

void set_range(const ChunkShape& shape, const HeadJob& job, std::int64_t index, Chunk& chunk) {
  chunk.first = index * shape.chunk;
  chunk.rows = std::min(shape.chunk, job.tokens - chunk.first);
  chunk.first_query = std::clamp<std::int64_t>(job.first_query() - chunk.first, 0, chunk.rows);
}

void load_state(const ChunkShape& shape, const float* state, float* out) {
  std::fill_n(out, state_floats(shape), 0.0F);
  if (state == nullptr) return;
  for (std::int64_t d = 0; d < shape.head_dim; ++d) {
    std::copy_n(state + d * shape.value_dim, shape.value_dim, out + d * shape.value_stride);
  }
}

void store_state(const ChunkShape& shape, const float* state, float* out) {
  if (out == nullptr) return;
  for (std::int64_t d = 0; d < shape.head_dim; ++d) {
    std::copy_n(state + d * shape.value_stride, shape.value_dim, out + d * shape.value_dim);
  }
}

void check_tensors(const RecurrentProblem& problem, const RecurrentInputs& inputs) {
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  // Heads that divide those of the states are shared; for others the message names what is expected.
  const auto shared_heads = [&](const TensorView& gate) {
    return gate.heads() > 0 && problem.heads % gate.heads() == 0 ? gate.heads() : problem.heads;
  };
  check_tensor(inputs.q, "q", {batch, problem.q_heads, problem.q_len, problem.head_dim});
  check_tensor(inputs.k, "k", {batch, problem.k_heads, problem.kv_len, problem.head_dim});
  check_tensor(inputs.v, "v", {batch, problem.v_heads, problem.kv_len, problem.value_dim});
  if (inputs.decay.data != nullptr) {
    const std::int64_t dim = inputs.decay.dim() == 1 ? 1 : problem.head_dim;
    check_tensor(inputs.decay, "decay", {batch, shared_heads(inputs.decay), problem.kv_len, dim});
  }
  if (inputs.beta.data != nullptr) {
    check_tensor(inputs.beta, "beta", {batch, shared_heads(inputs.beta), problem.kv_len, 1});
  }
}

void check_output(const RecurrentProblem& problem, const TensorView& o, std::string_view name) {
  const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
  check_tensor(o, name, {batch, problem.heads, problem.q_len, problem.value_dim});
}

void check_options(const RecurrentOptions& options) {
  require(options.chunk >= 16 && options.chunk <= 128 && options.chunk % 16 == 0,
          "chunk is {}; expected a multiple of 16 from 16 to 128", options.chunk);
}

void check_decays(const RecurrentProblem& problem, const TensorView& decay) {
  if (decay.data == nullptr) return;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const SequenceRange range = range_of(problem, s);
    for (std::int64_t h = 0; h < decay.heads(); ++h) {
      for (std::int64_t t = 0; t < range.tokens; ++t) {
        const std::byte* row = decay.row(range.tensor_batch, h, range.first_token + t);
        for (std::int64_t d = 0; d < decay.dim(); ++d) {
          const float g = load_as_float(row, decay.dtype, d);
          require(g <= 0,
                  "decay of sequence {}, head {}, token {}, channel {} is {}; expected a logarithm of at most 0", s, h,
                  range.first_token + t, d, g);
        }
      }
    }
  }
}

SequenceRange range_of(const RecurrentProblem& problem, std::int64_t sequence) {
  SequenceRange range;
  std::int64_t first = 0;
  std::int64_t tokens = problem.kv_len;
  range.queries = problem.q_len;
  if (problem.variable_length()) {
    const auto s = static_cast<std::size_t>(sequence);
    first = problem.cu_seqlens_k[s];
    tokens = problem.cu_seqlens_k[s + 1] - first;
    range.first_query = problem.cu_seqlens_q[s];
    range.queries = problem.cu_seqlens_q[s + 1] - range.first_query;
  } else {
    range.tensor_batch = sequence;
  }
  const std::int64_t skip = problem.skip.empty() ? 0 : problem.skip[static_cast<std::size_t>(sequence)];
  range.first_token = first + skip;
  range.tokens = tokens - skip;
  return range;
}

Rows rows_of(const TensorView& view, std::int64_t heads, std::int64_t head, std::int64_t batch, std::int64_t first) {
  if (view.data == nullptr) return {};
  return {view.row(batch, head * view.heads() / heads, first), view.dtype,
          view.strides[2] * static_cast<std::int64_t>(size_of(view.dtype))};
}

OutputRows rows_of(const MutableTensorView& view, std::int64_t heads, std::int64_t head, std::int64_t batch,
                   std::int64_t first) {
  if (view.data == nullptr) return {};
  return {view.row(batch, head * view.shape[1] / heads, first), view.dtype,
          view.strides[2] * static_cast<std::int64_t>(size_of(view.dtype))};
}

std::vector<HeadJob> jobs_of(const RecurrentProblem& problem, const RecurrentInputs& inputs, std::span<float> state,
                             const MutableTensorView& o) {
  std::vector<HeadJob> jobs;
  const std::int64_t size = problem.head_dim * problem.value_dim;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const SequenceRange range = range_of(problem, s);
    for (std::int64_t h = 0; h < problem.heads; ++h) {
      const auto rows = [&](const TensorView& view, std::int64_t first) {
        return rows_of(view, problem.heads, h, range.tensor_batch, first);
      };
      jobs.push_back({.q = rows(inputs.q, range.first_query),
                      .k = rows(inputs.k, range.first_token),
                      .v = rows(inputs.v, range.first_token),
                      .decay = rows(inputs.decay, range.first_token),
                      .beta = rows(inputs.beta, range.first_token),
                      .decay_width = inputs.decay.dim(),
                      .o = rows_of(o, problem.heads, h, range.tensor_batch, range.first_query),
                      .tokens = range.tokens,
                      .queries = range.queries,
                      .state = state.empty() ? nullptr : state.data() + (s * problem.heads + h) * size});
    }
  }
  return jobs;
}

std::vector<double> normalise_rows(std::vector<double>& rows, std::int64_t width) {
  std::vector<double> factors;
  for (std::size_t row = 0; row < rows.size(); row += static_cast<std::size_t>(width)) {
    double squares = kLengthEpsilon;
    for (std::int64_t d = 0; d < width; ++d) squares += rows[row + d] * rows[row + d];
    factors.push_back(1 / std::sqrt(squares));
    for (std::int64_t d = 0; d < width; ++d) rows[row + d] *= factors.back();
  }
  return factors;
}

ReferenceHead reference_head(const RecurrentProblem& problem, const HeadJob& job, const float* initial_state) {
  ReferenceHead head;
  head.tokens = job.tokens;
  head.head_dim = problem.head_dim;
  head.value_dim = problem.value_dim;
  head.scale = problem.scale ? static_cast<double>(*problem.scale) : 1 / std::sqrt(static_cast<double>(head.head_dim));
  const auto widen = [&](const Rows& rows, std::int64_t count, std::int64_t width) {
    std::vector<double> values;
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t i = 0; i < width; ++i) values.push_back(load_as_float(rows.row(t), rows.dtype, i));
    }
    return values;
  };
  head.q.assign(static_cast<std::size_t>(job.first_query() * head.head_dim), 0.0);
  const std::vector<double> queries = widen(job.q, job.queries, head.head_dim);
  head.q.insert(head.q.end(), queries.begin(), queries.end());
  head.k = widen(job.k, job.tokens, head.head_dim);
  head.v = widen(job.v, job.tokens, head.value_dim);
  if (job.decay.data != nullptr) head.decay = widen(job.decay, job.tokens, job.decay_width);
  if (job.beta.data != nullptr) head.beta = widen(job.beta, job.tokens, 1);
  if (problem.normalise) {
    normalise_rows(head.q, head.head_dim);
    normalise_rows(head.k, head.head_dim);
  }
  head.state.assign(static_cast<std::size_t>(head.head_dim * head.value_dim), 0.0);
  if (initial_state != nullptr) std::copy_n(initial_state, head.state.size(), head.state.begin());
  return head;
}

std::vector<std::int64_t> longest_first(const std::vector<HeadJob>& jobs) {
  std::vector<std::int64_t> order(jobs.size());
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return jobs[a].tokens > jobs[b].tokens; });
  return order;
}

}  // namespace tessera::recurrent

namespace tessera {

double recurrent_flops(const RecurrentProblem& problem, bool delta, std::int64_t chunk) {
  double flops = 0;
  const auto keys = static_cast<double>(problem.head_dim);
  const auto values = static_cast<double>(problem.value_dim);
  const auto width = static_cast<double>(chunk);
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const recurrent::SequenceRange range = recurrent::range_of(problem, s);
    // Per query: q S, q K^T, A VN. Per token: K^T VN; with the delta rule k S, k K^T and the inverse times values.
    flops += static_cast<double>(range.queries) * (2 * keys * values + width * (keys + values));
    flops += static_cast<double>(range.tokens) * 2 * keys * values;
    if (delta) flops += static_cast<double>(range.tokens) * (2 * keys * values + width * (keys + values));
  }
  return flops * static_cast<double>(problem.heads);
}

void RecurrentProblem::validate() const {
  using recurrent::check_offsets;
  const auto at_least = [](std::string_view name, std::int64_t value, std::int64_t minimum, std::int64_t maximum) {
    require(value >= minimum && value <= maximum, "{} is {}; expected {} to {}", name, value, minimum, maximum);
  };
  constexpr std::int64_t most = std::int64_t{1} << 31;
  at_least("batch", batch, 1, most);
  at_least("heads", heads, 1, most);
  for (const auto& [name, count] : {std::pair{"q_heads", q_heads}, {"k_heads", k_heads}, {"v_heads", v_heads}}) {
    require(count >= 1 && heads % count == 0, "{} is {}; expected a divisor of heads {}", name, count, heads);
  }
  at_least("head_dim", head_dim, 1, 1024);
  at_least("value_dim", value_dim, 1, 1024);
  at_least("kv_len", kv_len, 0, most);
  at_least("q_len", q_len, 0, most);
  require(!scale || std::isfinite(*scale), "scale is {}; expected a finite number", scale.value_or(0));
  require(cu_seqlens_q.empty() == cu_seqlens_k.empty(), "give both cu_seqlens_q and cu_seqlens_k, or neither");
  if (variable_length()) {
    check_offsets(cu_seqlens_k, "cu_seqlens_k", batch, kv_len);
    check_offsets(cu_seqlens_q, "cu_seqlens_q", batch, q_len);
  }
  require(skip.empty() || static_cast<std::int64_t>(skip.size()) == batch, "skip has {} entries; expected batch {}",
          skip.size(), batch);
  for (std::int64_t s = 0; s < batch; ++s) {
    const recurrent::SequenceRange range = recurrent::range_of(*this, s);
    require(skip.empty() || skip[static_cast<std::size_t>(s)] >= 0, "skip of sequence {} is {}; expected 0 or more", s,
            skip.empty() ? 0 : skip[static_cast<std::size_t>(s)]);
    require(range.queries <= range.tokens, "sequence {} has {} queries and {} tokens to read; expected no more queries",
            s, range.queries, range.tokens);
  }
}

}  // namespace tessera
