// HyperAttention: Long-context Attention in Near-Linear Time, arXiv:2310.05869.
//
// A rectangle of queries and keys without a mask: both are hashed by `planes` random planes, sorted by bucket, and cut
// into as many blocks; block b of the queries attends to block b of the keys exactly. Beside it, `samples` keys drawn
// with replacement stand for all the others: those in the query's own block are left out, the rest weigh keys /
// samples each, so that sums over the other blocks are estimated without bias. Rectangles with fewer than min_seq_len
// queries are exact. A causal square of more than min_seq_len tokens is two causal squares of half the size and the
// rectangle of the second half's queries and the first half's keys; all parts join by LSE.
//
// plan() says all this in one plan of single queries: exact runs, the lists of the blocks, and a derived source of
// sampled keys. attend() runs the exact parts as one plan, each rectangle and kv head as another over sorted copies,
// and merges them; backward() likewise, every part with the merged LSE. The hash is a constant of the backward pass.
//
// As the paper means it and unlike the authors' code: neighbouring buckets differ in one bit (the code takes the Gray
// code of the hash for its rank: legacy_buckets); samples in the own block never count twice (the code's fast path
// counts them); the last block has fewer keys instead of zeros. The paths with a prefix of older keys, or queries
// beyond the last key, are rectangles too. Estimates vary much where one key has most of the weight.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <random>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "kernels/key_rows.h"
#include "methods/branch_merge.h"
#include "methods/layer_list.h"
#include "methods/registry.h"
#include "score/angular_lsh.h"
#include "score/plan_rows.h"
#include "score/row_access.h"

namespace tessera {
namespace {

constexpr std::int64_t kExactTile = 128;
constexpr std::int64_t kRowsAtOnce = 512;

/// Queries [q_begin, q_end) and keys [k_begin, k_end) of a sequence; a causal piece is a square on the diagonal.
struct Piece {
  std::int64_t sequence = 0;
  std::int64_t q_begin = 0;
  std::int64_t q_end = 0;
  std::int64_t k_begin = 0;
  std::int64_t k_end = 0;
  bool causal = false;

  std::int64_t queries() const { return q_end - q_begin; }
  std::int64_t keys() const { return k_end - k_begin; }
};

struct Pieces {
  std::vector<Piece> exact;
  std::vector<Piece> hashed;
};

/// How a hashed piece is sorted and sampled, for the query heads of one kv head. Places count inside the piece.
struct Sorted {
  std::vector<std::int32_t> keys;                  ///< [place] -> key
  std::vector<std::vector<std::int32_t>> queries;  ///< per head: [place] -> query
  std::vector<std::vector<std::int32_t>> samples;  ///< per head: places of keys, repeats allowed
  std::int64_t blocks = 0;
  std::int64_t key_rows = 0;    ///< keys of a block
  std::int64_t query_rows = 0;  ///< queries of a block
};

/// One kv head of a hashed piece as a problem of its own, over sorted copies.
struct SortedProblem {
  Problem problem;
  Plan plan;
  std::vector<std::byte> q;
  std::vector<std::byte> k;
  std::vector<std::byte> v;
  std::vector<std::byte> sampled_k;
  std::vector<std::byte> sampled_v;
  std::vector<float> log_weight;
  AttentionInputs inputs;
};

class HyperAttention {
 public:
  struct Params {
    std::int64_t min_seq_len = 4096;
    std::int64_t block = 256;
    std::int64_t samples = 256;
    std::int64_t planes = 7;
    bool legacy_buckets = false;
    std::string layers = "all";
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("min_seq_len", min_seq_len, 1, kMostTokens,
        "causal squares of so many tokens, and shorter rectangles, are exact");
      v("block", block, 1, 65536, "keys of a block of the sorted order");
      v("samples", samples, 0, 65536, "keys drawn per head and rectangle");
      v("planes", planes, 1, 16, "random planes of the hash");
      v("legacy_buckets", legacy_buckets, "buckets as in the authors' code, the Gray code of the hash");
      v("layers", layers, "layers that are approximated, numbers and ranges joined by +, or all");
      v("seed", seed, 0, kMostTokens, "of planes and samples");
    }
  };
  static MethodInfo info() {
    return {.name = "hyper",
            .family = "prefill",
            .summary = "blocks of queries and keys sorted by an angular hash, and sampled keys for all the others",
            .paper = "HyperAttention: Long-context Attention in Near-Linear Time, arXiv:2310.05869",
            .phases = {.prefill = true, .decode = false, .backward = true},
            .budget = {{"samples", 16, 65536, true}}};
  }

