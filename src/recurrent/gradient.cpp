// run_recurrent_backward: a pass over the states that keeps them, chunks from the last to the first, sums over shared
// heads.
#include <algorithm>

#include "core/error.h"
#include "core/parallel.h"
#include "recurrent/memory.h"

namespace tessera {

namespace recurrent {

namespace {

/// Chunks that are kept at once. A longer call is divided into segments, of which a first pass keeps the entry states.
constexpr std::int64_t kSegment = 256;

/// Memory of one thread.
struct Worker {
  Arena arena;
  Chunk chunk{};
  Scratch scratch{};
  GradientScratch gradient{};
  std::vector<KeptChunk> kept;

  /// Room for `chunks` kept ones; `beta`: its gradient is wanted.
  Worker(const ChunkShape& shape, std::int64_t chunks, bool beta) : kept(static_cast<std::size_t>(chunks)) {
    Arena size;
    lay_out(shape, beta, size);
    arena = Arena(size.used());
    lay_out(shape, beta, arena);
    // Rows that pad a state are read as part of its transpose, and never written again.
    for (const KeptChunk& k : kept) {
      std::fill(k.entry + shape.head_dim * shape.value_stride, k.entry + state_floats(shape), 0.0F);
    }
  }

 private:
  void lay_out(const ChunkShape& shape, bool beta, Arena& from) {
    place(shape, true, from, chunk);
    place(shape, from, scratch);
    place(shape, from, gradient);
    for (KeptChunk& k : kept) place(shape, beta, from, k);
  }
};

/// Asks for `rows`, of `dim` numbers each, of the chunk of `tokens` tokens from `first` on; `rows` begin `skip` tokens
/// later.
template <class SomeRows>
void ask_for(const SomeRows& rows, std::int64_t dim, std::int64_t first, std::int64_t tokens, std::int64_t skip,
             Ahead& ahead) {
  const std::int64_t cut = std::max<std::int64_t>(skip - first, 0);
  if (rows.data == nullptr || tokens <= cut) return;
  const std::byte* start = rows.row(first + cut - skip);
  const std::int64_t bytes = dim * static_cast<std::int64_t>(size_of(rows.dtype));
  if (rows.stride < 64) {  // several rows a line, or one for all
    ahead.add(start, 0, rows.stride * (tokens - cut - 1) + bytes, 1);
  } else {
    ahead.add(start, rows.stride, bytes, tokens - cut);
  }
}

/// What the gradient of chunk `index` of the segment needs last, then what that of the chunk before it needs first.
void look_ahead(const ChunkShape& shape, const HeadJob& job, const HeadGradients& gradients, std::int64_t index,
                Worker& worker) {
  Ahead& ahead = worker.scratch.ahead;
  const Chunk& chunk = worker.chunk;
  const KeptChunk* kept = worker.kept.data() + index;
  const std::int64_t skip = job.first_query();
  ahead.clear();
  ahead.add(kept->entry, shape.head_dim * shape.value_stride);
  ask_for(gradients.q, shape.head_dim, chunk.first, chunk.rows, skip, ahead);
  ask_for(gradients.k, shape.head_dim, chunk.first, chunk.rows, 0, ahead);
  ask_for(gradients.v, shape.value_dim, chunk.first, chunk.rows, 0, ahead);
  const std::int64_t before = chunk.first - shape.chunk;
  if (before < 0) return;
  ask_for(job.k, shape.head_dim, before, shape.chunk, 0, ahead);
  ask_for(job.q, shape.head_dim, before, shape.chunk, skip, ahead);
  ask_for(job.decay, job.decay_width, before, shape.chunk, 0, ahead);
  if (!shape.delta) {
    ask_for(job.v, shape.value_dim, before, shape.chunk, 0, ahead);
  } else if (index > 0) {
    ahead.add(kept[-1].corrected, shape.chunk * shape.value_stride);
    ahead.add(kept[-1].inverse, shape.chunk * shape.pair_stride);
    if (kept->unweighted != nullptr) ahead.add(kept[-1].unweighted, shape.chunk * shape.value_stride);
  }
  ask_for(gradients.o, shape.value_dim, before, shape.chunk, skip, ahead);
}

void run_head(const LevelKernels& level, const ChunkShape& shape, HeadJob job, const HeadGradients& gradients,
              Worker& worker) {
  const std::int64_t size = state_floats(shape);
  const std::int64_t chunks = chunks_of(shape, job);
  const auto segment_chunks = static_cast<std::int64_t>(worker.kept.size());
  const std::int64_t segments = (chunks + segment_chunks - 1) / segment_chunks;
  job.o = {};
  Arena checkpoints(segments * size);
  float* checkpoint = checkpoints.take(segments * size);
  if (segments > 0) load_state(shape, gradients.initial_state_of, checkpoint);
  const auto pass = [&](std::int64_t c, const float* entry, float* exit, const KeptChunk* kept) {
    Chunk chunk = worker.chunk;
    if (kept != nullptr && shape.delta) chunk.inverse = kept->inverse;
    set_range(shape, job, c, chunk);
    level.prepare(shape, job, Purpose::states, chunk, worker.scratch);
    Ahead& ahead = worker.scratch.ahead;
    ahead.clear();
    if (exit != nullptr) ahead.add(exit, shape.head_dim * shape.value_stride);
    const std::int64_t next = chunk.first + chunk.rows;
    const std::int64_t count = std::min(shape.chunk, job.tokens - next);
    ask_for(job.k, shape.head_dim, next, count, 0, ahead);
    ask_for(job.decay, job.decay_width, next, count, 0, ahead);
    ask_for(job.v, shape.value_dim, next, count, 0, ahead);
    level.pass(shape, job, chunk, entry, exit, kept, worker.scratch);
  };
  for (std::int64_t c = 0; c < (segments - 1) * segment_chunks; ++c) {
    const float* start = checkpoint + c / segment_chunks * size;
    float* running = checkpoint + (c / segment_chunks + 1) * size;
    pass(c, c % segment_chunks == 0 ? start : running, running, nullptr);
  }
  load_state(shape, gradients.final_state, worker.gradient.state);
  for (std::int64_t segment = segments - 1; segment >= 0; --segment) {
    const std::int64_t first = segment * segment_chunks;
    const std::int64_t last = std::min(chunks, first + segment_chunks);
    std::copy_n(checkpoint + segment * size, shape.head_dim * shape.value_stride, worker.kept[0].entry);
    for (std::int64_t c = first; c < last; ++c) {
      const KeptChunk& kept = worker.kept[static_cast<std::size_t>(c - first)];
      float* exit = c + 1 < last ? worker.kept[static_cast<std::size_t>(c + 1 - first)].entry : nullptr;
      if (exit != nullptr || shape.delta) pass(c, kept.entry, exit, &kept);
    }
    for (std::int64_t c = last - 1; c >= first; --c) {
      set_range(shape, job, c, worker.chunk);
      level.prepare(shape, job, Purpose::gradient, worker.chunk, worker.scratch);
      look_ahead(shape, job, gradients, c - first, worker);
      level.backward(shape, job, gradients, worker.chunk, worker.kept[static_cast<std::size_t>(c - first)],
                     worker.scratch, worker.gradient);
    }
  }
  store_state(shape, worker.gradient.state, gradients.initial_state);
}

/// Where the gradient of a tensor goes: to the caller's, or per state head to a float tensor that is summed later.
class GradientTarget {
 public:
  GradientTarget(const MutableTensorView& wanted, std::int64_t heads) : wanted_(wanted), view_(wanted) {
    if (wanted.data == nullptr || wanted.shape[1] == heads) return;
    const std::array<std::int64_t, 4> shape{wanted.shape[0], heads, wanted.shape[2], wanted.shape[3]};
    own_.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
    view_ = mutable_view_of(own_.data(), DType::f32, shape);
  }
  const MutableTensorView& view() const { return view_; }

