// Token Sparse Attention, arXiv:2602.03216: attention among fewer tokens, as queries and as keys, chosen head by head.
//
// Per head, the mean probability that the last `window` queries give to each earlier token, smoothed by an average over
// `pool` neighbours (zeros beyond the ends count). The mean over heads, normalised, sorted in ascending order, says how
// many tokens may go: those whose cumulative share stays below tau, and the one that crosses it; at least min_tokens
// stay. Every head keeps that many tokens of its own, the best by its own scores, and the last `window` ones. Queries
// that are not kept give output 0: such tokens pass a layer by its residual alone. The cache keeps all tokens.
//
// Any method may run on the compacted tensors (`inner`). Layers that are not in `layers`, sequences of up to
// min_tokens + window keys and calls whose queries all fit the window run `inner` as it is. The authors' layers for
// Llama-3.1-8B are 15-30, for Mistral-Nemo 14+15+20-37, else the upper half; eval/layer_drift.h finds others.
//
// Differs from the authors' code: batches (each sequence counts for itself); queries of a chunk are kept where their
// tokens are; ties go to the earlier token; undefined scores drop nothing. K and V of all heads are not gathered
// beforehand, the kernel gathers the listed keys.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/error.h"
#include "core/parallel.h"
#include "kernels/key_rows.h"
#include "methods/layer_list.h"
#include "methods/registry.h"
#include "score/row_probe.h"
#include "score/top_k.h"

namespace tessera {
namespace {

/// What one head of a sequence keeps, ascending.
struct KeptTokens {
  std::vector<std::int32_t> queries;  ///< indices of queries
  std::vector<std::int32_t> keys;

  /// Place among the kept keys that the position of the first kept query has.
  std::int64_t offset(std::int64_t q_offset) const {
    if (queries.empty()) return 0;
    return std::lower_bound(keys.begin(), keys.end(), queries.front() + q_offset) - keys.begin();
  }
};

/// Means over `width` neighbours, zeros beyond the ends.
std::vector<float> smoothed(std::span<const float> values, std::int64_t width) {
  const auto size = static_cast<std::int64_t>(values.size());
  std::vector<float> out(values.size());
  for (std::int64_t j = 0; j < size; ++j) {
    float sum = 0;
    const std::int64_t end = std::min(size, j + width / 2 + 1);
    for (std::int64_t i = std::max<std::int64_t>(0, j - width / 2); i < end; ++i) sum += values[i];
    out[j] = sum / static_cast<float>(width);
  }
  return out;
}

class TokenSparse {
 public:
  struct Params {
    double tau = 0.005;
    std::int64_t min_tokens = 1024;
    std::int64_t window = 128;
    std::int64_t pool = 7;
    std::string layers = "upper";
    std::string inner = "dense";
    void visit(ParameterList& v) {
      v("tau", tau, 0, 1, "share of the probed probability that the dropped tokens may have; 0 drops nothing");
      v("min_tokens", min_tokens, 1, kMostTokens, "tokens before the window that stay at least");
      v("window", window, 1, 4096, "last queries that are probed, and last tokens that always stay");
      v("pool", pool, 1, 1023, "width of the smoothing of scores along the sequence; odd");
      v("layers", layers, "layers that drop tokens: upper (the second half), all, or numbers and ranges joined by +");
      v("inner", inner, "method that runs on what is left: a name with its defaults, or a JSON file");
    }
  };
  static MethodInfo info() {
    return {.name = "token-sparse",
            .family = "prefill",
            .summary = "each head drops tokens as queries and as keys, as many as the last queries hardly look at",
            .paper =
                "Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection, "
                "arXiv:2602.03216",
            .phases = {.prefill = true, .decode = false},
            .domain = {.bidirectional = false, .reason = "its last queries must be those that see the most"},
            .budget = {{"tau", 1, 0}}};
  }