  explicit HyperAttention(Params params) : params_(std::move(params)) {
    if (params_.layers != "all") layers_ = read_layer_list("hyper: layers", params_.layers);
  }

  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    const Pieces pieces = pieces_of(problem, context);
    if (pieces.hashed.empty()) return exact_plan(problem, pieces.exact, context.run.threads);
    return flat_plan(problem, inputs, pieces, context);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    const auto start = std::chrono::steady_clock::now();
    const Pieces pieces = pieces_of(problem, context);
    Plan exact = exact_plan(problem, pieces.exact, context.run.threads);
    if (pieces.hashed.empty()) {
      const double planned = milliseconds_since(start);
      RunReport report = run(exact, inputs, outputs, context.run);
      report.plan_ms = planned;
      if (executed != nullptr) *executed = std::move(exact);
      return report;
    }
    check_modifiers(inputs.modifiers);
    require(outputs.scores.data == nullptr, "hyper: scores are no by-product of its sorted parts");
    const std::int64_t dim = problem.value_dim;
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    std::vector<float> o(static_cast<std::size_t>(batch * problem.q_heads * problem.q_len * dim));
    std::vector<float> lse(static_cast<std::size_t>(batch * problem.q_heads * problem.q_len));
    const MutableTensorView merged =
        mutable_view_of(o.data(), DType::f32, {batch, problem.q_heads, problem.q_len, dim});
    double planned = milliseconds_since(start);
    RunReport report = run(exact, inputs, {merged, lse}, context.run);
    double kernel_ms = report.kernel_ms;
    for_each_sorted(
        problem, inputs, pieces, context,
        [&](const Piece& piece, std::int64_t kv_head, const Sorted& sorted, SortedProblem& part, double plan_ms) {
          planned += plan_ms;
          const auto began = std::chrono::steady_clock::now();
          const std::int64_t rows = part.problem.q_heads * part.problem.q_len;
          std::vector<float> own_o(static_cast<std::size_t>(rows * dim));
          std::vector<float> own_lse(static_cast<std::size_t>(rows));
          const AttentionOutputs own{
              mutable_view_of(own_o.data(), DType::f32, {1, part.problem.q_heads, part.problem.q_len, dim}), own_lse};
          run(part.plan, part.inputs, own, context.run);
          parallel_for(
              rows, context.run.threads,
              [&](std::int64_t row, int) {
                const std::int64_t to = row_of(problem, piece, kv_head, sorted, row);
                merge_row(own_lse[row], own_o.data() + row * dim, dim, lse[to], o.data() + to * dim);
              },
              kRowsAtOnce);
          kernel_ms += milliseconds_since(began);
        });
    const auto began = std::chrono::steady_clock::now();
    const std::int64_t rows = batch * problem.q_heads * problem.q_len;
    parallel_for(
        rows, context.run.threads,
        [&](std::int64_t row, int) {
          const std::int64_t head = row / problem.q_len;
          from_float(o.data() + row * dim, dim, outputs.o.dtype,
                     outputs.o.row(head / problem.q_heads, head % problem.q_heads, row % problem.q_len));
        },
        kRowsAtOnce);
    if (!outputs.lse.empty()) std::copy(lse.begin(), lse.end(), outputs.lse.begin());
    report.kernel_ms = kernel_ms + milliseconds_since(began);
    report.plan_ms = planned;
    if (executed != nullptr) *executed = flat_plan(problem, inputs, pieces, context);
    return report;
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan*) const {
    const auto start = std::chrono::steady_clock::now();
    const Pieces pieces = pieces_of(problem, context);
    const Plan exact = exact_plan(problem, pieces.exact, context.run.threads);
    const double planned = milliseconds_since(start);
    if (pieces.hashed.empty()) {
      RunReport report = run_backward(exact, inputs, saved, gradients, context.run);
      report.plan_ms = planned;
      return report;
    }
    check_modifiers(inputs.modifiers);
    require(gradients.sources.empty(), "hyper: it has no key sources of the caller's to give gradients for");
    Sums d_q(inputs.q.shape);
    Sums d_k(inputs.k.shape);
    Sums d_v(inputs.v.shape);
    Gradients of_exact;
    of_exact.d_q = d_q.view();
    of_exact.d_k = d_k.view();
    of_exact.d_v = d_v.view();
    RunReport report = run_backward(exact, inputs, saved, of_exact, context.run);
    for_each_sorted(problem, inputs, pieces, context,
                    [&](const Piece& piece, std::int64_t kv_head, const Sorted& sorted, SortedProblem& part, double) {
                      part_backward(problem, saved, piece, kv_head, sorted, part, context, d_q, d_k, d_v);
                    });
    d_q.write(gradients.d_q);
    d_k.write(gradients.d_k);
    d_v.write(gradients.d_v);
    report.plan_ms = planned;
    report.kernel_ms = milliseconds_since(start) - planned;
    return report;
  }