  /// Sums the state heads that shared a head, in their order.
  void finish(int threads) const {
    if (own_.empty()) return;
    const std::int64_t shared = view_.shape[1] / wanted_.shape[1];
    parallel_for(wanted_.shape[0] * wanted_.shape[1], threads, [&](std::int64_t i, int) {
      const std::int64_t b = i / wanted_.shape[1];
      const std::int64_t h = i % wanted_.shape[1];
      for (std::int64_t n = 0; n < wanted_.shape[2]; ++n) {
        for (std::int64_t d = 0; d < wanted_.shape[3]; ++d) {
          float sum = 0;
          for (std::int64_t member = 0; member < shared; ++member) {
            sum += load_as_float(view_.row(b, h * shared + member, n), DType::f32, d);
          }
          store_from_float(wanted_.row(b, h, n), wanted_.dtype, d, sum);
        }
      }
    });
  }

 private:
  MutableTensorView wanted_;
  MutableTensorView view_;
  std::vector<float> own_;
};

void check_gradient(const MutableTensorView& gradient, const TensorView& of, std::string_view name) {
  if (gradient.data == nullptr) return;
  require(of.data != nullptr, "gradient of {} is wanted, but {} is not given", name, name);
  require(is_attention_dtype(gradient.dtype), "gradient of {} has dtype {}; expected f32, bf16 or f16", name,
          name_of(gradient.dtype));
  require(gradient.shape == of.shape, "gradient of {} has shape [{}]; expected [{}]", name,
          fmt::join(gradient.shape, ", "), fmt::join(of.shape, ", "));
  require(gradient.strides[3] == 1 || gradient.shape[3] == 1,
          "gradient of {} has stride {} on its last axis; expected 1", name, gradient.strides[3]);
  for (std::size_t axis = 0; axis < 3; ++axis) {
    require(gradient.strides.at(axis) != 0 || gradient.shape.at(axis) <= 1,
            "gradient of {} has stride 0 on axis {}; expected one place per element", name, axis);
  }
}

/// Tokens before `skip` are not read: their gradients are 0.
void clear(const MutableTensorView& gradient) {
  if (gradient.data == nullptr) return;
  for (std::int64_t b = 0; b < gradient.shape[0]; ++b) {
    for (std::int64_t h = 0; h < gradient.shape[1]; ++h) {
      for (std::int64_t n = 0; n < gradient.shape[2]; ++n) {
        for (std::int64_t d = 0; d < gradient.shape[3]; ++d)
          store_from_float(gradient.row(b, h, n), gradient.dtype, d, 0);
      }
    }
  }
}

std::vector<HeadGradients> head_gradients(const RecurrentProblem& problem, const TensorView& grad_o,
                                          std::span<const float> initial_state, std::span<const float> grad_final_state,
                                          const RecurrentGradients& gradients) {
  std::vector<HeadGradients> heads;
  const std::int64_t size = problem.head_dim * problem.value_dim;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const SequenceRange range = range_of(problem, s);
    for (std::int64_t h = 0; h < problem.heads; ++h) {
      const std::int64_t at = (s * problem.heads + h) * size;
      const auto rows = [&](const MutableTensorView& view, std::int64_t first) {
        return rows_of(view, problem.heads, h, range.tensor_batch, first);
      };
      heads.push_back(
          {.o = rows_of(grad_o, problem.heads, h, range.tensor_batch, range.first_query),
           .final_state = grad_final_state.empty() ? nullptr : grad_final_state.data() + at,
           .initial_state_of = initial_state.empty() ? nullptr : initial_state.data() + at,
           .q = rows(gradients.q, range.first_query),
           .k = rows(gradients.k, range.first_token),
           .v = rows(gradients.v, range.first_token),
           .decay = rows(gradients.decay, range.first_token),
           .beta = rows(gradients.beta, range.first_token),
           .initial_state = gradients.initial_state.empty() ? nullptr : gradients.initial_state.data() + at});
    }
  }
  return heads;
}

void check_backward(const RecurrentProblem& problem, const RecurrentInputs& inputs,
                    std::span<const float> initial_state, const TensorView& grad_o,
                    std::span<const float> grad_final_state, const RecurrentGradients& gradients) {
  check_tensors(problem, inputs);
  check_output(problem, grad_o, "grad_o");
  for (const auto& [name, count] : {std::pair{"initial_state", initial_state.size()},
                                    {"grad_final_state", grad_final_state.size()},
                                    {"gradient of the initial state", gradients.initial_state.size()}}) {
    require(count == 0 || static_cast<std::int64_t>(count) == problem.state_size(),
            "{} has {} elements; expected 0 or batch x heads x head_dim x value_dim = {}", name, count,
            problem.state_size());
  }
  check_gradient(gradients.q, inputs.q, "q");
  check_gradient(gradients.k, inputs.k, "k");
  check_gradient(gradients.v, inputs.v, "v");
  check_gradient(gradients.decay, inputs.decay, "decay");
  check_gradient(gradients.beta, inputs.beta, "beta");
}

}  // namespace

namespace {

/// From gradients of rows y = factor * x of length 1 those of x.
void through_lengths(std::vector<double>& gradient, const std::vector<double>& unit,
                     const std::vector<double>& factors) {
  const std::size_t width = factors.empty() ? 0 : gradient.size() / factors.size();
  for (std::size_t row = 0; row < factors.size(); ++row) {
    double along = 0;
    for (std::size_t d = row * width; d < (row + 1) * width; ++d) along += unit[d] * gradient[d];
    for (std::size_t d = row * width; d < (row + 1) * width; ++d) {
      gradient[d] = factors[row] * (gradient[d] - unit[d] * along);
    }
  }
}

}  // namespace

void run_reference_backward(const RecurrentProblem& problem, const std::vector<HeadJob>& jobs,
                            const std::vector<HeadGradients>& gradients, int threads) {
  parallel_for(static_cast<std::int64_t>(jobs.size()), threads, [&](std::int64_t i, int) {
    const HeadJob& job = jobs[i];
    const HeadGradients& out = gradients[i];
    const ReferenceHead head = reference_head(problem, job, out.initial_state_of);
    std::vector<double> d_o(static_cast<std::size_t>(job.tokens * problem.value_dim), 0.0);
    for (std::int64_t n = 0; n < job.queries; ++n) {
      for (std::int64_t e = 0; e < problem.value_dim; ++e) {
        d_o[(job.first_query() + n) * problem.value_dim + e] = load_as_float(out.o.row(n), out.o.dtype, e);
      }
    }
    std::vector<double> d_state(head.state.size(), 0.0);
    if (out.final_state != nullptr) std::copy_n(out.final_state, d_state.size(), d_state.begin());
    ReferenceGradients result = reference_backward(head, d_o, d_state);
    if (problem.normalise) {
      RecurrentProblem raw = problem;
      raw.normalise = false;
      ReferenceHead lengths = reference_head(raw, job, nullptr);
      through_lengths(result.q, head.q, normalise_rows(lengths.q, problem.head_dim));
      through_lengths(result.k, head.k, normalise_rows(lengths.k, problem.head_dim));
    }
    const auto narrow = [&](const std::vector<double>& values, std::int64_t skip, std::int64_t width,
                            const OutputRows& rows) {
      if (rows.data == nullptr) return;
      for (std::int64_t t = skip; t < job.tokens; ++t) {
        for (std::int64_t d = 0; d < width; ++d) {
          store_from_float(rows.row(t - skip), rows.dtype, d, static_cast<float>(values[t * width + d]));
        }
      }
    };
    narrow(result.q, job.first_query(), problem.head_dim, out.q);
    narrow(result.k, 0, problem.head_dim, out.k);
    narrow(result.v, 0, problem.value_dim, out.v);
    narrow(result.decay, 0, job.decay_width, out.decay);
    narrow(result.beta, 0, 1, out.beta);
    if (out.initial_state != nullptr) std::copy(result.state.begin(), result.state.end(), out.initial_state);
  });
}

}  // namespace recurrent

