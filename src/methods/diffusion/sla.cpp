// SLA, Sparse-Linear Attention (arXiv:2509.24006): few key tiles by softmax, most of the rest by linear attention.
//
// Per head and query tile, key tiles are ranked by mean query times mean key. The top `critical` share is attended to
// exactly, under a softmax of its own; the bottom `negligible` share is left out; the marginal tiles between them go
// through linear attention (linear_branch.h). O = O_sparse + O_linear W + b, with W [value_dim, value_dim] and b
// learned and zero at first: without the side inputs `projection` and `bias` the method is its sparse branch.
//
// scope=all is the authors' later code: the linear branch reads every key, with 1e-5 in the denominator. Ranking needs
// neither the smoothing of K (a shift of all keys moves a row's scores alike), nor scale and softmax (monotone). The
// reference does not guard a critical count of 0; here one tile is always critical. Attention is bidirectional.
//
// Backward: the selection is a constant. The sparse branch needs of its own output only dO . O_sparse, which is what
// dO . (O_linear W + b) leaves of dO . O: a gradient of its LSE, so that the saved output and LSE are enough. Without a
// saved LSE the sparse branch is run again. Without W, b and their gradients there is no linear branch.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "methods/linear_branch.h"
#include "methods/registry.h"
#include "score/plan_rows.h"
#include "score/pooled_tiles.h"
#include "score/product.h"
#include "score/row_access.h"
#include "score/top_k.h"

namespace tessera {
namespace {

enum class Scope : std::uint8_t { marginal, all };

/// Added to the denominator where the linear branch reads every key.
constexpr float kDenominatorFloor = 1e-5F;

/// out [columns][rows] of in [rows][columns].
std::vector<float> transposed(const float* in, std::int64_t rows, std::int64_t columns) {
  std::vector<float> out(static_cast<std::size_t>(rows * columns));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) out[static_cast<std::size_t>(c * rows + r)] = in[r * columns + c];
  }
  return out;
}

/// The learned projection of the linear branch, per query head.
struct Projection {
  bool given = false;
  std::vector<std::vector<float>> weight;      ///< [heads or 1] of [in][out]
  std::vector<std::vector<float>> transposed;  ///< [heads or 1] of [out][in]
  std::vector<std::vector<float>> bias;        ///< [heads or 1] of [out]

  Projection(const Problem& problem, const AttentionInputs& inputs) {
    const TensorView* w = inputs.find_side("projection");
    const TensorView* b = inputs.find_side("bias");
    const std::int64_t dim = problem.value_dim;
    check(problem, w, "projection", dim);
    check(problem, b, "bias", 1);
    given = w != nullptr || b != nullptr;
    const auto read = [&](const TensorView* view, std::int64_t rows) {
      std::vector<std::vector<float>> heads(static_cast<std::size_t>(view == nullptr ? 1 : view->heads()));
      for (std::size_t h = 0; h < heads.size(); ++h) {
        heads[h].assign(static_cast<std::size_t>(rows * dim), 0.0F);
        for (std::int64_t i = 0; view != nullptr && i < rows * dim; ++i) {
          heads[h][static_cast<std::size_t>(i)] =
              load_as_float(view->row(0, static_cast<std::int64_t>(h), i / dim), view->dtype, i % dim);
        }
      }
      return heads;
    };
    weight = read(w, dim);
    bias = read(b, 1);
    for (const auto& head : weight) transposed.push_back(tessera::transposed(head.data(), dim, dim));
  }

  static void check(const Problem& problem, const TensorView* view, std::string_view name, std::int64_t rows) {
    if (view == nullptr) return;
    require(is_attention_dtype(view->dtype) && view->batch() == 1 &&
                (view->heads() == 1 || view->heads() == problem.q_heads) && view->tokens() == rows &&
                view->dim() == problem.value_dim && view->strides[3] == 1,
            "sla: {} is {} [{}]; expected f32, bf16 or f16 [1, 1 or {}, {}, {}]", name, name_of(view->dtype),
            fmt::join(view->shape, ", "), problem.q_heads, rows, problem.value_dim);
  }
  static std::size_t of(const std::vector<std::vector<float>>& heads, std::int64_t head) {
    return heads.size() == 1 ? 0 : static_cast<std::size_t>(head);
  }
  const float* weight_of(std::int64_t head) const { return weight[of(weight, head)].data(); }
  const float* transposed_of(std::int64_t head) const { return transposed[of(transposed, head)].data(); }
  const float* bias_of(std::int64_t head) const { return bias[of(bias, head)].data(); }
};

