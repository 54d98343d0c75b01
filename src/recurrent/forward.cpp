// run_recurrent: how a call is divided among threads. Every way gives the same bits.
#include <algorithm>

#include "core/error.h"
#include "core/parallel.h"
#include "recurrent/memory.h"
#include "recurrent/reference.h"

namespace tessera {

namespace recurrent {

namespace {

/// Up to here a call goes token by token: a chunk costs about as much as this many tokens (measured).
constexpr std::int64_t kStepwiseTokens = 8;
/// Chunks of one head that are prepared ahead when threads share a head.
constexpr std::int64_t kBand = 16;

class Threads {
 public:
  Threads(const ChunkShape& shape, int count) {
    for (int i = 0; i < count; ++i) {
      Arena size;
      Scratch scratch;
      place(shape, size, scratch);
      arenas_.emplace_back(size.used());
      place(shape, arenas_.back(), scratch);
      scratch_.push_back(scratch);
    }
  }
  Scratch& of(int thread) { return scratch_[static_cast<std::size_t>(thread)]; }
  bool found_bad_decay() const {
    return std::any_of(scratch_.begin(), scratch_.end(), [](const Scratch& s) { return s.bad_decay != 0; });
  }

 private:
  std::vector<Arena> arenas_;
  std::vector<Scratch> scratch_;
};

/// Chunks with their memory.
class Chunks {
 public:
  Chunks(const ChunkShape& shape, std::int64_t count) : chunks_(static_cast<std::size_t>(count)) {
    Arena size;
    Chunk chunk{};
    place(shape, false, size, chunk);
    arena_ = Arena(size.used() * count);
    for (Chunk& c : chunks_) place(shape, false, arena_, c);
  }
  Chunk& operator[](std::int64_t i) { return chunks_[static_cast<std::size_t>(i)]; }

 private:
  Arena arena_;
  std::vector<Chunk> chunks_;
};

/// A thread takes a head from its first chunk to its last; what a chunk needs stays in its caches.
void run_heads(const LevelKernels& level, const ChunkShape& shape, const std::vector<HeadJob>& jobs, Threads& threads,
               int team) {
  const std::vector<std::int64_t> order = longest_first(jobs);
  Chunks chunks(shape, team);
  parallel_for(static_cast<std::int64_t>(jobs.size()), team, [&](std::int64_t i, int thread) {
    const HeadJob& job = jobs[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])];
    Scratch& scratch = threads.of(thread);
    Chunk& chunk = chunks[thread];
    load_state(shape, job.state, scratch.state);
    for (std::int64_t c = 0; c < chunks_of(shape, job); ++c) {
      set_range(shape, job, c, chunk);
      level.prepare(shape, job, Purpose::outputs, chunk, scratch);
      level.advance(shape, job, chunk, scratch.state, 0, shape.value_columns, scratch);
    }
    store_state(shape, scratch.state, job.state);
  });
}

/// Fewer heads than threads: chunks are prepared by all, then each head's value columns are shared out.
void run_bands(const LevelKernels& level, const ChunkShape& shape, const std::vector<HeadJob>& jobs, Threads& threads,
               int team, RecurrentSchedule schedule) {
  const auto heads = static_cast<std::int64_t>(jobs.size());
  Chunks chunks(shape, heads * kBand);
  const bool parallel = schedule == RecurrentSchedule::parallel;
  const std::int64_t size = state_floats(shape);
  Arena states(heads * size);
  Arena entries(parallel ? heads * kBand * size : 0);
  float* state = states.take(heads * size);
  float* entry = entries.take(heads * kBand * size);
  std::int64_t longest = 0;
  for (std::int64_t h = 0; h < heads; ++h) {
    load_state(shape, jobs[h].state, state + h * size);
    longest = std::max(longest, chunks_of(shape, jobs[h]));
  }
  const std::int64_t panels = shape.value_columns / 16;
  const std::int64_t slabs = std::min(panels, (team + heads - 1) / heads);

  for (std::int64_t band = 0; band < longest; band += kBand) {
    const auto count = [&](std::int64_t h) {
      return std::clamp<std::int64_t>(chunks_of(shape, jobs[h]) - band, 0, kBand);
    };
    parallel_for(heads * kBand, team, [&](std::int64_t i, int thread) {
      const HeadJob& job = jobs[i / kBand];
      if (i % kBand >= count(i / kBand)) return;
      set_range(shape, job, band + i % kBand, chunks[i]);
      level.prepare(shape, job, Purpose::outputs, chunks[i], threads.of(thread));
      if (parallel) level.write(shape, job, chunks[i], entry + i * size, threads.of(thread));
    });
    if (!parallel) {
      parallel_for(heads * slabs, team, [&](std::int64_t i, int thread) {
        const std::int64_t h = i / slabs;
        const std::int64_t first = panels * (i % slabs) / slabs * 16;
        const std::int64_t last = panels * (i % slabs + 1) / slabs * 16;
        for (std::int64_t c = 0; c < count(h); ++c) {
          level.advance(shape, jobs[h], chunks[h * kBand + c], state + h * size, first, last, threads.of(thread));
        }
      });
      continue;
    }
    // What each chunk wrote becomes the state it found.
    parallel_for(heads * shape.head_dim, team, [&](std::int64_t i, int) {
      const std::int64_t h = i / shape.head_dim;
      const std::int64_t d = i % shape.head_dim;
      float* running = state + h * size + d * shape.value_stride;
      for (std::int64_t c = 0; c < count(h); ++c) {
        float* row = entry + (h * kBand + c) * size + d * shape.value_stride;
        const float total = chunks[h * kBand + c].total[d];
        for (std::int64_t e = 0; e < shape.value_columns; ++e) {
          const float written = row[e];
          row[e] = running[e];
          running[e] = total * running[e] + written;
        }
      }
    });
    parallel_for(heads * kBand, team, [&](std::int64_t i, int thread) {
      if (i % kBand < count(i / kBand)) {
        level.read(shape, jobs[i / kBand], chunks[i], entry + i * size, threads.of(thread));
      }
    });
  }
  for (std::int64_t h = 0; h < heads; ++h) store_state(shape, state + h * size, jobs[h].state);
}

void run_steps(const LevelKernels& level, const ChunkShape& shape, const std::vector<HeadJob>& jobs, Threads& threads,
               int team) {
  const auto heads = static_cast<std::int64_t>(jobs.size());
  const std::vector<std::int64_t> order = longest_first(jobs);
  const std::int64_t stripes = (shape.value_dim + 31) / 32;
  const std::int64_t slabs = std::min(stripes, (team + heads - 1) / heads);
  const std::int64_t size = shape.head_dim * shape.value_dim;
  // Without states of the caller's the slabs of a head still share one.
  std::vector<float> own(jobs[0].state == nullptr ? static_cast<std::size_t>(heads * size) : 0);
  parallel_for(heads * slabs, team, [&](std::int64_t i, int thread) {
    const std::int64_t h = order[static_cast<std::size_t>(i / slabs)];
    const HeadJob& job = jobs[h];
    float* state = job.state != nullptr ? job.state : own.data() + h * size;
    level.step(shape, job, state, stripes * (i % slabs) / slabs * 32, stripes * (i % slabs + 1) / slabs * 32,
               threads.of(thread));
  });
}

}  // namespace

