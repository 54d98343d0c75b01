#include "methods/linear_branch.h"

#include <algorithm>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "kernels/key_rows.h"
#include "recurrent/memory.h"

namespace tessera {

namespace {

using recurrent::StateList;
using recurrent::TileRows;
using recurrent::TileStateScratch;
using recurrent::TileStateShape;

/// Query tiles whose sums of states exist at a time: bounds memory, and the pieces of states that are summed fit a
/// cache.
constexpr std::int64_t kGroupTiles = 128;
/// Query tiles whose gradients of the projection are added up by one thread: the sums do not depend on the threads.
constexpr std::int64_t kBandTiles = 8;

std::int64_t tiles_of(std::int64_t rows, std::int64_t block) {
  return (rows + block - 1) / block;
}

/// Lists of what sums read, and their memory.
struct Lists {
  std::vector<std::int32_t> states;
  std::vector<StateList> lists;

  /// marked(sum, state) for `sums` sums of `count` states.
  template <class Marked>
  Lists(std::int64_t sums, std::int64_t count, const Marked& marked) {
    states.reserve(static_cast<std::size_t>(sums * count));
    lists.reserve(static_cast<std::size_t>(sums));
    for (std::int64_t s = 0; s < sums; ++s) {
      std::int64_t members = 0;
      for (std::int64_t t = 0; t < count; ++t) members += marked(s, t) ? 1 : 0;
      // The difference loses digits where little is left of the total: only when most are marked.
      const bool all_but = 2 * members > count;
      const std::size_t begin = states.size();
      for (std::int64_t t = 0; t < count; ++t) {
        if (marked(s, t) != all_but) states.push_back(static_cast<std::int32_t>(t));
      }
      lists.push_back({states.data() + begin, static_cast<std::int64_t>(states.size() - begin), all_but});
    }
  }
};

class StateMemory {
 public:
  StateMemory(const TileStateShape& shape, std::int64_t states, Workspace* workspace)
      : floats_(shape.state_floats),
        memory_(workspace, static_cast<std::size_t>(states * shape.state_floats) * sizeof(float)) {}
  float* of(std::int64_t state) const { return reinterpret_cast<float*>(memory_.data()) + state * floats_; }

  void sum(const recurrent::TileStateKernels& kernels, std::int64_t count, const Lists& lists, const StateMemory& out,
           bool add, int threads) const {
    const recurrent::StateSums sums{
        of(0), count, floats_, lists.lists.data(), static_cast<std::int64_t>(lists.lists.size()), out.of(0), add};
    parallel_for(
        floats_ / recurrent::kSumFloats, threads,
        [&](std::int64_t i, int) { kernels.sum(sums, i * recurrent::kSumFloats, (i + 1) * recurrent::kSumFloats); }, 4);
  }