class SparseLinear {
 public:
  struct Params {
    std::int64_t block_q = 64;
    std::int64_t block_k = 64;
    double critical = 0.05;
    double negligible = 0.1;
    Scope scope = Scope::marginal;
    FeatureMap map = FeatureMap::softmax;
    void visit(ParameterList& v) {
      v("block_q", block_q, 1, 1024, "tokens of a query tile");
      v("block_k", block_k, 1, 1024, "tokens of a key tile");
      v("critical", critical, 0, 1, "share of the key tiles that are attended to exactly, one at least");
      v("negligible", negligible, 0, 1, "share of the key tiles that are left out");
      v("scope", scope, {"marginal", "all"}, "what the linear branch reads: the tiles between, or every key");
      v("map", map, {"softmax", "elu", "relu"}, "feature map of the linear branch, over channels");
    }
  };
  static MethodInfo info() {
    const std::vector<SideAxis> square{SideAxis::one, SideAxis::one, SideAxis::value_dim, SideAxis::value_dim};
    return {.name = "sla",
            .family = "diffusion",
            .summary = "critical tiles by softmax, marginal tiles by linear attention, negligible tiles not at all",
            .paper =
                "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention, "
                "arXiv:2509.24006",
            .phases = {.prefill = true, .decode = false, .backward = true},
            .domain = {.causal = false, .reason = "the linear branch sums over whole key tiles"},
            .budget = {{"critical", 0, 0.9}},
            .side = {{.name = "projection",
                      .axes = square,
                      .minimum = -0.1,
                      .maximum = 0.1,
                      .required = false,
                      .description = "W of the linear branch, [in, out], for all heads or per head; absent: zero"},
                     {.name = "bias",
                      .axes = {SideAxis::one, SideAxis::one, SideAxis::one, SideAxis::value_dim},
                      .minimum = -0.1,
                      .maximum = 0.1,
                      .required = false,
                      .description = "b of the linear branch; absent: zero"}}};
  }

