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

/// Query tiles that are ranked by one product.
constexpr std::int64_t kBandTiles = 16;

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
    return plan_of(problem, Ranking(problem, inputs, params_, context.run.threads), context);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const auto start = std::chrono::steady_clock::now();
    require_supported(inputs);
    const Ranking ranking(problem, inputs, params_, context.run.threads);
    Plan decided = plan_of(problem, ranking, context);
    const std::chrono::duration<double, std::milli> planned = std::chrono::steady_clock::now() - start;
    RunReport report = run(decided, inputs, outputs, context.run);
    report.plan_ms = planned.count();
    const LearnedProjection projection("sla", problem, inputs);
    if (projection.given()) {
      const auto linear_start = std::chrono::steady_clock::now();
      linear_branch(problem, inputs, context)
          .add_to(outputs.o, marked_tiles(problem, ranking, context.run.threads), projection);
      report.kernel_ms +=
          std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - linear_start).count();
    }
    if (executed != nullptr) *executed = std::move(decided);
    return report;
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* executed) const {
    const auto start = std::chrono::steady_clock::now();
    require_supported(inputs);
    const LearnedProjection projection("sla", problem, inputs);
    const auto wanted = [&](std::string_view name) {
      const MutableTensorView* side = gradients.find_side(name);
      return side != nullptr && side->data != nullptr;
    };
    const bool learning = wanted("projection") || wanted("bias");
    const bool linear = projection.given() || learning;
    std::optional<Ranking> ranking;
    if (linear || executed == nullptr) ranking.emplace(problem, inputs, params_, context.run.threads);
    std::optional<Plan> decided;
    if (executed == nullptr) decided = plan_of(problem, *ranking, context);
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
    RunReport report = linear ? backward_of_both(problem, inputs, projection, learning, *ranking, sparse, saved,
                                                 of_sparse, gradients, context)
                              : run_backward(sparse, inputs, of_sparse, of_inputs(gradients), context.run);
    report.kernel_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    return report;
  }

 private:
  /// How well mean queries and mean keys of tiles match.
  class Ranking {
   public:
    Ranking(const Problem& problem, const AttentionInputs& inputs, const Params& params, int threads)
        : dim_(problem.head_dim),
          q_heads_(problem.q_heads),
          group_(problem.group()),
          queries_(static_cast<std::size_t>(problem.batch * problem.q_heads)),
          keys_(static_cast<std::size_t>(problem.batch * problem.kv_heads)) {
      const auto q_blocks = static_cast<std::int64_t>(queries_.size());
      const auto kv_blocks = static_cast<std::int64_t>(keys_.size());
      parallel_for(q_blocks + kv_blocks, threads, [&](std::int64_t i, int) {
        if (i < q_blocks) {
          queries_[static_cast<std::size_t>(i)] = score::pool_queries(problem, inputs, i / q_heads_, i % q_heads_,
                                                                      params.block_q, score::LastTile::real_rows);
        } else {
          const std::int64_t kv = i - q_blocks;
          keys_[static_cast<std::size_t>(kv)] =
              score::pool_keys(problem, inputs, kv / problem.kv_heads, kv % problem.kv_heads, params.block_k,
                               score::LastTile::real_rows);
        }
      });
    }

    std::int64_t blocks() const { return static_cast<std::int64_t>(queries_.size()); }
    std::int64_t query_tiles(std::int64_t block) const {
      return static_cast<std::int64_t>(queries_[static_cast<std::size_t>(block)].size()) / dim_;
    }
    std::int64_t key_tiles(std::int64_t block) const { return static_cast<std::int64_t>(keys_of(block).size()) / dim_; }
    /// Scores of all key tiles for `count` query tiles of (sequence, query head) `block`, [count][key tiles].
    std::vector<float> scores(std::int64_t block, std::int64_t first, std::int64_t count) const {
      std::vector<float> out(static_cast<std::size_t>(count * key_tiles(block)));
      score::pooled_scores(queries_[static_cast<std::size_t>(block)], keys_of(block), dim_, first, count, 1, out);
      return out;
    }

   private:
    const std::vector<float>& keys_of(std::int64_t block) const {
      return keys_[static_cast<std::size_t>(block / q_heads_ * (q_heads_ / group_) + block % q_heads_ / group_)];
    }

    std::int64_t dim_;
    std::int64_t q_heads_;
    std::int64_t group_;
    std::vector<std::vector<float>> queries_;  ///< [sequence * q_heads + head] of [tiles][dim]
    std::vector<std::vector<float>> keys_;     ///< [sequence * kv_heads + head] of [tiles][dim]
  };

  static void require_supported(const AttentionInputs& inputs) {
    require(!inputs.modifiers.changes_scores() && inputs.modifiers.sink_logits.empty(),
            "sla: the linear branch knows no modifiers of scores; expected none");
  }

  std::int64_t critical_of(std::int64_t tiles) const {
    return std::max<std::int64_t>(1, static_cast<std::int64_t>(params_.critical * static_cast<double>(tiles)));
  }

  Plan plan_of(const Problem& problem, const Ranking& ranking, const PlanContext& context) const {
    score::PlanRows rows(problem, params_.block_q, params_.block_k, problem.q_heads);
    rows.for_each_band(
        kBandTiles, context.run.threads, [&](std::int64_t block, std::int64_t first, std::int64_t count, int) {
          const score::QueryTiles tiles = rows.geometry(block);
          const std::int64_t keys = tiles.key_tiles();
          if (keys == 0) return;
          const std::vector<float> scores = ranking.scores(block, first, count);
          for (std::int64_t i = 0; i < count; ++i) {
            const std::span<const float> row{scores.data() + i * keys, static_cast<std::size_t>(keys)};
            rows.row(block, first + i).selected_tiles(tiles, first + i, score::top_k(row, critical_of(keys)));
          }
        });
    return std::move(rows).finish(context.run.threads);
  }

  /// Per (sequence, query head), the key tiles that the linear branch of a query tile reads.
  std::vector<MarkedTiles> marked_tiles(const Problem& problem, const Ranking& ranking, int threads) const {
    std::vector<MarkedTiles> marked(static_cast<std::size_t>(problem.batch * problem.q_heads));
    std::int64_t most_bands = 0;
    for (std::int64_t block = 0; block < ranking.blocks(); ++block) {
      MarkedTiles& own = marked[static_cast<std::size_t>(block)];
      own.key_tiles = ranking.key_tiles(block);
      own.marks.assign(static_cast<std::size_t>(ranking.query_tiles(block) * own.key_tiles), 1);
      most_bands = std::max(most_bands, (ranking.query_tiles(block) + kBandTiles - 1) / kBandTiles);
    }
    if (params_.scope == Scope::all) return marked;
    parallel_for(most_bands * ranking.blocks(), threads, [&](std::int64_t i, int) {
      const std::int64_t block = i % ranking.blocks();
      const std::int64_t first = i / ranking.blocks() * kBandTiles;
      const std::int64_t count = std::min(kBandTiles, ranking.query_tiles(block) - first);
      MarkedTiles& own = marked[static_cast<std::size_t>(block)];
      if (count <= 0 || own.key_tiles == 0) return;
      std::vector<float> scores = ranking.scores(block, first, count);
      for (std::int64_t t = 0; t < count; ++t) {
        unmark({scores.data() + t * own.key_tiles, static_cast<std::size_t>(own.key_tiles)},
               own.marks.data() + (first + t) * own.key_tiles);
      }
    });
    return marked;
  }

  /// Marks 0 for critical and negligible tiles; changes the scores.
  void unmark(std::span<float> scores, std::uint8_t* marks) const {
    const auto tiles = static_cast<std::int64_t>(scores.size());
    for (const std::int32_t j : score::top_k(scores, critical_of(tiles))) marks[j] = 0;
    const std::int64_t left = tiles - critical_of(tiles);
    const auto skipped = std::min(left, static_cast<std::int64_t>(params_.negligible * static_cast<double>(tiles)));
    // The lowest: the best of the negated scores, critical tiles out of the way.
    for (std::size_t j = 0; j < scores.size(); ++j) {
      scores[j] = marks[j] != 0 ? -scores[j] : -std::numeric_limits<float>::infinity();
    }
    for (const std::int32_t j : score::top_k(scores, skipped)) marks[j] = 0;
  }

  LinearBranch linear_branch(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    return {problem,
            inputs,
            {.block_q = params_.block_q,
             .block_k = params_.block_k,
             .map = params_.map,
             .floor = params_.scope == Scope::all ? kDenominatorFloor : 0.0F},
            context.run};
  }

  static Gradients of_inputs(const Gradients& gradients) {
    Gradients own;
    own.d_q = gradients.d_q;
    own.d_k = gradients.d_k;
    own.d_v = gradients.d_v;
    return own;
  }

  /// Gradients of both branches: those of the linear one are added to what the sparse one writes.
  RunReport backward_of_both(const Problem& problem, const AttentionInputs& inputs, const LearnedProjection& projection,
                             bool learning, const Ranking& ranking, const Plan& sparse, const SavedForward& saved,
                             SavedForward of_sparse, const Gradients& gradients, const PlanContext& context) const {
    const int threads = context.run.threads;
    LinearBranchGradients linear(problem, inputs, learning, context.run.workspace);
    std::vector<float> d_lse(static_cast<std::size_t>(inputs.q.batch() * problem.q_heads * problem.q_len), 0.0F);
    require(saved.d_lse.empty() || saved.d_lse.size() == d_lse.size(), "sla: d_lse has {} elements; expected {}",
            saved.d_lse.size(), d_lse.size());
    std::copy(saved.d_lse.begin(), saved.d_lse.end(), d_lse.begin());
    linear_branch(problem, inputs, context)
        .backward(saved.d_o, marked_tiles(problem, ranking, threads), projection, d_lse, linear);
    if (!saved.lse.empty()) of_sparse.d_lse = d_lse;
    // Gradients that are not float are rounded once, as the sum.
    std::array<std::vector<float>, 3> memory;
    const auto target = [&](const MutableTensorView& to, std::size_t index) {
      if (to.data == nullptr || to.dtype == DType::f32) return to;
      memory.at(index).resize(static_cast<std::size_t>(to.shape[0] * to.shape[1] * to.shape[2] * to.shape[3]));
      return mutable_view_of(memory.at(index).data(), DType::f32, to.shape);
    };
    Gradients own;
    own.d_q = target(gradients.d_q, 0);
    own.d_k = target(gradients.d_k, 1);
    own.d_v = target(gradients.d_v, 2);
    const RunReport report = run_backward(sparse, inputs, of_sparse, own, context.run);
    write_sum(problem, own.d_q, linear.d_q, gradients.d_q, true, threads);
    write_sum(problem, own.d_k, linear.d_k, gradients.d_k, false, threads);
    write_sum(problem, own.d_v, linear.d_v, gradients.d_v, false, threads);
    write_side(problem, linear.weight, gradients.find_side("projection"), problem.value_dim);
    write_side(problem, linear.bias, gradients.find_side("bias"), 1);
    return report;
  }

  /// to = a + b, rows of floats, for the queries or keys of all sequences; `to` may be `a`.
  static void write_sum(const Problem& problem, const MutableTensorView& a, const MutableTensorView& b,
                        const MutableTensorView& to, bool queries, int threads) {
    if (to.data == nullptr) return;
    constexpr std::int64_t chunk = 64;
    const std::int64_t heads = to.shape[1];
    const std::int64_t dim = to.shape[3];
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      const std::int64_t tokens = queries ? problem.q_len_of(s) : problem.kv_len_of(s);
      const std::int64_t begin = queries ? problem.q_begin_of(s) : problem.kv_begin_of(s);
      const std::int64_t batch = problem.tensor_batch_of(s);
      const std::int64_t chunks = (tokens + chunk - 1) / chunk;
      parallel_for(heads * chunks, threads, [&](std::int64_t i, int) {
        std::vector<float> sum(static_cast<std::size_t>(dim));
        for (std::int64_t n = i % chunks * chunk; n < std::min(tokens, (i % chunks + 1) * chunk); ++n) {
          const auto* x = reinterpret_cast<const float*>(a.row(batch, i / chunks, begin + n));
          const auto* y = reinterpret_cast<const float*>(b.row(batch, i / chunks, begin + n));
          for (std::int64_t d = 0; d < dim; ++d) sum[static_cast<std::size_t>(d)] = x[d] + y[d];
          from_float(sum.data(), dim, to.dtype, to.row(batch, i / chunks, begin + n));
        }
      });
    }
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