 private:
  std::int64_t floats_;
  kernels::BorrowedBuffer memory_;
};

/// Query rows of a tensor, from token `first` of a sequence on.
template <class View>
auto* query_row(const Problem& problem, const View& view, std::int64_t sequence, std::int64_t head,
                std::int64_t query) {
  return view.row(problem.tensor_batch_of(sequence), head, problem.q_begin_of(sequence) + query);
}

}  // namespace

LearnedProjection::LearnedProjection(std::string_view method, const Problem& problem, const AttentionInputs& inputs) {
  const TensorView* w = inputs.find_side("projection");
  const TensorView* b = inputs.find_side("bias");
  given_ = w != nullptr || b != nullptr;
  const std::int64_t dim = problem.value_dim;
  const TileStateShape shape = recurrent::tile_state_shape(1, dim, FeatureMap::softmax, 0);
  const auto read = [&](const TensorView* view, std::string_view name, std::int64_t rows, std::int64_t padded) {
    require(view == nullptr || (is_attention_dtype(view->dtype) && view->batch() == 1 &&
                                (view->heads() == 1 || view->heads() == problem.q_heads) && view->tokens() == rows &&
                                view->dim() == dim && view->strides[3] == 1),
            "{}: {} is {} [{}]; expected f32, bf16 or f16 [1, 1 or {}, {}, {}]", method, name,
            view == nullptr ? "" : name_of(view->dtype),
            view == nullptr ? std::string() : fmt::format("{}", fmt::join(view->shape, ", ")), problem.q_heads, rows,
            dim);
    std::vector<std::vector<float>> heads(static_cast<std::size_t>(view == nullptr ? 1 : view->heads()));
    for (std::size_t h = 0; h < heads.size(); ++h) {
      heads[h].assign(static_cast<std::size_t>(padded * shape.value_stride), 0.0F);
      for (std::int64_t r = 0; view != nullptr && r < rows; ++r) {
        to_float(view->row(0, static_cast<std::int64_t>(h), r), view->dtype, dim,
                 heads[h].data() + r * shape.value_stride);
      }
    }
    return heads;
  };
  weight_ = read(w, "projection", dim, shape.value_columns);
  bias_ = read(b, "bias", 1, 1);
  for (const std::vector<float>& head : weight_) {
    std::vector<float>& columns = transposed_.emplace_back(head.size(), 0.0F);
    for (std::int64_t in = 0; in < dim; ++in) {
      for (std::int64_t out = 0; out < dim; ++out) {
        columns[static_cast<std::size_t>(out * shape.value_stride + in)] =
            head[static_cast<std::size_t>(in * shape.value_stride + out)];
      }
    }
  }
}

recurrent::Projection LearnedProjection::of(std::int64_t head) const {
  const auto own = [head](const std::vector<std::vector<float>>& heads) {
    return heads[heads.size() == 1 ? 0 : static_cast<std::size_t>(head)].data();
  };
  return {own(weight_), own(transposed_), own(bias_)};
}

LinearBranchGradients::LinearBranchGradients(const Problem& p, const AttentionInputs& inputs, bool projection,
                                             Workspace* workspace) {
  const std::array<std::array<std::int64_t, 4>, 3> shapes{{{inputs.q.batch(), p.q_heads, p.q_len, p.head_dim},
                                                           {inputs.k.batch(), p.kv_heads, p.kv_len, p.head_dim},
                                                           {inputs.v.batch(), p.kv_heads, p.kv_len, p.value_dim}}};
  std::array<std::int64_t, 3> begin{};
  std::int64_t floats = 0;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    begin.at(i) = floats;
    floats += (shapes.at(i)[0] * shapes.at(i)[1] * shapes.at(i)[2] * shapes.at(i)[3] + 15) / 16 * 16;
  }
  memory_ = kernels::BorrowedBuffer(workspace, static_cast<std::size_t>(floats) * sizeof(float));
  auto* memory = reinterpret_cast<float*>(memory_.data());
  d_q = mutable_view_of(memory + begin[0], DType::f32, shapes[0]);
  d_k = mutable_view_of(memory + begin[1], DType::f32, shapes[1]);
  d_v = mutable_view_of(memory + begin[2], DType::f32, shapes[2]);
  if (!projection) return;
  const auto heads = static_cast<std::size_t>(p.q_heads);
  weight.assign(heads, std::vector<double>(static_cast<std::size_t>(p.value_dim * p.value_dim), 0.0));
  bias.assign(heads, std::vector<double>(static_cast<std::size_t>(p.value_dim), 0.0));
}

/// Scratch of one thread, and addresses of the rows of a tile.
class LinearBranch::Worker {
 public:
  Worker(const TileStateShape& shape, std::int64_t rows) {
    recurrent::Arena size;
    place(shape, rows, size);
    arena_ = recurrent::Arena(size.used());
    place(shape, rows, arena_);
  }
  const TileStateScratch& scratch() const { return scratch_; }