void run_recurrent_backward(const RecurrentProblem& problem, const RecurrentInputs& inputs,
                            std::span<const float> initial_state, const TensorView& grad_o,
                            std::span<const float> grad_final_state, const RecurrentGradients& gradients,
                            const RecurrentOptions& options) {
  using namespace recurrent;  // NOLINT(google-build-using-namespace): the parts of this very function
  problem.validate();
  check_options(options);
  check_backward(problem, inputs, initial_state, grad_o, grad_final_state, gradients);
  if (!problem.skip.empty()) {
    for (const MutableTensorView& view : {gradients.k, gradients.v, gradients.decay, gradients.beta}) clear(view);
  }

  const GradientTarget q(gradients.q, problem.heads);
  const GradientTarget k(gradients.k, problem.heads);
  const GradientTarget v(gradients.v, problem.heads);
  const GradientTarget decay(gradients.decay, problem.heads);
  const GradientTarget beta(gradients.beta, problem.heads);
  RecurrentGradients targets = gradients;
  targets.decay = decay.view();
  targets.beta = beta.view();
  targets.q = q.view();
  targets.k = k.view();
  targets.v = v.view();
  const std::vector<HeadJob> jobs = jobs_of(problem, inputs, {}, {});
  const std::vector<HeadGradients> outputs = head_gradients(problem, grad_o, initial_state, grad_final_state, targets);
  const int team = thread_count(options.threads);
  if (options.form == RecurrentForm::reference) {
    check_decays(problem, inputs.decay);
    run_reference_backward(problem, jobs, outputs, team);
  } else {
    const LevelKernels& level = level_of(options.isa.value_or(default_isa()));
    const ChunkShape shape = chunk_shape(problem, inputs, options);
    std::vector<Worker> workers;
    workers.reserve(static_cast<std::size_t>(team));
    const std::vector<std::int64_t> order = longest_first(jobs);
    const std::int64_t longest = chunks_of(shape, jobs[static_cast<std::size_t>(order[0])]);
    const std::int64_t kept = std::clamp<std::int64_t>(longest, 1, kSegment);
    for (int i = 0; i < team; ++i) workers.emplace_back(shape, kept, outputs[0].beta.data != nullptr);
    parallel_for(static_cast<std::int64_t>(jobs.size()), team, [&](std::int64_t i, int thread) {
      const std::int64_t at = order[static_cast<std::size_t>(i)];
      run_head(level, shape, jobs[at], outputs[at], workers[static_cast<std::size_t>(thread)]);
    });
    if (std::any_of(workers.begin(), workers.end(), [](const Worker& w) { return w.scratch.bad_decay != 0; })) {
      check_decays(problem, inputs.decay);
    }
  }
  for (const GradientTarget* target : {&q, &k, &v, &decay, &beta}) target->finish(team);
}

}  // namespace tessera