  explicit SparseLinear(Params params) : params_(params) {
    require(params_.critical + params_.negligible <= 1 + 1e-9,
            "sla: critical={} and negligible={} are more than all tiles; expected a sum of at most 1", params_.critical,
            params_.negligible);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    require_supported(inputs);
    score::PlanRows rows(problem, params_.block_q, params_.block_k, problem.q_heads);
    const Means means(problem, inputs, params_, context.run.threads);
    rows.for_each_band(16, context.run.threads, [&](std::int64_t block, std::int64_t first, std::int64_t count, int) {
      const score::QueryTiles tiles = rows.geometry(block);
      if (tiles.key_tiles() == 0) return;
      for (std::int64_t tile = first; tile < first + count; ++tile) {
        const std::vector<float> scores = means.scores(block, tile);
        rows.row(block, tile).selected_tiles(tiles, tile, score::top_k(scores, critical_of(tiles.key_tiles())));
      }
    });
    return std::move(rows).finish(context.run.threads);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const auto start = std::chrono::steady_clock::now();
    Plan decided = plan(problem, inputs, context);
    const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
    RunReport report = run(decided, inputs, outputs, context.run);
    report.plan_ms = planned.count();
    const Projection projection(problem, inputs);
    if (projection.given) {
      const auto linear_start = std::chrono::steady_clock::now();
      add_linear_branch(problem, inputs, projection, outputs, context);
      report.kernel_ms +=
          std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - linear_start).count();
    }
    if (executed != nullptr) *executed = std::move(decided);
    return report;
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* executed) const {
    const auto start = std::chrono::steady_clock::now();
    std::optional<Plan> decided;
    if (executed == nullptr) decided = plan(problem, inputs, context);
    const Plan& sparse = executed != nullptr ? *executed : *decided;
    SavedForward of_sparse = saved;
    std::vector<float> o;
    std::vector<float> lse;
    if (saved.lse.empty()) {
      const std::array<std::int64_t, 4> shape{inputs.q.batch(), problem.q_heads, problem.q_len, problem.value_dim};
      lse.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2]));
      o.resize(lse.size() * static_cast<std::size_t>(problem.value_dim));
      run(sparse, inputs, {mutable_view_of(o.data(), DType::f32, shape), lse}, context.run);
      of_sparse.o = view_of(o.data(), DType::f32, shape);
      of_sparse.lse = lse;
    }
    Gradients own;
    own.d_q = gradients.d_q;
    own.d_k = gradients.d_k;
    own.d_v = gradients.d_v;
    const Projection projection(problem, inputs);
    const auto wanted = [&](std::string_view name) {
      const MutableTensorView* side = gradients.find_side(name);
      return side != nullptr && side->data != nullptr;
    };
    RunReport report;
    if (projection.given || wanted("projection") || wanted("bias")) {
      const Buffers linear(problem, inputs);
      LinearGradients learned(problem);
      std::vector<float> d_lse(static_cast<std::size_t>(inputs.q.batch() * problem.q_heads * problem.q_len), 0.0F);
      require(saved.d_lse.empty() || saved.d_lse.size() == d_lse.size(), "sla: d_lse has {} elements; expected {}",
              saved.d_lse.size(), d_lse.size());
      linear_backward(problem, inputs, projection, saved.d_o, linear, d_lse, learned, context);
      for (std::size_t i = 0; i < saved.d_lse.size(); ++i) d_lse[i] += saved.d_lse[i];
      if (!saved.lse.empty()) of_sparse.d_lse = d_lse;
      const Buffers part(problem, inputs);
      own.d_q = part.d_q;
      own.d_k = part.d_k;
      own.d_v = part.d_v;
      report = run_backward(sparse, inputs, of_sparse, own, context.run);
      write_sum(part.d_q, linear.d_q, gradients.d_q, context.run.threads);
      write_sum(part.d_k, linear.d_k, gradients.d_k, context.run.threads);
      write_sum(part.d_v, linear.d_v, gradients.d_v, context.run.threads);
      write_side(problem, learned.weight, gradients.find_side("projection"), problem.value_dim);
      write_side(problem, learned.bias, gradients.find_side("bias"), 1);
    } else {
      report = run_backward(sparse, inputs, of_sparse, own, context.run);
    }
    report.kernel_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    return report;
  }

 private:
  /// Mean queries and keys of every tile, for the ranking.
  struct Means {
    std::int64_t dim;
    std::int64_t q_heads;
    std::int64_t group;
    std::vector<std::vector<float>> queries;  ///< [sequence * q_heads + head] of [tiles][dim]
    std::vector<std::vector<float>> keys;     ///< [sequence * kv_heads + head] of [tiles][dim]

    Means(const Problem& problem, const AttentionInputs& inputs, const Params& params, int threads)
        : dim(problem.head_dim),
          q_heads(problem.q_heads),
          group(problem.group()),
          queries(static_cast<std::size_t>(problem.batch * problem.q_heads)),
          keys(static_cast<std::size_t>(problem.batch * problem.kv_heads)) {
      parallel_for(static_cast<std::int64_t>(queries.size()), threads, [&](std::int64_t i, int) {
        queries[static_cast<std::size_t>(i)] =
            score::pool_queries(problem, inputs, i / q_heads, i % q_heads, params.block_q, score::LastTile::real_rows);
      });
      parallel_for(static_cast<std::int64_t>(keys.size()), threads, [&](std::int64_t i, int) {
        keys[static_cast<std::size_t>(i)] = score::pool_keys(
            problem, inputs, i / problem.kv_heads, i % problem.kv_heads, params.block_k, score::LastTile::real_rows);
      });
    }

    /// Scores of all key tiles for a query tile of (sequence, query head) `block`.
    std::vector<float> scores(std::int64_t block, std::int64_t tile) const {
      const std::int64_t kv = block / q_heads * (q_heads / group) + block % q_heads / group;
      const std::vector<float>& k = keys[static_cast<std::size_t>(kv)];
      const auto count = static_cast<std::int64_t>(k.size()) / dim;
      std::vector<float> out(static_cast<std::size_t>(count));
      score::multiply_transposed(queries[static_cast<std::size_t>(block)].data() + tile * dim, 1, dim, k.data(), count,
                                 dim, dim, 1, out.data(), count);
      return out;
    }
  };

  /// Float gradients of one branch, contiguous [B, H, N, D], zero at first.
  struct Buffers {
    std::vector<float> q, k, v;
    MutableTensorView d_q, d_k, d_v;

    Buffers(const Problem& p, const AttentionInputs& inputs) {
      d_q = make(q, {inputs.q.batch(), p.q_heads, p.q_len, p.head_dim});
      d_k = make(k, {inputs.k.batch(), p.kv_heads, p.kv_len, p.head_dim});
      d_v = make(v, {inputs.v.batch(), p.kv_heads, p.kv_len, p.value_dim});
    }
    static MutableTensorView make(std::vector<float>& memory, const std::array<std::int64_t, 4>& shape) {
      memory.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
      return mutable_view_of(memory.data(), DType::f32, shape);
    }
  };

  /// Gradients of projection [heads][in][out] and bias [heads][out].
  struct LinearGradients {
    std::vector<std::vector<double>> weight;
    std::vector<std::vector<double>> bias;
    explicit LinearGradients(const Problem& p)
        : weight(static_cast<std::size_t>(p.q_heads),
                 std::vector<double>(static_cast<std::size_t>(p.value_dim * p.value_dim), 0.0)),
          bias(static_cast<std::size_t>(p.q_heads), std::vector<double>(static_cast<std::size_t>(p.value_dim), 0.0)) {}
  };

  /// The linear branch of one query tile.
  struct LinearTile {
    std::vector<float> x;        ///< [rows][dim] queries
    std::vector<float> phi;      ///< [rows][dim]
    std::vector<float> matrix;   ///< [value_dim][dim]
    std::vector<float> vector;   ///< [dim]
    std::vector<float> inverse;  ///< [rows] 1 / denominator; 0 where no tile is marked
    std::vector<float> o;        ///< [rows][value_dim], before the projection
  };

  static void require_supported(const AttentionInputs& inputs) {
    require(!inputs.modifiers.changes_scores() && inputs.modifiers.sink_logits.empty(),
            "sla: the linear branch knows no modifiers of scores; expected none");
  }

  std::int64_t critical_of(std::int64_t tiles) const {
    return std::max<std::int64_t>(1, static_cast<std::int64_t>(params_.critical * static_cast<double>(tiles)));
  }

  /// 1 for the tiles that the linear branch of a query tile reads.
  std::vector<std::uint8_t> marked_tiles(const Means& means, std::int64_t block, std::int64_t tile,
                                         std::int64_t tiles) const {
    std::vector<std::uint8_t> marked(static_cast<std::size_t>(tiles), 1);
    if (params_.scope == Scope::all || tiles == 0) return marked;
    std::vector<float> scores = means.scores(block, tile);
    for (const std::int32_t j : score::top_k(scores, critical_of(tiles))) marked[static_cast<std::size_t>(j)] = 0;
    const std::int64_t left = tiles - critical_of(tiles);
    const auto skipped = std::min(left, static_cast<std::int64_t>(params_.negligible * static_cast<double>(tiles)));
    // The lowest: the best of the negated scores, critical tiles out of the way.
    for (std::size_t j = 0; j < scores.size(); ++j) {
      scores[j] = marked[j] != 0 ? -scores[j] : -std::numeric_limits<float>::infinity();
    }
    for (const std::int32_t j : score::top_k(scores, skipped)) marked[static_cast<std::size_t>(j)] = 0;
    return marked;
  }

  /// H_b and z_b of every key tile of a kv head.
  TileStates key_states(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                        std::int64_t kv_head, int threads) const {
    const std::int64_t keys = problem.kv_len_of(sequence);
    const std::int64_t dim = problem.head_dim;
    const std::int64_t value_dim = problem.value_dim;
    TileStates states((keys + params_.block_k - 1) / params_.block_k, dim, value_dim);
    parallel_for(states.tiles(), threads, [&](std::int64_t tile, int) {
      const std::int64_t first = tile * params_.block_k;
      const std::int64_t count = std::min(params_.block_k, keys - first);
      std::vector<float> k(static_cast<std::size_t>(count * dim));
      std::vector<float> v(static_cast<std::size_t>(count * value_dim));
      score::load_keys(problem, inputs, sequence, kv_head, first, count, k.data());
      score::load_values(problem, inputs, sequence, kv_head, first, count, v.data());
      apply_feature_map(params_.map, count, dim, k.data());
      const std::vector<float> k_columns = transposed(k.data(), count, dim);
      const std::vector<float> v_columns = transposed(v.data(), count, value_dim);
      score::multiply_transposed(v_columns.data(), value_dim, count, k_columns.data(), dim, count, count, 1,
                                 states.matrix(tile), dim);
      float* sums = states.vector(tile);
      for (std::int64_t i = 0; i < count; ++i) {
        for (std::int64_t d = 0; d < dim; ++d) sums[d] += k[static_cast<std::size_t>(i * dim + d)];
      }
    });
    states.add_up();
    return states;
  }

  LinearTile linear_tile(const Problem& problem, const AttentionInputs& inputs, const TileStates& states,
                         std::span<const std::uint8_t> marked, std::int64_t sequence, std::int64_t head,
                         std::int64_t first, std::int64_t rows) const {
    const std::int64_t dim = problem.head_dim;
    const std::int64_t value_dim = problem.value_dim;
    LinearTile tile;
    tile.x.resize(static_cast<std::size_t>(rows * dim));
    tile.matrix.resize(static_cast<std::size_t>(value_dim * dim));
    tile.vector.resize(static_cast<std::size_t>(dim));
    tile.inverse.resize(static_cast<std::size_t>(rows));
    tile.o.resize(static_cast<std::size_t>(rows * value_dim));
    score::load_queries(problem, inputs, sequence, head, first, rows, tile.x.data());
    tile.phi = tile.x;
    apply_feature_map(params_.map, rows, dim, tile.phi.data());
    states.sum(marked, tile.matrix.data(), tile.vector.data());
    score::multiply_transposed(tile.phi.data(), rows, dim, tile.matrix.data(), value_dim, dim, dim, 1, tile.o.data(),
                               value_dim);
    for (std::int64_t r = 0; r < rows; ++r) {
      float denominator = params_.scope == Scope::all ? kDenominatorFloor : 0.0F;
      for (std::int64_t d = 0; d < dim; ++d) {
        denominator += tile.phi[static_cast<std::size_t>(r * dim + d)] * tile.vector[static_cast<std::size_t>(d)];
      }
      const float inverse = denominator == 0 ? 0.0F : 1 / denominator;
      tile.inverse[static_cast<std::size_t>(r)] = inverse;
      for (std::int64_t d = 0; d < value_dim; ++d) tile.o[static_cast<std::size_t>(r * value_dim + d)] *= inverse;
    }
    return tile;
  }

  /// body(sequence, query head, first query, rows, query tile, states of its keys, marked tiles).
  template <class Body>
  void for_each_tile(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context,
                     const Body& body) const {
    const Means means(problem, inputs, params_, context.run.threads);
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      const std::int64_t queries = problem.q_len_of(s);
      const std::int64_t tiles = (queries + params_.block_q - 1) / params_.block_q;
      for (std::int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
        const TileStates states = key_states(problem, inputs, s, kv_head, context.run.threads);
        parallel_for(tiles * problem.group(), context.run.threads, [&](std::int64_t i, int) {
          const std::int64_t head = kv_head * problem.group() + i / tiles;
          const std::int64_t tile = i % tiles;
          const std::int64_t first = tile * params_.block_q;
          body(s, head, first, std::min(params_.block_q, queries - first), tile, states,
               marked_tiles(means, s * problem.q_heads + head, tile, states.tiles()));
        });
      }
    }
  }

  void add_linear_branch(const Problem& problem, const AttentionInputs& inputs, const Projection& projection,
                         const AttentionOutputs& outputs, const PlanContext& context) const {
    const std::int64_t dim = problem.value_dim;
    for_each_tile(problem, inputs, context,
                  [&](std::int64_t s, std::int64_t head, std::int64_t first, std::int64_t rows, std::int64_t,
                      const TileStates& states, const std::vector<std::uint8_t>& marked) {
                    const LinearTile tile = linear_tile(problem, inputs, states, marked, s, head, first, rows);
                    std::vector<float> projected(static_cast<std::size_t>(rows * dim));
                    score::multiply_transposed(tile.o.data(), rows, dim, projection.transposed_of(head), dim, dim, dim,
                                               1, projected.data(), dim);
                    const float* bias = projection.bias_of(head);
                    for (std::int64_t r = 0; r < rows; ++r) {
                      std::byte* row =
                          outputs.o.row(problem.tensor_batch_of(s), head, problem.q_begin_of(s) + first + r);
                      for (std::int64_t d = 0; d < dim; ++d) {
                        const float value = load_as_float(row, outputs.o.dtype, d) +
                                            projected[static_cast<std::size_t>(r * dim + d)] + bias[d];
                        store_from_float(row, outputs.o.dtype, d, value);
                      }
                    }
                  });
  }

  /// Adds the linear branch's gradients to the buffers, and dO . (O_linear W + b) to `shares`, laid out like an LSE. dH
  /// and dz of every query tile are kept, because a key tile
  /// needs the sum over the query tiles that marked it.
  void linear_backward(const Problem& problem, const AttentionInputs& inputs, const Projection& projection,
                       const TensorView& d_o, const Buffers& own, std::span<float> shares, LinearGradients& linear,
                       const PlanContext& context) const {
    const std::int64_t dim = problem.head_dim;
    const std::int64_t value_dim = problem.value_dim;
    const Means means(problem, inputs, params_, context.run.threads);
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      const std::int64_t queries = problem.q_len_of(s);
      const std::int64_t query_tiles = (queries + params_.block_q - 1) / params_.block_q;
      for (std::int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
        const TileStates states = key_states(problem, inputs, s, kv_head, context.run.threads);
        for (std::int64_t head = kv_head * problem.group(); head < (kv_head + 1) * problem.group(); ++head) {
          TileStates d_states(query_tiles, dim, value_dim);
          // [key tile][query tile]: the transpose of what query tiles marked.
          std::vector<std::vector<std::uint8_t>> marked_by(
              static_cast<std::size_t>(states.tiles()),
              std::vector<std::uint8_t>(static_cast<std::size_t>(query_tiles), 0));
          std::vector<std::vector<float>> d_weight(static_cast<std::size_t>(query_tiles));
          parallel_for(query_tiles, context.run.threads, [&](std::int64_t tile, int) {
            const auto marked = marked_tiles(means, s * problem.q_heads + head, tile, states.tiles());
            for (std::size_t j = 0; j < marked.size(); ++j) marked_by[j][static_cast<std::size_t>(tile)] = marked[j];
            const std::int64_t first = tile * params_.block_q;
            const std::int64_t rows = std::min(params_.block_q, queries - first);
            d_weight[static_cast<std::size_t>(tile)] =
                query_tile_backward(problem, inputs, projection, d_o, states, marked, s, head, first, rows,
                                    d_states.matrix(tile), d_states.vector(tile), own, shares);
          });
          // In order of the tiles: the sums do not depend on threads.
          auto& weight = linear.weight[static_cast<std::size_t>(head)];
          auto& bias = linear.bias[static_cast<std::size_t>(head)];
          for (const std::vector<float>& part : d_weight) {
            for (std::size_t i = 0; i < weight.size(); ++i) weight[i] += part[i];
            for (std::size_t i = 0; i < bias.size(); ++i) bias[i] += part[weight.size() + i];
          }
          d_states.add_up();
          parallel_for(states.tiles(), context.run.threads, [&](std::int64_t tile, int) {
            key_tile_backward(problem, inputs, d_states, marked_by[static_cast<std::size_t>(tile)], s, kv_head, tile,
                              own);
          });
        }
      }
    }
  }

  /// Adds to dQ, writes dH [value_dim][dim] and dz; returns dW [in][out] and db of this tile.
  std::vector<float> query_tile_backward(const Problem& problem, const AttentionInputs& inputs,
                                         const Projection& projection, const TensorView& d_o, const TileStates& states,
                                         std::span<const std::uint8_t> marked, std::int64_t s, std::int64_t head,
                                         std::int64_t first, std::int64_t rows, float* d_matrix, float* d_vector,
                                         const Buffers& own, std::span<float> shares) const {
    const std::int64_t dim = problem.head_dim;
    const std::int64_t value_dim = problem.value_dim;
    const LinearTile tile = linear_tile(problem, inputs, states, marked, s, head, first, rows);
    std::vector<float> d_out(static_cast<std::size_t>(rows * value_dim));
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::byte* row = d_o.row(problem.tensor_batch_of(s), head, problem.q_begin_of(s) + first + r);
      for (std::int64_t d = 0; d < value_dim; ++d) {
        d_out[static_cast<std::size_t>(r * value_dim + d)] = load_as_float(row, d_o.dtype, d);
      }
    }
    // dW = O_linear^T dO, db = column sums of dO, dO_linear = dO W^T.
    std::vector<float> d_weight(static_cast<std::size_t>(value_dim * value_dim + value_dim), 0.0F);
    const std::vector<float> o_columns = transposed(tile.o.data(), rows, value_dim);
    const std::vector<float> d_columns = transposed(d_out.data(), rows, value_dim);
    score::multiply_transposed(o_columns.data(), value_dim, rows, d_columns.data(), value_dim, rows, rows, 1,
                               d_weight.data(), value_dim);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t d = 0; d < value_dim; ++d) {
        d_weight[static_cast<std::size_t>(value_dim * value_dim + d)] +=
            d_out[static_cast<std::size_t>(r * value_dim + d)];
      }
    }
    std::vector<float> d_linear(static_cast<std::size_t>(rows * value_dim));
    score::multiply_transposed(d_out.data(), rows, value_dim, projection.weight_of(head), value_dim, value_dim,
                               value_dim, 1, d_linear.data(), value_dim);
    // With u = phi(Q) / denominator and delta = rows of dO_linear . O_linear: dH = u^T dO_linear, dz = -u^T delta,
    // d phi(Q) = (dO_linear H^T - delta z) / denominator.
    std::vector<float> u = tile.phi;
    std::vector<float> delta(static_cast<std::size_t>(rows), 0.0F);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t d = 0; d < dim; ++d)
        u[static_cast<std::size_t>(r * dim + d)] *= tile.inverse[static_cast<std::size_t>(r)];
      for (std::int64_t d = 0; d < value_dim; ++d) {
        const auto i = static_cast<std::size_t>(r * value_dim + d);
        delta[static_cast<std::size_t>(r)] += d_linear[i] * tile.o[i];
      }
      for (std::int64_t d = 0; d < dim; ++d) {
        d_vector[d] -= u[static_cast<std::size_t>(r * dim + d)] * delta[static_cast<std::size_t>(r)];
      }
    }
    const std::vector<float> u_columns = transposed(u.data(), rows, dim);
    const std::vector<float> d_linear_columns = transposed(d_linear.data(), rows, value_dim);
    score::multiply_transposed(d_linear_columns.data(), value_dim, rows, u_columns.data(), dim, rows, rows, 1, d_matrix,
                               dim);
    const std::vector<float> h = transposed(tile.matrix.data(), value_dim, dim);  // [dim][value_dim]
    std::vector<float> d_phi(static_cast<std::size_t>(rows * dim));
    score::multiply_transposed(d_linear.data(), rows, value_dim, h.data(), dim, value_dim, value_dim, 1, d_phi.data(),
                               dim);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t d = 0; d < dim; ++d) {
        float& x = d_phi[static_cast<std::size_t>(r * dim + d)];
        x = (x - delta[static_cast<std::size_t>(r)] * tile.vector[static_cast<std::size_t>(d)]) *
            tile.inverse[static_cast<std::size_t>(r)];
      }
    }
    feature_map_backward(params_.map, rows, dim, tile.x.data(), tile.phi.data(), d_phi.data());
    const std::int64_t first_share =
        (problem.tensor_batch_of(s) * problem.q_heads + head) * problem.q_len + problem.q_begin_of(s) + first;
    const float* bias = projection.bias_of(head);
    for (std::int64_t r = 0; r < rows; ++r) {
      float& share = shares[static_cast<std::size_t>(first_share + r)];
      share += delta[static_cast<std::size_t>(r)];
      for (std::int64_t d = 0; d < value_dim; ++d) {
        share += d_out[static_cast<std::size_t>(r * value_dim + d)] * bias[d];
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      auto* row =
          reinterpret_cast<float*>(own.d_q.row(problem.tensor_batch_of(s), head, problem.q_begin_of(s) + first + r));
      for (std::int64_t d = 0; d < dim; ++d) row[d] += d_phi[static_cast<std::size_t>(r * dim + d)];
    }
    return d_weight;
  }

  /// Adds to dK and dV: d phi(K) = V SH^T + SZ, dV = phi(K) SH, with SH and SZ summed over the query tiles that marked
  /// this key tile.
  void key_tile_backward(const Problem& problem, const AttentionInputs& inputs, const TileStates& d_states,
                         std::span<const std::uint8_t> marked_by, std::int64_t s, std::int64_t kv_head,
                         std::int64_t tile, const Buffers& own) const {
    const std::int64_t dim = problem.head_dim;
    const std::int64_t value_dim = problem.value_dim;
    const std::int64_t first = tile * params_.block_k;
    const std::int64_t count = std::min(params_.block_k, problem.kv_len_of(s) - first);
    std::vector<float> matrix(static_cast<std::size_t>(value_dim * dim));
    std::vector<float> vector(static_cast<std::size_t>(dim));
    d_states.sum(marked_by, matrix.data(), vector.data());
    std::vector<float> k(static_cast<std::size_t>(count * dim));
    std::vector<float> v(static_cast<std::size_t>(count * value_dim));
    score::load_keys(problem, inputs, s, kv_head, first, count, k.data());
    score::load_values(problem, inputs, s, kv_head, first, count, v.data());
    std::vector<float> phi = k;
    apply_feature_map(params_.map, count, dim, phi.data());
    std::vector<float> d_v(static_cast<std::size_t>(count * value_dim));
    score::multiply_transposed(phi.data(), count, dim, matrix.data(), value_dim, dim, dim, 1, d_v.data(), value_dim);
    const std::vector<float> columns = transposed(matrix.data(), value_dim, dim);
    std::vector<float> d_phi(static_cast<std::size_t>(count * dim));
    score::multiply_transposed(v.data(), count, value_dim, columns.data(), dim, value_dim, value_dim, 1, d_phi.data(),
                               dim);
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t d = 0; d < dim; ++d) {
        d_phi[static_cast<std::size_t>(i * dim + d)] += vector[static_cast<std::size_t>(d)];
      }
    }
    feature_map_backward(params_.map, count, dim, k.data(), phi.data(), d_phi.data());
    const auto add = [&](const MutableTensorView& to, const std::vector<float>& rows) {
      const std::int64_t width = to.shape[3];
      for (std::int64_t i = 0; i < count; ++i) {
        auto* row =
            reinterpret_cast<float*>(to.row(problem.tensor_batch_of(s), kv_head, problem.kv_begin_of(s) + first + i));
        for (std::int64_t d = 0; d < width; ++d) row[d] += rows[static_cast<std::size_t>(i * width + d)];
      }
    };
    add(own.d_k, d_phi);
    add(own.d_v, d_v);
  }

  /// to = a + b, which are floats of its shape.
  static void write_sum(const MutableTensorView& a, const MutableTensorView& b, const MutableTensorView& to,
                        int threads) {
    if (to.data == nullptr) return;
    require(to.shape == a.shape && is_attention_dtype(to.dtype) && to.strides[3] == 1,
            "sla: a gradient is {} [{}]; expected f32, bf16 or f16 [{}]", name_of(to.dtype), fmt::join(to.shape, ", "),
            fmt::join(a.shape, ", "));
    constexpr std::int64_t chunk = 64;
    const auto [batch, heads, tokens, dim] = to.shape;
    const std::int64_t chunks = (tokens + chunk - 1) / chunk;
    const auto write_chunk = [&, heads = heads, tokens = tokens, dim = dim](std::int64_t i, int) {
      std::vector<float> sum(static_cast<std::size_t>(dim));
      const std::int64_t batch_row = i / chunks / heads;
      const std::int64_t head = i / chunks % heads;
      for (std::int64_t n = i % chunks * chunk; n < std::min(tokens, (i % chunks + 1) * chunk); ++n) {
        const auto* x = reinterpret_cast<const float*>(a.row(batch_row, head, n));
        const auto* y = reinterpret_cast<const float*>(b.row(batch_row, head, n));
        for (std::int64_t d = 0; d < dim; ++d) sum[static_cast<std::size_t>(d)] = x[d] + y[d];
        from_float(sum.data(), dim, to.dtype, to.row(batch_row, head, n));
      }
    };
    parallel_for(batch * heads * chunks, threads, write_chunk);
  }

  /// Gradients per head into a view per head, or their sum into a view for all.
  static void write_side(const Problem& problem, const std::vector<std::vector<double>>& heads,
                         const MutableTensorView* to, std::int64_t rows) {
    if (to == nullptr || to->data == nullptr) return;
    const std::int64_t dim = problem.value_dim;
    require(is_attention_dtype(to->dtype) && to->shape[0] == 1 &&
                (to->shape[1] == 1 || to->shape[1] == problem.q_heads) && to->shape[2] == rows && to->shape[3] == dim,
            "sla: the gradient of a side input is [{}]; expected [1, 1 or {}, {}, {}]", fmt::join(to->shape, ", "),
            problem.q_heads, rows, dim);
    for (std::int64_t h = 0; h < to->shape[1]; ++h) {
      for (std::int64_t i = 0; i < rows * dim; ++i) {
        double sum = 0;
        for (std::size_t head = 0; head < heads.size(); ++head) {
          if (to->shape[1] == 1 || static_cast<std::int64_t>(head) == h)
            sum += heads[head][static_cast<std::size_t>(i)];
        }
        store_from_float(to->row(0, h, i / dim), to->dtype, i % dim, static_cast<float>(sum));
      }
    }
  }

  Params params_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(sla, tessera::SparseLinear);