void run_reference(const RecurrentProblem& problem, const std::vector<HeadJob>& jobs, int threads) {
  parallel_for(static_cast<std::int64_t>(jobs.size()), threads, [&](std::int64_t i, int) {
    const HeadJob& job = jobs[i];
    const ReferenceHead head = reference_head(problem, job, job.state);
    const ReferenceResult result = reference_forward(head);
    const std::int64_t width = problem.value_dim;
    for (std::int64_t n = 0; n < job.queries; ++n) {
      for (std::int64_t e = 0; e < width; ++e) {
        store_from_float(job.o.row(n), job.o.dtype, e,
                         static_cast<float>(result.o[(job.first_query() + n) * width + e]));
      }
    }
    if (job.state != nullptr) std::copy(result.state.begin(), result.state.end(), job.state);
  });
}

}  // namespace recurrent

void run_recurrent(const RecurrentProblem& problem, const RecurrentInputs& inputs, std::span<float> state,
                   const MutableTensorView& o, const RecurrentOptions& options) {
  using namespace recurrent;  // NOLINT(google-build-using-namespace): the parts of this very function
  problem.validate();
  check_options(options);
  check_tensors(problem, inputs);
  check_output(problem, o, "o");
  require(state.empty() || static_cast<std::int64_t>(state.size()) == problem.state_size(),
          "state has {} elements; expected 0 or batch x heads x head_dim x value_dim = {}", state.size(),
          problem.state_size());
  require(options.schedule == RecurrentSchedule::loop || inputs.beta.data == nullptr,
          "schedule is parallel; with a delta rule (beta) the states depend on each other, expected loop");
  const std::vector<HeadJob> jobs = jobs_of(problem, inputs, state, o);
  std::int64_t longest = 0;
  for (const HeadJob& job : jobs) longest = std::max(longest, job.tokens);
  if (longest == 0) return;
  if (options.form == RecurrentForm::reference) {
    check_decays(problem, inputs.decay);
    run_reference(problem, jobs, options.threads);
    return;
  }

  const LevelKernels& level = level_of(options.isa.value_or(default_isa()));
  const ChunkShape shape = chunk_shape(problem, inputs, options);
  const int team = thread_count(options.threads);
  Threads threads(shape, team);
  const bool stepwise = options.form == RecurrentForm::stepwise ||
                        (options.form == RecurrentForm::automatic && longest <= kStepwiseTokens);
  if (stepwise) {
    check_decays(problem, inputs.decay);
    run_steps(level, shape, jobs, threads, team);
  } else if (options.schedule == RecurrentSchedule::parallel || static_cast<int>(jobs.size()) < team) {
    run_bands(level, shape, jobs, threads, team, options.schedule);
  } else {
    run_heads(level, shape, jobs, threads, team);
  }
  if (threads.found_bad_decay()) check_decays(problem, inputs.decay);
}

}  // namespace tessera