  /// row(i) for i < count; valid until the next call with the same `place`, 0 or 1.
  template <class Row>
  TileRows read(std::size_t place, DType dtype, std::int64_t count, const Row& row) {
    std::vector<const std::byte*>& rows = read_.at(place);
    rows.resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) rows[static_cast<std::size_t>(i)] = row(i);
    return {rows.data(), dtype, count};
  }
  TileRows read(std::size_t place, const kernels::KeyRows& from, std::int64_t first, std::int64_t count) {
    return read(place, from.dtype, count, [&](std::int64_t i) { return from.row(first + i); });
  }
  template <class Row>
  recurrent::TileOutputRows write(DType dtype, std::int64_t count, const Row& row) {
    written_.resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) written_[static_cast<std::size_t>(i)] = row(i);
    return {written_.data(), dtype};
  }

 private:
  void place(const TileStateShape& shape, std::int64_t rows, recurrent::Arena& from) {
    scratch_.phi = from.take(rows * shape.key_stride);
    scratch_.d_phi = from.take(rows * shape.key_stride);
    scratch_.o = from.take(rows * shape.value_stride);
    scratch_.d_o = from.take(rows * shape.value_stride);
    scratch_.d_o_in = from.take(rows * shape.value_stride);
    scratch_.panels = from.take(shape.key_columns * shape.value_columns);
    scratch_.inverse = from.take(rows);
    scratch_.vector = from.take(shape.key_columns);
  }

  recurrent::Arena arena_;
  TileStateScratch scratch_{};
  std::array<std::vector<const std::byte*>, 2> read_;
  std::vector<std::byte*> written_;
};

/// The keys of one (sequence, kv head).
struct LinearBranch::Keys {
  std::int64_t sequence;
  std::int64_t kv_head;
  std::int64_t count;
  std::int64_t tiles;
  kernels::KeyRows k;
  kernels::KeyRows v;
};

LinearBranch::LinearBranch(const Problem& problem, const AttentionInputs& inputs, const LinearBranchOptions& options,
                           const RunOptions& run)
    : problem_(problem),
      inputs_(inputs),
      options_(options),
      shape_(recurrent::tile_state_shape(problem.head_dim, problem.value_dim, options.map, options.floor)),
      kernels_(recurrent::level_of(run.isa.value_or(default_isa())).tiles),
      workspace_(run.workspace),
      threads_(thread_count(run.threads)) {}

std::vector<LinearBranch::Worker> LinearBranch::workers() const {
  std::vector<Worker> workers;
  workers.reserve(static_cast<std::size_t>(threads_));
  for (int t = 0; t < threads_; ++t) workers.emplace_back(shape_, std::max(options_.block_q, options_.block_k));
  return workers;
}

template <class Body>
void LinearBranch::for_each_head_of_keys(std::vector<Worker>& workers, const Body& body) const {
  std::int64_t most_keys = 0;
  for (std::int64_t s = 0; s < problem_.batch; ++s) most_keys = std::max(most_keys, problem_.kv_len_of(s));
  const StateMemory states(shape_, tiles_of(most_keys, options_.block_k), workspace_);
  for (std::int64_t s = 0; s < problem_.batch; ++s) {
    for (std::int64_t kv_head = 0; kv_head < problem_.kv_heads; ++kv_head) {
      const Keys keys{s,
                      kv_head,
                      problem_.kv_len_of(s),
                      tiles_of(problem_.kv_len_of(s), options_.block_k),
                      kernels::key_rows_of(problem_, inputs_.k, inputs_.pages, s, kv_head),
                      kernels::key_rows_of(problem_, inputs_.v, inputs_.pages, s, kv_head)};
      parallel_for(keys.tiles, threads_, [&](std::int64_t tile, int thread) {
        Worker& worker = workers[static_cast<std::size_t>(thread)];
        const std::int64_t first = tile * options_.block_k;
        const std::int64_t count = std::min(options_.block_k, keys.count - first);
        kernels_.key_state(shape_, worker.read(0, keys.k, first, count), worker.read(1, keys.v, first, count),
                           states.of(tile), worker.scratch());
      });
      body(keys, states);
    }
  }
}