  explicit TokenSparse(Params params) : params_(std::move(params)) {
    require(params_.pool % 2 == 1, "token-sparse: pool={} is even; expected an odd width", params_.pool);
    require(params_.inner != "token-sparse", "token-sparse: inner=token-sparse; expected another method");
    inner_ = make_method(params_.inner);
    require(inner_->info().has_plan && inner_->runs_its_plan(),
            "token-sparse: inner={} does more than run a plan; expected a method that does not", params_.inner);
    if (params_.layers != "upper" && params_.layers != "all") {
      layers_ = read_layer_list("token-sparse: layers", params_.layers);
    }
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    if (!sparse_layer(context)) return inner_->plan(problem, inputs, context);
    std::vector<std::vector<KeptTokens>> kept(static_cast<std::size_t>(problem.batch));
    bool drops = false;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      kept[s] = choose(problem, inputs, s, context.run.threads);
      drops = drops || !kept[s].empty();
    }
    if (!drops) return inner_->plan(problem, inputs, context);
    std::vector<Plan> parts;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      if (kept[s].empty()) kept[s] = everything(problem, s);
      add_parts(problem, inputs, context, s, kept[s], parts);
    }
    return concatenate_blocks(problem, problem.q_heads, problem.batch, parts);
  }

  std::unique_ptr<MethodState> new_state() const { return inner_->new_state(); }

 private:
  bool sparse_layer(const PlanContext& context) const {
    if (params_.layers == "all") return true;
    if (params_.layers == "upper") return context.layer >= context.layers / 2;
    return std::binary_search(layers_.begin(), layers_.end(), context.layer);
  }

  static std::vector<KeptTokens> everything(const Problem& problem, std::int64_t sequence) {
    KeptTokens all;
    all.queries.resize(static_cast<std::size_t>(problem.q_len_of(sequence)));
    all.keys.resize(static_cast<std::size_t>(problem.kv_len_of(sequence)));
    std::iota(all.queries.begin(), all.queries.end(), 0);
    std::iota(all.keys.begin(), all.keys.end(), 0);
    return std::vector<KeptTokens>(static_cast<std::size_t>(problem.q_heads), all);
  }

  /// What each head keeps; empty when nothing is dropped.
  std::vector<KeptTokens> choose(const Problem& problem, const AttentionInputs& inputs, std::int64_t sequence,
                                 int threads) const {
    const std::int64_t keys = problem.kv_len_of(sequence);
    const std::int64_t queries = problem.q_len_of(sequence);
    if (keys <= params_.min_tokens + params_.window || queries <= params_.window) return {};
    const std::int64_t candidates = keys - params_.window;
    std::vector<std::vector<float>> scores(static_cast<std::size_t>(problem.q_heads));
    parallel_for(problem.q_heads, threads, [&](std::int64_t head, int) {
      score::LineScores lines;
      score::ProbeBuffers buffers;
      score::probe_rows(problem, inputs, sequence, head, queries - params_.window, params_.window, false, lines,
                        buffers);
      for (float& x : lines.columns) x /= static_cast<float>(params_.window);
      scores[head] = smoothed(std::span(lines.columns).first(static_cast<std::size_t>(candidates)), params_.pool);
    });
    const std::int64_t dropped = count_dropped(scores);
    const std::int64_t keep = std::max(params_.min_tokens, candidates - dropped);
    if (dropped == 0 || keep >= candidates) return {};

    std::vector<KeptTokens> kept(scores.size());
    parallel_for(problem.q_heads, threads, [&](std::int64_t head, int) {
      kept[head].keys = score::top_k(scores[head], keep);
      for (std::int64_t j = candidates; j < keys; ++j) kept[head].keys.push_back(static_cast<std::int32_t>(j));
      kept[head].queries = queries_among(kept[head].keys, problem.q_offset_of(sequence), queries, keys);
    });
    // A plan cannot say "no query at all"; only queries placed before all kept tokens come to that.
    for (const KeptTokens& head : kept) {
      if (head.queries.empty()) return {};
    }
    return kept;
  }

  /// Tokens that may go, by the mean over heads.
  std::int64_t count_dropped(std::span<const std::vector<float>> scores) const {
    std::vector<double> mean(scores.front().size(), 0.0);
    for (const std::vector<float>& head : scores) {
      for (std::size_t j = 0; j < mean.size(); ++j) mean[j] += head[j];
    }
    const double total = std::accumulate(mean.begin(), mean.end(), 0.0);
    if (!std::isfinite(total) || total <= 0) return 0;
    std::sort(mean.begin(), mean.end());
    std::int64_t below = 0;
    double sum = 0;
    for (const double x : mean) {
      sum += x / total;
      if (sum >= params_.tau) break;
      ++below;
    }
    return below == 0 ? 0 : std::min(below + 1, static_cast<std::int64_t>(mean.size()));
  }