 private:
  /// A gradient gathered from all parts.
  struct Sums {
    std::array<std::int64_t, 4> shape;
    std::vector<float> values;

    explicit Sums(const std::array<std::int64_t, 4>& of)
        : shape(of), values(static_cast<std::size_t>(of[0] * of[1] * of[2] * of[3])) {}
    MutableTensorView view() { return mutable_view_of(values.data(), DType::f32, shape); }
    float* row(std::int64_t b, std::int64_t h, std::int64_t n) {
      return values.data() + ((b * shape[1] + h) * shape[2] + n) * shape[3];
    }
    void add(std::int64_t b, std::int64_t h, std::int64_t n, const float* more) {
      float* to = row(b, h, n);
      for (std::int64_t d = 0; d < shape[3]; ++d) to[d] += more[d];
    }
    void write(const MutableTensorView& to) {
      if (to.data == nullptr) return;
      require(to.shape == shape && is_attention_dtype(to.dtype),
              "hyper: a gradient is {} [{}]; expected f32, bf16 or f16 [{}]", name_of(to.dtype),
              fmt::join(to.shape, ", "), fmt::join(shape, ", "));
      for (std::int64_t b = 0; b < shape[0]; ++b) {
        for (std::int64_t h = 0; h < shape[1]; ++h) {
          for (std::int64_t n = 0; n < shape[2]; ++n) from_float(row(b, h, n), shape[3], to.dtype, to.row(b, h, n));
        }
      }
    }
  };