template <class Body>
void LinearBranch::for_each_group(const Keys& keys, std::span<const MarkedTiles> marked, const Body& body) const {
  const std::int64_t tiles = tiles_of(problem_.q_len_of(keys.sequence), options_.block_q);
  const std::int64_t first_head = keys.kv_head * problem_.group();
  for (std::int64_t head = first_head; head < first_head + problem_.group(); ++head) {
    const MarkedTiles& marks = marked[static_cast<std::size_t>(keys.sequence * problem_.q_heads + head)];
    for (std::int64_t first = 0; first < tiles; first += kGroupTiles) {
      body(head, first, std::min(kGroupTiles, tiles - first), marks);
    }
  }
}

void LinearBranch::add_to(const MutableTensorView& o, std::span<const MarkedTiles> marked,
                          const LearnedProjection& projection) const {
  std::vector<Worker> own = workers();
  const StateMemory read(shape_, std::min(kGroupTiles, tiles_of(problem_.q_len, options_.block_q)), workspace_);
  for_each_head_of_keys(own, [&](const Keys& keys, const StateMemory& states) {
    const std::int64_t s = keys.sequence;
    for_each_group(
        keys, marked, [&](std::int64_t head, std::int64_t first_tile, std::int64_t tiles, const MarkedTiles& marks) {
          const Lists lists(tiles, keys.tiles,
                            [&](std::int64_t q, std::int64_t k) { return marks.at(first_tile + q, k); });
          states.sum(kernels_, keys.tiles, lists, read, false, threads_);
          parallel_for(tiles, threads_, [&](std::int64_t i, int thread) {
            Worker& worker = own[static_cast<std::size_t>(thread)];
            const std::int64_t first = (first_tile + i) * options_.block_q;
            const std::int64_t rows = std::min(options_.block_q, problem_.q_len_of(s) - first);
            const TileRows q = worker.read(0, inputs_.q.dtype, rows, [&](std::int64_t r) {
              return query_row(problem_, inputs_.q, s, head, first + r);
            });
            const recurrent::TileOutputRows to =
                worker.write(o.dtype, rows, [&](std::int64_t r) { return query_row(problem_, o, s, head, first + r); });
            kernels_.query_tile(shape_, q, read.of(i), projection.of(head), to, worker.scratch());
          });
        });
  });
}