  /// Queries whose own tokens are kept, and those placed beyond the last key.
  static std::vector<std::int32_t> queries_among(std::span<const std::int32_t> kept, std::int64_t q_offset,
                                                 std::int64_t queries, std::int64_t keys) {
    std::vector<std::int32_t> among;
    for (const std::int32_t j : kept) {
      if (j >= q_offset && j < q_offset + queries) among.push_back(static_cast<std::int32_t>(j - q_offset));
    }
    for (std::int64_t r = std::max<std::int64_t>(0, keys - q_offset); r < queries; ++r) {
      among.push_back(static_cast<std::int32_t>(r));
    }
    return among;
  }

  /// Plans `inner` on the compacted heads of a sequence and says its plan in terms of the original tokens. Heads may
  /// keep different queries of a chunk, so that those of equal shape are planned together.
  void add_parts(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context, std::int64_t s,
                 std::span<const KeptTokens> kept, std::vector<Plan>& parts) const {
    const std::int64_t q_offset = problem.q_offset_of(s);
    std::vector<Plan> own(kept.size());
    std::vector<std::uint8_t> done(kept.size(), 0);
    for (std::size_t first = 0; first < kept.size(); ++first) {
      if (done[first] != 0) continue;
      std::vector<std::int64_t> heads;
      for (std::size_t h = first; h < kept.size(); ++h) {
        if (kept[h].queries.size() == kept[first].queries.size() &&
            kept[h].offset(q_offset) == kept[first].offset(q_offset)) {
          heads.push_back(static_cast<std::int64_t>(h));
          done[h] = 1;
        }
      }
      const Plan compact = plan_compacted(problem, inputs, context, s, kept, heads);
      parallel_for(static_cast<std::int64_t>(heads.size()), context.run.threads, [&](std::int64_t i, int) {
        own[heads[i]] = expanded(problem, compact, i, s * problem.q_heads + heads[i], kept[heads[i]]);
      });
    }
    for (Plan& part : own) parts.push_back(std::move(part));
  }

  Plan plan_compacted(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context, std::int64_t s,
                      std::span<const KeptTokens> kept, std::span<const std::int64_t> heads) const {
    const KeptTokens& first = kept[heads.front()];
    Problem compact;
    compact.q_heads = compact.kv_heads = static_cast<std::int64_t>(heads.size());
    compact.q_len = static_cast<std::int64_t>(first.queries.size());
    compact.kv_len = static_cast<std::int64_t>(first.keys.size());
    compact.head_dim = compact.value_dim = problem.head_dim;
    compact.scale = problem.softmax_scale();
    compact.causal = true;
    compact.q_offset = first.offset(problem.q_offset_of(s));
    if (inner_->info().name == "dense") return inner_->plan(compact, {}, context);  // reads no tensors

    const std::int64_t dim = problem.head_dim;
    const std::size_t q_row = static_cast<std::size_t>(dim) * size_of(inputs.q.dtype);
    const std::size_t k_row = static_cast<std::size_t>(dim) * size_of(inputs.k.dtype);
    // One row more than needed: a tensor without rows still has an address.
    std::vector<std::byte> q(static_cast<std::size_t>(compact.q_heads * compact.q_len + 1) * q_row);
    std::vector<std::byte> k(static_cast<std::size_t>(compact.q_heads * compact.kv_len + 1) * k_row);
    parallel_for(compact.q_heads, context.run.threads, [&](std::int64_t i, int) {
      const std::int64_t head = heads[i];
      std::byte* to = q.data() + static_cast<std::size_t>(i * compact.q_len) * q_row;
      for (const std::int32_t r : kept[head].queries) {
        std::memcpy(to, inputs.q.row(problem.tensor_batch_of(s), head, problem.q_begin_of(s) + r), q_row);
        to += q_row;
      }
      const kernels::KeyRows rows = kernels::key_rows_of(problem, inputs.k, inputs.pages, s, head / problem.group());
      to = k.data() + static_cast<std::size_t>(i * compact.kv_len) * k_row;
      for (const std::int32_t j : kept[head].keys) {
        std::memcpy(to, rows.row(j), k_row);
        to += k_row;
      }
    });
    AttentionInputs gathered;
    gathered.q = view_of(q.data(), inputs.q.dtype, {1, compact.q_heads, compact.q_len, dim});
    gathered.k = view_of(k.data(), inputs.k.dtype, {1, compact.q_heads, compact.kv_len, dim});
    gathered.v = gathered.k;
    gathered.side = inputs.side;
    return inner_->plan(compact, gathered, context);
  }