  static double milliseconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }

  static void check_modifiers(const Modifiers& modifiers) {
    require(modifiers.alibi_slopes.empty() && modifiers.key_bias.data == nullptr && modifiers.sink_logits.empty() &&
                modifiers.query_scale.empty() && modifiers.weights == RowWeights::softmax,
            "hyper: its parts are sorted and joined by LSE; expected neither ALiBi, key bias, sink logits, query "
            "scales nor other weights than softmax");
  }

  // ---- pieces ----

  void split_square(Piece square, Pieces& pieces) const {
    if (square.queries() <= 0) return;
    if (square.queries() <= params_.min_seq_len) {
      pieces.exact.push_back(square);
      return;
    }
    // An odd length counts as if one more row followed.
    const std::int64_t half = (square.queries() + 1) / 2;
    Piece first = square;
    first.q_end = square.q_begin + half;
    first.k_end = square.k_begin + half;
    Piece second = square;
    second.q_begin = first.q_end;
    second.k_begin = first.k_end;
    split_square(first, pieces);
    split_square(second, pieces);
    add_rectangle({square.sequence, second.q_begin, second.q_end, first.k_begin, first.k_end}, pieces);
  }

  void add_rectangle(const Piece& piece, Pieces& pieces) const {
    if (piece.queries() <= 0 || piece.keys() <= 0) return;
    (piece.queries() < params_.min_seq_len ? pieces.exact : pieces.hashed).push_back(piece);
  }

  Pieces pieces_of(const Problem& problem, const PlanContext& context) const {
    const bool approximated =
        params_.layers == "all" || std::binary_search(layers_.begin(), layers_.end(), context.layer);
    Pieces pieces;
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      const std::int64_t queries = problem.q_len_of(s);
      const std::int64_t keys = problem.kv_len_of(s);
      if (!problem.causal) {
        const Piece all{s, 0, queries, 0, keys};
        if (approximated) {
          add_rectangle(all, pieces);
        } else {
          pieces.exact.push_back(all);
        }
        continue;
      }
      const std::int64_t offset = problem.q_offset_of(s);
      const std::int64_t first = std::clamp<std::int64_t>(-offset, 0, queries);
      const std::int64_t prefix = std::clamp<std::int64_t>(offset, 0, keys);
      const std::int64_t beyond = std::clamp<std::int64_t>(keys - offset, first, queries);
      const Piece square{s, first, beyond, prefix, prefix + beyond - first, true};
      if (approximated) {
        split_square(square, pieces);
        add_rectangle({s, first, queries, 0, prefix}, pieces);
        add_rectangle({s, beyond, queries, prefix, keys}, pieces);
      } else {
        pieces.exact.push_back(square);
        pieces.exact.push_back({s, first, queries, 0, prefix});
        pieces.exact.push_back({s, beyond, queries, prefix, keys});
      }
    }
    return pieces;
  }

  /// All exact pieces, in natural order and for all heads.
  static Plan exact_plan(const Problem& problem, std::span<const Piece> exact, int threads) {
    score::PlanRows rows(problem, kExactTile, kExactTile, 1);
    parallel_for(rows.blocks(), threads, [&](std::int64_t s, int) {
      const score::QueryTiles tiles = rows.geometry(s);
      for (const Piece& piece : exact) {
        if (piece.sequence != s || piece.queries() <= 0) continue;
        for (std::int64_t t = piece.q_begin / kExactTile; t * kExactTile < piece.q_end; ++t) {
          add_exact(tiles, t, piece, rows.row(s, t));
        }
      }
    });
    return std::move(rows).finish(threads);
  }

  static void add_exact(const score::QueryTiles& tiles, std::int64_t tile, const Piece& piece, score::PlanRow& row) {
    const std::int64_t first = tile * kExactTile;
    const std::int64_t end = first + tiles.rows(tile);
    const std::int64_t keys_end = piece.causal ? std::min(piece.k_end, tiles.last_position(tile) + 1) : piece.k_end;
    if (keys_end <= piece.k_begin) return;
    if (piece.q_begin <= first && end <= piece.q_end) {
      const bool masked = piece.causal && keys_end > tiles.first_position(tile) + 1;
      row.run(piece.k_begin, keys_end, masked ? EntryMask::band : EntryMask::none);
      return;
    }
    // Rows of the tile that belong to the piece, each up to its own position.
    const std::int64_t words = (keys_end - piece.k_begin + 63) / 64;
    std::vector<std::uint64_t> bits(static_cast<std::size_t>(tiles.rows(tile) * words), 0);
    for (std::int64_t r = std::max(first, piece.q_begin); r < std::min(end, piece.q_end); ++r) {
      const std::int64_t last = piece.causal ? std::min(keys_end, tiles.offset + r + 1) : keys_end;
      for (std::int64_t j = 0; j < last - piece.k_begin; ++j) {
        bits[(r - first) * words + j / 64] |= std::uint64_t{1} << (j % 64);
      }
    }
    row.bits(piece.k_begin, keys_end, bits);
  }

  // ---- hashed pieces ----

  Sorted sort(const Problem& problem, const AttentionInputs& inputs, const Piece& piece, std::size_t number,
              std::int64_t kv_head, const score::AngularHash& hash, const PlanContext& context) const {
    const std::int64_t dim = problem.head_dim;
    const auto ordered = [&](std::int64_t count, const auto& load) {
      std::vector<std::int32_t> buckets(static_cast<std::size_t>(count));
      parallel_for((count + kRowsAtOnce - 1) / kRowsAtOnce, context.run.threads, [&](std::int64_t chunk, int) {
        const std::int64_t first = chunk * kRowsAtOnce;
        const std::int64_t rows = std::min(kRowsAtOnce, count - first);
        std::vector<float> values(static_cast<std::size_t>(rows * dim));
        load(first, rows, values.data());
        const std::span<std::int32_t> own(buckets.data() + first, static_cast<std::size_t>(rows));
        hash.codes(values, own);
        for (std::int32_t& x : own) x = params_.legacy_buckets ? score::gray_code(x) : score::gray_rank(x);
      });
      return score::AngularHash::order_of(buckets);
    };
    Sorted sorted;
    sorted.keys = ordered(piece.keys(), [&](std::int64_t first, std::int64_t rows, float* to) {
      score::load_keys(problem, inputs, piece.sequence, kv_head, piece.k_begin + first, rows, to);
    });
    sorted.blocks = (piece.keys() + params_.block - 1) / params_.block;
    sorted.key_rows = params_.block;
    sorted.query_rows = (piece.queries() + sorted.blocks - 1) / sorted.blocks;
    for (std::int64_t head = kv_head * problem.group(); head < (kv_head + 1) * problem.group(); ++head) {
      sorted.queries.push_back(ordered(piece.queries(), [&](std::int64_t first, std::int64_t rows, float* to) {
        score::load_queries(problem, inputs, piece.sequence, head, piece.q_begin + first, rows, to);
      }));
      std::seed_seq mix{params_.seed, context.layer, head, static_cast<std::int64_t>(number)};
      std::mt19937_64 random(mix);
      std::vector<std::int32_t>& samples = sorted.samples.emplace_back();
      for (std::int64_t i = 0; i < params_.samples; ++i) {
        samples.push_back(static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(piece.keys())));
      }
    }
    return sorted;
  }

  score::AngularHash hash_of(const Problem& problem) const {
    return {problem.head_dim, params_.planes, static_cast<std::uint64_t>(params_.seed)};
  }

  /// Samples of a head that lie outside of a block, as indices into the head's samples.
  static std::vector<std::int32_t> samples_outside(const Sorted& sorted, std::int64_t head, std::int64_t block) {
    std::vector<std::int32_t> outside;
    const std::vector<std::int32_t>& samples = sorted.samples[static_cast<std::size_t>(head)];
    for (std::size_t i = 0; i < samples.size(); ++i) {
      if (samples[i] / sorted.key_rows != block) outside.push_back(static_cast<std::int32_t>(i));
    }
    return outside;
  }

  float log_weight(const Piece& piece) const {
    return std::log(static_cast<float>(piece.keys()) / static_cast<float>(params_.samples));
  }

  /// Row of O and LSE that a sorted row (head of the group, place) belongs to.
  static std::int64_t row_of(const Problem& problem, const Piece& piece, std::int64_t kv_head, const Sorted& sorted,
                             std::int64_t row) {
    const std::int64_t head = row / piece.queries();
    const std::int64_t query = piece.q_begin + sorted.queries[head][row % piece.queries()];
    return (problem.tensor_batch_of(piece.sequence) * problem.q_heads + kv_head * problem.group() + head) *
               problem.q_len +
           problem.q_begin_of(piece.sequence) + query;
  }

  /// Copies of rows in another order.
  template <class Address>
  static void copy_rows(std::int64_t count, std::size_t bytes, int threads, std::vector<std::byte>& to,
                        const Address& address) {
    to.resize(static_cast<std::size_t>(count) * bytes);
    parallel_for(
        count, threads,
        [&](std::int64_t i, int) { std::memcpy(to.data() + static_cast<std::size_t>(i) * bytes, address(i), bytes); },
        kRowsAtOnce);
  }

  /// The orders of all hashed pieces: [piece * kv_heads + kv_head]. Few parallel loops, since pieces may be many.
  std::vector<Sorted> sort_all(const Problem& problem, const AttentionInputs& inputs, const Pieces& pieces,
                               const PlanContext& context) const {
    const score::AngularHash hash = hash_of(problem);
    std::vector<Sorted> sorted(pieces.hashed.size() * static_cast<std::size_t>(problem.kv_heads));
    parallel_for(static_cast<std::int64_t>(sorted.size()), context.run.threads, [&](std::int64_t i, int) {
      const auto number = static_cast<std::size_t>(i / problem.kv_heads);
      sorted[i] = sort(problem, inputs, pieces.hashed[number], number, i % problem.kv_heads, hash, context);
    });
    return sorted;
  }

  /// body(piece, kv head, order, problem over sorted copies, time of making it).
  template <class Body>
  void for_each_sorted(const Problem& problem, const AttentionInputs& inputs, const Pieces& pieces,
                       const PlanContext& context, const Body& body) const {
    auto start = std::chrono::steady_clock::now();
    const std::vector<Sorted> sorted = sort_all(problem, inputs, pieces, context);
    for (std::size_t number = 0; number < pieces.hashed.size(); ++number) {
      const Piece& piece = pieces.hashed[number];
      const std::span<const Sorted> own(sorted.data() + number * static_cast<std::size_t>(problem.kv_heads),
                                        static_cast<std::size_t>(problem.kv_heads));
      std::vector<SortedProblem> parts(own.size());
      parallel_for(problem.kv_heads, context.run.threads, [&](std::int64_t kv_head, int) {
        parts[kv_head] = sorted_problem(problem, inputs, piece, kv_head, own[kv_head], context);
      });
      double planned = milliseconds_since(start);
      for (std::int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
        body(piece, kv_head, own[kv_head], parts[kv_head], planned);
        planned = 0;
      }
      start = std::chrono::steady_clock::now();
    }
  }

  SortedProblem sorted_problem(const Problem& problem, const AttentionInputs& inputs, const Piece& piece,
                               std::int64_t kv_head, const Sorted& sorted, const PlanContext& context) const {
    const int threads = context.run.threads;
    const std::int64_t group = problem.group();
    SortedProblem part;
    part.problem.q_heads = group;
    part.problem.q_len = piece.queries();
    part.problem.kv_len = piece.keys();
    part.problem.head_dim = problem.head_dim;
    part.problem.value_dim = problem.value_dim;
    part.problem.scale = problem.softmax_scale();

    const kernels::KeyRows k = kernels::key_rows_of(problem, inputs.k, inputs.pages, piece.sequence, kv_head);
    const kernels::KeyRows v = kernels::key_rows_of(problem, inputs.v, inputs.pages, piece.sequence, kv_head);
    const auto bytes = [](std::int64_t dim, DType dtype) { return static_cast<std::size_t>(dim) * size_of(dtype); };
    const auto key = [&](std::int64_t place) { return piece.k_begin + sorted.keys[place]; };
    copy_rows(group * piece.queries(), bytes(problem.head_dim, inputs.q.dtype), threads, part.q, [&](std::int64_t i) {
      return inputs.q.row(problem.tensor_batch_of(piece.sequence), kv_head * group + i / piece.queries(),
                          problem.q_begin_of(piece.sequence) + piece.q_begin +
                              sorted.queries[i / piece.queries()][i % piece.queries()]);
    });
    copy_rows(piece.keys(), bytes(problem.head_dim, inputs.k.dtype), threads, part.k,
              [&](std::int64_t i) { return k.row(key(i)); });
    copy_rows(piece.keys(), bytes(problem.value_dim, inputs.v.dtype), threads, part.v,
              [&](std::int64_t i) { return v.row(key(i)); });
    part.inputs.q = view_of(part.q.data(), inputs.q.dtype, {1, group, piece.queries(), problem.head_dim});
    part.inputs.k = view_of(part.k.data(), inputs.k.dtype, {1, 1, piece.keys(), problem.head_dim});
    part.inputs.v = view_of(part.v.data(), inputs.v.dtype, {1, 1, piece.keys(), problem.value_dim});
    part.inputs.modifiers.softcap = inputs.modifiers.softcap;

    const std::int64_t drawn = group * params_.samples;
    if (drawn > 0) {
      const auto sample = [&](std::int64_t i) { return key(sorted.samples[i / params_.samples][i % params_.samples]); };
      copy_rows(drawn, bytes(problem.head_dim, inputs.k.dtype), threads, part.sampled_k,
                [&](std::int64_t i) { return k.row(sample(i)); });
      copy_rows(drawn, bytes(problem.value_dim, inputs.v.dtype), threads, part.sampled_v,
                [&](std::int64_t i) { return v.row(sample(i)); });
      part.log_weight.assign(static_cast<std::size_t>(drawn), log_weight(piece));
      part.inputs.sources.push_back({view_of(part.sampled_k.data(), inputs.k.dtype, {1, 1, drawn, problem.head_dim}),
                                     view_of(part.sampled_v.data(), inputs.v.dtype, {1, 1, drawn, problem.value_dim}),
                                     part.log_weight});
    }

    PlanBuilder builder(part.problem, sorted.query_rows, sorted.key_rows, group, 1);
    if (drawn > 0) builder.add_source({"sampled keys", drawn, true});
    for (std::int64_t head = 0; head < group; ++head) {
      for (std::int64_t b = 0; b < builder.query_tiles(head); ++b) {
        builder.tiles(b, 1);
        std::vector<std::int32_t> outside = samples_outside(sorted, head, b);
        for (std::int32_t& i : outside) i += static_cast<std::int32_t>(head * params_.samples);
        builder.gather(builder.add_tokens(outside), static_cast<std::int64_t>(outside.size()), EntryMask::none, 0, 1);
        builder.end_row();
      }
    }
    part.plan = std::move(builder).finish();
    return part;
  }

  /// Gradients of one part, with the merged output and LSE, added where its rows came from.
  static void part_backward(const Problem& problem, const SavedForward& saved, const Piece& piece, std::int64_t kv_head,
                            const Sorted& sorted, const SortedProblem& part, const PlanContext& context, Sums& d_q,
                            Sums& d_k, Sums& d_v) {
    const std::int64_t group = problem.group();
    const std::int64_t rows = group * piece.queries();
    const std::int64_t b = problem.tensor_batch_of(piece.sequence);
    const auto query_row = [&](std::int64_t i) {
      return problem.q_begin_of(piece.sequence) + piece.q_begin +
             sorted.queries[i / piece.queries()][i % piece.queries()];
    };
    std::vector<std::byte> o;
    std::vector<std::byte> d_o;
    const auto bytes = [&](DType dtype) { return static_cast<std::size_t>(problem.value_dim) * size_of(dtype); };
    copy_rows(rows, bytes(saved.o.dtype), context.run.threads, o,
              [&](std::int64_t i) { return saved.o.row(b, kv_head * group + i / piece.queries(), query_row(i)); });
    copy_rows(rows, bytes(saved.d_o.dtype), context.run.threads, d_o,
              [&](std::int64_t i) { return saved.d_o.row(b, kv_head * group + i / piece.queries(), query_row(i)); });
    std::vector<float> lse;
    std::vector<float> d_lse;
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t from = row_of(problem, piece, kv_head, sorted, i);
      lse.push_back(saved.lse[from]);
      if (!saved.d_lse.empty()) d_lse.push_back(saved.d_lse[from]);
    }
    const std::array<std::int64_t, 4> shape{1, group, piece.queries(), problem.value_dim};
    const SavedForward own{view_of(o.data(), saved.o.dtype, shape), lse, view_of(d_o.data(), saved.d_o.dtype, shape),
                           d_lse};
    Sums own_q(part.inputs.q.shape);
    Sums own_k(part.inputs.k.shape);
    Sums own_v(part.inputs.v.shape);
    Gradients gradients;
    gradients.d_q = own_q.view();
    gradients.d_k = own_k.view();
    gradients.d_v = own_v.view();
    std::vector<Sums> of_samples;
    if (!part.inputs.sources.empty()) {
      of_samples.emplace_back(part.inputs.sources[0].k.shape);
      of_samples.emplace_back(part.inputs.sources[0].v.shape);
      gradients.sources.push_back({of_samples[0].view(), of_samples[1].view(), {}});
    }
    run_backward(part.plan, part.inputs, own, gradients, context.run);

    for (std::int64_t i = 0; i < rows; ++i) {
      d_q.add(b, kv_head * group + i / piece.queries(), query_row(i),
              own_q.row(0, i / piece.queries(), i % piece.queries()));
    }
    const auto key_row = [&](std::int64_t place) {
      return problem.kv_begin_of(piece.sequence) + piece.k_begin + sorted.keys[place];
    };
    for (std::int64_t i = 0; i < piece.keys(); ++i) {
      d_k.add(b, kv_head, key_row(i), own_k.row(0, 0, i));
      d_v.add(b, kv_head, key_row(i), own_v.row(0, 0, i));
    }
    std::int64_t place = 0;
    for (const auto& samples : sorted.samples) {
      for (const std::int32_t sample : samples) {
        d_k.add(b, kv_head, key_row(sample), of_samples[0].row(0, 0, place));
        d_v.add(b, kv_head, key_row(sample), of_samples[1].row(0, 0, place));
        ++place;
      }
    }
  }

  // ---- everything as one plan ----

  Plan flat_plan(const Problem& problem, const AttentionInputs& inputs, const Pieces& pieces,
                 const PlanContext& context) const {
    const std::vector<Sorted> sorted = sort_all(problem, inputs, pieces, context);
    const std::int64_t group = problem.group();
    // Samples lie piece by piece, head by head of the group.
    std::vector<std::int64_t> first_sample;
    std::vector<std::int64_t> of_sequence(static_cast<std::size_t>(problem.batch), 0);
    for (const Piece& piece : pieces.hashed) {
      first_sample.push_back(of_sequence[piece.sequence]);
      of_sequence[piece.sequence] += group * params_.samples;
    }
    const std::int64_t most = *std::max_element(of_sequence.begin(), of_sequence.end());
    std::vector<Plan> parts(static_cast<std::size_t>(problem.batch * problem.q_heads));
    parallel_for(static_cast<std::int64_t>(parts.size()), context.run.threads, [&](std::int64_t block, int) {
      const std::int64_t s = block / problem.q_heads;
      const std::int64_t head = block % problem.q_heads;
      std::vector<std::pair<std::size_t, const Sorted*>> own;
      for (std::size_t i = 0; i < pieces.hashed.size(); ++i) {
        if (pieces.hashed[i].sequence != s) continue;
        own.emplace_back(i, &sorted[i * static_cast<std::size_t>(problem.kv_heads) + head / group]);
      }
      PlanBuilder builder = PlanBuilder::for_block(problem, 1, kExactTile, problem.q_heads, problem.batch, block);
      if (params_.samples > 0) builder.add_source({"sampled keys", most, true});
      parts[block] = flat_block(problem, pieces, own, first_sample, s, head % group, std::move(builder));
    });
    return concatenate_blocks(problem, problem.q_heads, problem.batch, parts);
  }

  Plan flat_block(const Problem& problem, const Pieces& pieces,
                  std::span<const std::pair<std::size_t, const Sorted*>> sorted,
                  std::span<const std::int64_t> first_sample, std::int64_t s, std::int64_t head,
                  PlanBuilder builder) const {
    struct Lists {
      std::vector<std::int64_t> keys;     ///< per block: where its list is
      std::vector<std::int64_t> samples;  ///< per block
      std::vector<std::int64_t> count;    ///< of samples
      std::vector<std::int32_t> place;    ///< of each query
    };
    std::vector<Lists> lists;
    for (const auto& [number, sorted_piece] : sorted) {
      const Sorted& order = *sorted_piece;
      const Piece& piece = pieces.hashed[number];
      Lists& own = lists.emplace_back();
      for (std::int64_t b = 0; b < order.blocks; ++b) {
        const auto first = static_cast<std::size_t>(b * order.key_rows);
        const std::size_t count = std::min(static_cast<std::size_t>(order.key_rows), order.keys.size() - first);
        std::vector<std::int32_t> keys(order.keys.begin() + static_cast<std::ptrdiff_t>(first),
                                       order.keys.begin() + static_cast<std::ptrdiff_t>(first + count));
        for (std::int32_t& j : keys) j += static_cast<std::int32_t>(piece.k_begin);
        std::sort(keys.begin(), keys.end());
        own.keys.push_back(builder.add_tokens(keys));
        std::vector<std::int32_t> outside = samples_outside(order, head, b);
        for (std::int32_t& i : outside) {
          i += static_cast<std::int32_t>(first_sample[number] + head * params_.samples);
        }
        own.samples.push_back(builder.add_tokens(outside));
        own.count.push_back(static_cast<std::int64_t>(outside.size()));
      }
      own.place.resize(static_cast<std::size_t>(piece.queries()));
      const std::vector<std::int32_t>& queries = order.queries[static_cast<std::size_t>(head)];
      for (std::size_t i = 0; i < queries.size(); ++i) own.place[queries[i]] = static_cast<std::int32_t>(i);
    }
    const std::int64_t offset = problem.q_offset_of(s);
    for (std::int64_t r = 0; r < problem.q_len_of(s); ++r) {
      for (const Piece& piece : pieces.exact) {
        if (piece.sequence != s || r < piece.q_begin || r >= piece.q_end) continue;
        const std::int64_t end = piece.causal ? std::min(piece.k_end, offset + r + 1) : piece.k_end;
        if (end > piece.k_begin) builder.run(piece.k_begin, end - piece.k_begin);
      }
      for (std::size_t i = 0; i < lists.size(); ++i) {
        const Sorted& order = *sorted[i].second;
        const Piece& piece = pieces.hashed[sorted[i].first];
        if (r < piece.q_begin || r >= piece.q_end) continue;
        const std::int64_t b = lists[i].place[r - piece.q_begin] / order.query_rows;
        const std::int64_t keys = std::min(order.key_rows, piece.keys() - b * order.key_rows);
        builder.gather(lists[i].keys[b], keys);
        builder.gather(lists[i].samples[b], lists[i].count[b], EntryMask::none, 0, 1);
      }
      builder.end_row();
    }
    return std::move(builder).finish();
  }

  Params params_;
  std::vector<std::int64_t> layers_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(hyper, tessera::HyperAttention);