void LinearBranch::backward(const TensorView& d_o, std::span<const MarkedTiles> marked,
                            const LearnedProjection& projection, std::span<float> shares,
                            LinearBranchGradients& gradients) const {
  std::vector<Worker> own = workers();
  const std::int64_t most_queries = tiles_of(problem_.q_len, options_.block_q);
  const std::int64_t group = std::min(kGroupTiles, most_queries);
  // The sums that query tiles read become their gradients; those add up to the gradients of the states of key tiles.
  const StateMemory read(shape_, group, workspace_);
  std::int64_t most_keys = 0;
  for (std::int64_t s = 0; s < problem_.batch; ++s) most_keys = std::max(most_keys, problem_.kv_len_of(s));
  const StateMemory d_states(shape_, tiles_of(most_keys, options_.block_k), workspace_);
  const bool learned = !gradients.weight.empty();
  const std::int64_t weight_floats = shape_.value_columns * shape_.value_stride;
  const std::int64_t band_floats = learned ? weight_floats + shape_.value_columns : 0;
  std::vector<float> bands(static_cast<std::size_t>((group + kBandTiles - 1) / kBandTiles * band_floats));
  for_each_head_of_keys(own, [&](const Keys& keys, const StateMemory& states) {
    const std::int64_t s = keys.sequence;
    bool first_group = true;
    for_each_group(keys, marked,
                   [&](std::int64_t head, std::int64_t first_tile, std::int64_t tiles, const MarkedTiles& marks) {
                     const Lists readers(tiles, keys.tiles,
                                         [&](std::int64_t q, std::int64_t k) { return marks.at(first_tile + q, k); });
                     states.sum(kernels_, keys.tiles, readers, read, false, threads_);
                     const std::int64_t used_bands = (tiles + kBandTiles - 1) / kBandTiles;
                     parallel_for(used_bands, threads_, [&](std::int64_t band, int thread) {
                       float* d_weight = learned ? bands.data() + band * band_floats : nullptr;
                       if (learned) std::fill_n(d_weight, band_floats, 0.0F);
                       for (std::int64_t i = band * kBandTiles; i < std::min(tiles, (band + 1) * kBandTiles); ++i) {
                         const std::int64_t first = (first_tile + i) * options_.block_q;
                         query_tile_backward(s, head, first, d_o, projection, read.of(i), d_weight, shares, gradients,
                                             own[static_cast<std::size_t>(thread)]);
                       }
                     });
                     for (std::int64_t band = 0; learned && band < used_bands; ++band) {
                       const float* part = bands.data() + band * band_floats;
                       std::vector<double>& weight = gradients.weight[static_cast<std::size_t>(head)];
                       std::vector<double>& bias = gradients.bias[static_cast<std::size_t>(head)];
                       const std::int64_t dim = problem_.value_dim;
                       for (std::int64_t in = 0; in < dim; ++in) {
                         for (std::int64_t out = 0; out < dim; ++out) {
                           weight[static_cast<std::size_t>(in * dim + out)] += part[in * shape_.value_stride + out];
                         }
                       }
                       for (std::int64_t out = 0; out < dim; ++out)
                         bias[static_cast<std::size_t>(out)] += part[weight_floats + out];
                     }
                     const Lists read_by(keys.tiles, tiles,
                                         [&](std::int64_t k, std::int64_t q) { return marks.at(first_tile + q, k); });
                     read.sum(kernels_, tiles, read_by, d_states, !first_group, threads_);
                     first_group = false;
                   });
    if (first_group) std::fill_n(d_states.of(0), keys.tiles * shape_.state_floats, 0.0F);
    parallel_for(keys.tiles, threads_, [&](std::int64_t tile, int thread) {
      Worker& worker = own[static_cast<std::size_t>(thread)];
      const std::int64_t first = tile * options_.block_k;
      const std::int64_t count = std::min(options_.block_k, keys.count - first);
      const auto row_of = [&](const MutableTensorView& view) {
        return reinterpret_cast<float*>(
            view.row(problem_.tensor_batch_of(s), keys.kv_head, problem_.kv_begin_of(s) + first));
      };
      kernels_.key_tile_backward(shape_, worker.read(0, keys.k, first, count), worker.read(1, keys.v, first, count),
                                 d_states.of(tile), row_of(gradients.d_k), row_of(gradients.d_v), worker.scratch());
    });
  });
}

void LinearBranch::query_tile_backward(std::int64_t sequence, std::int64_t head, std::int64_t first,
                                       const TensorView& d_o, const LearnedProjection& projection, float* state,
                                       float* d_weight, std::span<float> shares, LinearBranchGradients& gradients,
                                       Worker& worker) const {
  const std::int64_t rows = std::min(options_.block_q, problem_.q_len_of(sequence) - first);
  const std::int64_t share = (problem_.tensor_batch_of(sequence) * problem_.q_heads + head) * problem_.q_len +
                             problem_.q_begin_of(sequence) + first;
  const auto rows_of = [&](std::size_t place, const TensorView& view) {
    return worker.read(place, view.dtype, rows,
                       [&](std::int64_t r) { return query_row(problem_, view, sequence, head, first + r); });
  };
  recurrent::QueryTileGradient tile;
  tile.q = rows_of(0, inputs_.q);
  tile.d_o = rows_of(1, d_o);
  tile.state = state;
  tile.d_q = reinterpret_cast<float*>(query_row(problem_, gradients.d_q, sequence, head, first));
  tile.shares = shares.data() + share;
  tile.d_weight = d_weight;
  tile.d_bias = d_weight == nullptr ? nullptr : d_weight + shape_.value_columns * shape_.value_stride;
  kernels_.query_tile_backward(shape_, tile, projection.of(head), worker.scratch());
}

}  // namespace tessera