  /// One head of a plan over compacted tokens as a block of the plan over all tokens.
  static Plan expanded(const Problem& problem, const Plan& compact, std::int64_t head, std::int64_t block,
                       const KeptTokens& kept) {
    const std::int64_t from = compact.block_of(0, head);
    require(compact.sources.size() == 1 && (compact.key_order.empty() || compact.key_order[from].empty()),
            "token-sparse: the plan of inner reorders keys or reads derived ones; expected a method that does neither");
    std::vector<std::int32_t> order = kept.queries;
    if (!compact.query_order.empty() && !compact.query_order[from].empty()) {
      order.clear();
      for (const std::int32_t place : compact.query_order[from]) order.push_back(kept.queries[place]);
    }
    const std::int64_t places = static_cast<std::int64_t>(order.size());
    PlanBuilder builder =
        PlanBuilder::for_block(problem, compact.tile_q, compact.tile_k, problem.q_heads, problem.batch, block);
    builder.set_query_order(block, std::move(order));
    const std::int64_t pool = builder.add_tokens(kept.keys);
    std::vector<std::int32_t> listed;
    for (std::int64_t tile = 0; tile < builder.query_tiles(block); ++tile) {
      const std::int64_t rows = std::min(compact.tile_q, places - tile * compact.tile_q);
      for (const PlanEntry& entry : compact.row(compact.row_begin[from] + tile)) {
        const Plan::KeyRange range = compact.keys_of(entry, from);
        std::span<const std::int32_t> keys;
        std::int64_t begin = pool + range.begin;
        if (entry.kind == EntryKind::gather) {
          listed.clear();
          for (std::int64_t i = 0; i < range.count; ++i) listed.push_back(kept.keys[compact.tokens[range.begin + i]]);
          keys = listed;
          begin = builder.add_tokens(listed);
        } else {
          keys = std::span(kept.keys).subspan(static_cast<std::size_t>(range.begin),
                                              static_cast<std::size_t>(range.count));
        }
        EntryMask mask = entry.mask;
        std::int64_t mask_index = 0;
        if (mask == EntryMask::bitmask) {
          const std::int64_t words = rows * ((range.count + 63) / 64);
          mask_index = builder.add_mask(
              std::span(compact.mask_words)
                  .subspan(static_cast<std::size_t>(entry.mask_index), static_cast<std::size_t>(words)));
        } else if (mask == EntryMask::band && compact.bands[entry.mask_index] != Window{-1, 0}) {
          // Distances count kept tokens here, which no band over the original positions can say.
          mask = EntryMask::bitmask;
          mask_index = builder.add_mask(band_bits(compact, entry, from, tile, rows));
        }
        const bool consecutive = keys.back() - keys.front() + 1 == static_cast<std::int32_t>(keys.size());
        if (consecutive) builder.run(keys.front(), range.count, mask, mask_index);
        if (!consecutive) builder.gather(begin, range.count, mask, mask_index);
      }
      builder.end_row();
    }
    return std::move(builder).finish();
  }

  /// The window of an entry over compacted positions as bits.
  static std::vector<std::uint64_t> band_bits(const Plan& compact, const PlanEntry& entry, std::int64_t block,
                                              std::int64_t tile, std::int64_t rows) {
    const Window band = compact.bands[entry.mask_index];
    const Plan::KeyRange range = compact.keys_of(entry, block);
    const std::int64_t words = (range.count + 63) / 64;
    std::vector<std::uint64_t> bits(static_cast<std::size_t>(rows * words), 0);
    for (std::int64_t r = 0; r < rows; ++r) {
      std::int64_t place = tile * compact.tile_q + r;
      if (!compact.query_order.empty() && !compact.query_order[block].empty()) {
        place = compact.query_order[block][place];
      }
      const std::int64_t position = compact.problem.q_offset_of(0) + place;
      for (std::int64_t i = 0; i < range.count; ++i) {
        const std::int64_t key =
            entry.kind == EntryKind::gather ? std::int64_t{compact.tokens[range.begin + i]} : range.begin + i;
        const bool inside =
            (band.left < 0 || key >= position - band.left) && (band.right < 0 || key <= position + band.right);
        if (inside) bits[r * words + i / 64] |= std::uint64_t{1} << (i % 64);
      }
    }
    return bits;
  }

  Params params_;
  std::vector<std::int64_t> layers_;
  std::unique_ptr<const Method> inner_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(token_sparse, tessera::TokenSparse);
