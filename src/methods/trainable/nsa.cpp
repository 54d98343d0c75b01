// Three branches per query: compressed blocks of all keys, the best blocks in full, and a window; added by gates.
//
// Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention (arXiv:2502.11089).
// 1. Compression: token t stands for keys [t * stride, t * stride + length), by mean or by learned weights with learned
//    positions inside the block. Keys are compressed before RoPE where `k_compress` gives them so, and rotated to the
//    first position of their block afterwards; else the keys as they are. The ragged tail is not compressed.
// 2. Compressed branch: softmax over the tokens that end at or before the query. None visible: output 0.
// 3. Importance of a selection block: the compressed probabilities of the tokens that overlap it, weighted by shared
//    strides, summed over the query heads of the group, so that these choose the same blocks.
// 4. Selected branch: the top_k most important blocks per query, the first `init` and the `local` blocks that end with
//    the query's own always among them and counted, causal inside the own block.
// 5. Window branch: the last `window` keys, the query's own among them.
// 6. O = sum over the branches of sigmoid(gate) * O_branch, one gate per token, query head and branch.
//
// Backward: the selection is a constant. Selected and window branch: the plan's backward pass under the gated output
// gradient. Compressed branch: the same over the compressed keys, then through RoPE and compression to keys, weights
// and positions. Outputs of the compressed and the window branch are computed again instead of stored. Of the selected
// one, the costliest, nothing but its product with dO is needed, and sigmoid(gate) dO . O_selected is what the products
// of dO with the two others leave of dO . O: the saved output and LSE are enough. Where that output has 16 bits, so has
// this number. Without a saved LSE all three are computed again. A compressed token that is rounded to 16 bits passes
// its gradient on as if it were not. Times of a backward call count all of it but the plans.
//
// Differs from the paper: independent keys and values of the branches are optional (side inputs), as in open versions;
// blocks after the query's own are left out of the top-k instead of dropped after it, which selects the same since
// their importance is 0 and ties go to the earlier block. Without causality all compressed tokens are visible and the
// window is symmetric. outputs.lse is that of the selected branch: a gated sum has none of its own.
//
// Decoding: a state keeps the compressed tokens of every layer, and each call adds those that its new keys complete.
// Keys before the queries of a call must be those of the calls before; later ones are read anew.
//
// Side inputs, all optional unless `compress` needs them (Hkv kv heads, l = length; any attention dtype):
//   gate_logits [B, Hq, Nq, 3]: compressed, selected, window; absent: 0. gate_bias_* is added.
//   k_compress [B, Hkv, Nk, D], v_compress [B, Hkv, Nk, Dv]: what is compressed; k_compress before RoPE.
//   k_window, v_window: keys (after RoPE) and values of the window branch.
//   positions_k [1, Hkv, l, D], positions_v [1, Hkv, l, Dv]: added to the rows of every block.
//   pool: pool_k, pool_v [1, Hkv, l, 1]. linear: linear_k [1, Hkv, l*D, D], linear_v [1, Hkv, l*Dv, Dv].
//   mlp: hidden_k [1, Hkv, l*D, H], output_k [1, Hkv, H, D], hidden_v, output_v likewise; ReLU between, no bias.
// Gradients under the same names are written where they are asked for.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "kernels/workspace.h"
#include "methods/compressed_tokens.h"
#include "methods/registry.h"
#include "score/block_importance.h"
#include "score/exponential.h"
#include "score/plan_rows.h"
#include "score/product.h"
#include "score/query_blocks.h"
#include "score/row_access.h"
#include "score/top_k.h"

namespace tessera {
namespace {

using score::CompressionKind;

constexpr std::size_t kBranches = 3;
enum Branch : std::size_t { kCompressed, kSelected, kWindow };

std::int64_t elements_of(const std::array<std::int64_t, 4>& shape) {
  return shape[0] * shape[1] * shape[2] * shape[3];
}

/// sum(a * b), in a fixed order that compilers vectorise.
float dot(const float* a, const float* b, std::int64_t count) {
  constexpr std::int64_t width = 16;
  float partial[width] = {};
  std::int64_t d = 0;
  for (; d + width <= count; d += width) {
    for (std::int64_t i = 0; i < width; ++i) partial[i] += a[d + i] * b[d + i];
  }
  float sum = 0;
  for (const float part : partial) sum += part;
  for (; d < count; ++d) sum += a[d] * b[d];
  return sum;
}

/// Contiguous tensors of one call in memory that its workspace keeps for the next one; their numbers are undefined.
class CallTensors {
 public:
  explicit CallTensors(Workspace* workspace) : workspace_(workspace) {}
  MutableTensorView make(DType dtype, const std::array<std::int64_t, 4>& shape) {
    buffers_.emplace_back(workspace_, static_cast<std::size_t>(elements_of(shape)) * size_of(dtype));
    return mutable_view_of(buffers_.back().data(), dtype, shape);
  }

 private:
  Workspace* workspace_;
  std::vector<kernels::BorrowedBuffer> buffers_;
};

/// body(b, h, n, thread) for all rows of a [B, H, N, *] tensor.
template <class Body>
void for_each_row(const std::array<std::int64_t, 4>& shape, int threads, const Body& body) {
  constexpr std::int64_t chunk = 64;
  const std::int64_t chunks = (shape[2] + chunk - 1) / chunk;
  parallel_for(shape[0] * shape[1] * chunks, threads, [&](std::int64_t i, int thread) {
    const std::int64_t row = i / chunks;
    const std::int64_t first = i % chunks * chunk;
    for (std::int64_t n = first; n < std::min(first + chunk, shape[2]); ++n) {
      body(row / shape[1], row % shape[1], n, thread);
    }
  });
}

/// One forward evaluation: plans, outputs and LSE of the branches.
struct Branches {
  CompressedTokens tokens;
  std::array<Plan, kBranches> plans;
  std::array<const float*, kBranches> o{};  ///< null: not run
  std::array<std::vector<float>, kBranches> lse;
  double plan_ms = 0;
  double kernel_ms = 0;
  RunReport report;
};

struct Nsa {
  struct Params {
    std::int64_t length = 32;
    std::int64_t stride = 16;
    CompressionKind compress = CompressionKind::mean;
    double rope_theta = 10000;
    std::int64_t block_size = 64;
    std::int64_t top_k = 16;
    std::int64_t init = 1;
    std::int64_t local = 2;
    std::int64_t window = 512;
    double gate_bias_compressed = 0;
    double gate_bias_selected = 0;
    double gate_bias_window = 0;
    void visit(ParameterList& v) {
      v("length", length, 1, 4096, "keys of a compressed token; a multiple of stride");
      v("stride", stride, 1, 4096, "keys from one compressed token to the next");
      v("compress", compress, {"mean", "pool", "linear", "mlp"},
        "how a block becomes a token; all but mean read weights from side inputs");
      v("rope_theta", rope_theta, 1, 1e9,
        "base of the rotary embedding of compressed tokens (with side input k_compress)");
      v("block_size", block_size, 1, 65536, "keys of a selection block; a multiple of stride");
      v("top_k", top_k, 1, kMostTokens, "selection blocks per query and group, forced ones among them");
      v("init", init, 0, kMostTokens, "first blocks that every query selects");
      v("local", local, 1, kMostTokens, "blocks up to the query's own that it selects");
      v("window", window, 1, kMostTokens, "keys of the window branch, the query's own among them");
      v("gate_bias_compressed", gate_bias_compressed, -100, 100, "added to the gate logits of the compressed branch");
      v("gate_bias_selected", gate_bias_selected, -100, 100, "added to the gate logits of the selected branch");
      v("gate_bias_window", gate_bias_window, -100, 100, "added to the gate logits of the window branch");
    }
  };
  static MethodInfo info() {
    return {.name = "nsa",
            .family = "trainable",
            .summary = "compressed, selected and window branches added by gates; natively trainable",
            .paper =
                "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, "
                "arXiv:2502.11089",
            .phases = {.prefill = true, .decode = true, .backward = true},
            .budget = {{"top_k", 2, 1 << 20, true}},
            .side = side_inputs()};
  }

  static std::vector<SideInputInfo> side_inputs() {
    using enum SideAxis;
    std::vector<SideInputInfo> side;
    const auto add = [&](const std::string& name, std::vector<SideAxis> axes, double range, std::string description) {
      side.push_back({.name = name,
                      .axes = std::move(axes),
                      .minimum = -range,
                      .maximum = range,
                      .required = false,
                      .description = std::move(description)});
    };
    add("gate_logits", {batch, q_heads, queries, width}, 4,
        "logits of the compressed, the selected and the window branch (w = 3); default 0");
    for (const auto& [of, dim] : {std::pair<std::string, SideAxis>{"k", head_dim}, {"v", value_dim}}) {
      const bool keys = of == "k";
      const std::string rows = keys ? "keys" : "values";
      add(of + "_compress", {batch, kv_heads, tokens, dim}, 1,
          fmt::format("{} that are compressed{}; default {}", rows, keys ? ", before RoPE" : "", of));
      add(of + "_window", {batch, kv_heads, tokens, dim}, 1,
          fmt::format("{} of the window branch; default {}; both or none of the two", rows, of));
      add("positions_" + of, {kv_heads, width, dim}, 0.1, "added to the rows of every block (w = length)");
      add("pool_" + of, {kv_heads, width, one}, 0.1, "weights of the rows of a block; needed with compress=pool");
      add("linear_" + of, {kv_heads, width, dim}, 0.1, "weights of a block's numbers; needed with compress=linear");
      add("hidden_" + of, {kv_heads, width, width}, 0.1, "first layer on a block's numbers; needed with compress=mlp");
      add("output_" + of, {kv_heads, width, dim}, 0.1, "second layer, after ReLU; needed with compress=mlp");
    }
    return side;
  }

  std::int64_t prefill_tile() const { return 1; }

  /// The selected branch: what the data decides. The other two follow from the shapes.
  Plan plan(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context) const {
    check(problem, inputs);
    return select(problem, inputs, compression().forward(problem, inputs, context), context.run);
  }

  RunReport attend(const Problem& problem, const AttentionInputs& inputs, const AttentionOutputs& outputs,
                   const PlanContext& context, Plan* executed) const {
    check(problem, inputs);
    CallTensors memory(context.run.workspace);
    Branches branches = run_branches(problem, inputs, context, nullptr, true, memory);
    for_each_row(outputs.o.shape, context.run.threads, [&](std::int64_t b, std::int64_t h, std::int64_t n, int) {
      const std::array<float, kBranches> gates = gates_of(inputs, b, h, n);
      const std::int64_t at = ((b * problem.q_heads + h) * problem.q_len + n) * problem.value_dim;
      std::vector<float> row(static_cast<std::size_t>(problem.value_dim), 0.0F);
      for (std::size_t m = 0; m < kBranches; ++m) {
        const float* o = branches.o[m] + at;
        for (std::size_t d = 0; d < row.size(); ++d) row[d] += gates[m] * o[d];
      }
      from_float(row.data(), problem.value_dim, outputs.o.dtype, outputs.o.row(b, h, n));
    });
    std::copy_n(branches.lse[kSelected].begin(), outputs.lse.size(), outputs.lse.begin());
    RunReport report = branches.report;
    report.plan_ms = branches.plan_ms;
    report.kernel_ms = branches.kernel_ms;
    if (executed != nullptr) *executed = std::move(branches.plans[kSelected]);
    return report;
  }

  RunReport backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                     const Gradients& gradients, const PlanContext& context, const Plan* executed) const {
    check(problem, inputs);
    check_backward(problem, inputs, saved, gradients);
    const auto start = std::chrono::steady_clock::now();
    const RunOptions& options = context.run;
    CallTensors memory(options.workspace);
    Branches branches = run_branches(problem, inputs, without_state(context), executed, saved.lse.empty(), memory);
    if (!saved.lse.empty()) branches.lse[kSelected].assign(saved.lse.begin(), saved.lse.end());
    std::array<MutableTensorView, kBranches> d_o;
    for (MutableTensorView& view : d_o) view = memory.make(saved.d_o.dtype, saved.d_o.shape);
    const std::vector<float> d_lse = gate_gradients(problem, inputs, saved, gradients, branches, d_o, options);

    // Of every branch in float: d_q, and d_k and d_v of its keys.
    std::array<MutableTensorView, kBranches> d_q;
    std::array<MutableTensorView, kBranches> d_k;
    std::array<MutableTensorView, kBranches> d_v;
    RunReport report;
    for (std::size_t m = 0; m < kBranches; ++m) {
      if (m == kCompressed && branches.tokens.most == 0) continue;
      d_q[m] = memory.make(DType::f32, inputs.q.shape);
      d_k[m] = memory.make(DType::f32, m == kCompressed ? branches.tokens.k.view.shape : inputs.k.shape);
      d_v[m] = memory.make(DType::f32, m == kCompressed ? branches.tokens.v.view.shape : inputs.v.shape);
      Gradients own;
      own.d_q = d_q[m];
      if (m == kCompressed) {
        own.sources.push_back({d_k[m], d_v[m], {}});
      } else {
        own.d_k = d_k[m];
        own.d_v = d_v[m];
      }
      SavedForward part;
      part.o = branches.o[m] == nullptr ? saved.o : view_of(branches.o[m], DType::f32, saved.d_o.shape);
      part.lse = branches.lse[m];
      part.d_o = view_of(d_o[m].data, d_o[m].dtype, d_o[m].shape);
      if (branches.o[m] == nullptr) part.d_lse = d_lse;
      report = run_backward(branches.plans[m], branch_inputs(inputs, branches.tokens, m), part, own, options);
    }
    write_sum({d_q[kSelected], d_q[kWindow], d_q[kCompressed]}, gradients.d_q, options);

    const MutableTensorView compressed_k = memory.make(DType::f32, inputs.k.shape);
    const MutableTensorView compressed_v = memory.make(DType::f32, inputs.v.shape);
    parallel_for(2 * problem.kv_heads, options.threads, [&](std::int64_t i, int) {
      const std::int64_t h = i / 2;
      if (i % 2 == 0) {
        compression().backward(problem, inputs, gradients, branches.tokens, d_k[kCompressed], "k", h, compressed_k);
      } else {
        compression().backward(problem, inputs, gradients, branches.tokens, d_v[kCompressed], "v", h, compressed_v);
      }
    });
    share_out(inputs, gradients, "k", d_k[kSelected], d_k[kWindow], compressed_k, gradients.d_k, options);
    share_out(inputs, gradients, "v", d_v[kSelected], d_v[kWindow], compressed_v, gradients.d_v, options);
    const std::chrono::duration<double, std::milli> all = std::chrono::steady_clock::now() - start;
    report.plan_ms = branches.plan_ms;
    report.kernel_ms = all.count() - branches.plan_ms;
    return report;
  }

  // ---- checks

  void check(const Problem& problem, const AttentionInputs& inputs) const {
    require(params.length % params.stride == 0, "nsa: length={} is not a multiple of stride={}", params.length,
            params.stride);
    require(params.block_size % params.stride == 0, "nsa: block_size={} is not a multiple of stride={}",
            params.block_size, params.stride);
    require(!inputs.modifiers.changes_scores() && inputs.modifiers.sink_logits.empty(),
            "nsa: modifiers of scores and sink logits are not supported");
    require(inputs.sources.empty(), "nsa: derived key sources are the method's own; {} given", inputs.sources.size());
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    const std::int64_t d = problem.head_dim;
    const std::int64_t dv = problem.value_dim;
    const std::int64_t l = params.length;
    const auto tokens = [&](std::int64_t dim) {
      return std::array<std::int64_t, 4>{batch, problem.kv_heads, problem.kv_len, dim};
    };
    const auto weights = [&](std::int64_t rows, std::int64_t columns) {
      return std::array<std::int64_t, 4>{1, problem.kv_heads, rows, columns};
    };
    check_side(inputs, "gate_logits", {batch, problem.q_heads, problem.q_len, 3}, false);
    for (const auto& [suffix, dim] : {std::pair{"k", d}, std::pair{"v", dv}}) {
      const std::string of = suffix;
      check_side(inputs, of + "_compress", tokens(dim), false);
      check_side(inputs, of + "_window", tokens(dim), false);
      check_side(inputs, "positions_" + of, weights(l, dim), false);
      if (params.compress == CompressionKind::pool) check_side(inputs, "pool_" + of, weights(l, 1), true);
      if (params.compress == CompressionKind::linear) check_side(inputs, "linear_" + of, weights(l * dim, dim), true);
      if (params.compress != CompressionKind::mlp) continue;
      const TensorView* hidden = inputs.find_side("hidden_" + of);
      check_side(inputs, "hidden_" + of, weights(l * dim, hidden == nullptr ? 1 : hidden->dim()), true);
      check_side(inputs, "output_" + of, weights(hidden->dim(), dim), true);
    }
    require(inputs.find_side("k_compress") == nullptr || d % 2 == 0,
            "nsa: head_dim={} is odd; rotary embedding of k_compress needs an even one", d);
    for (const char* name : {"k_window", "v_window"}) {
      const TensorView* side = inputs.find_side(name);
      require(side == nullptr || (side->dtype == inputs.k.dtype && !inputs.pages.used()),
              "nsa: side input '{}' needs the dtype of k ({}) and keys that do not lie in pages", name,
              name_of(inputs.k.dtype));
    }
    require((inputs.find_side("k_window") == nullptr) == (inputs.find_side("v_window") == nullptr),
            "nsa: side inputs 'k_window' and 'v_window' come together; one is missing");
  }

  static void check_side(const AttentionInputs& inputs, const std::string& name,
                         const std::array<std::int64_t, 4>& expected, bool needed) {
    const TensorView* side = inputs.find_side(name);
    require(side != nullptr || !needed, "nsa: side input '{}' is missing; expected shape [{}]", name,
            fmt::join(expected, ", "));
    if (side == nullptr) return;
    require(side->data != nullptr && is_attention_dtype(side->dtype) && side->strides[3] == 1,
            "nsa: side input '{}' needs data in f32, bf16 or f16 with stride 1 on its last axis", name);
    require(side->shape == expected, "nsa: side input '{}' has shape [{}]; expected [{}]", name,
            fmt::join(side->shape, ", "), fmt::join(expected, ", "));
  }

  static void check_backward(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                             const Gradients& gradients) {
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    const std::array<std::int64_t, 4> shape{batch, problem.q_heads, problem.q_len, problem.value_dim};
    require(saved.d_o.data != nullptr && is_attention_dtype(saved.d_o.dtype) && saved.d_o.shape == shape &&
                saved.d_o.strides[3] == 1,
            "nsa: d_o has shape [{}]; expected [{}] with data in f32, bf16 or f16", fmt::join(saved.d_o.shape, ", "),
            fmt::join(shape, ", "));
    const std::int64_t rows = batch * problem.q_heads * problem.q_len;
    require(saved.lse.empty() || static_cast<std::int64_t>(saved.lse.size()) == rows,
            "nsa: lse has {} elements; expected {}, or none where the selected branch is to be run again",
            saved.lse.size(), rows);
    require(saved.lse.empty() || (saved.o.data != nullptr && is_attention_dtype(saved.o.dtype) &&
                                  saved.o.shape == shape && saved.o.strides[3] == 1),
            "nsa: o has shape [{}]; expected [{}] with data in f32, bf16 or f16 beside an LSE",
            fmt::join(saved.o.shape, ", "), fmt::join(shape, ", "));
    require(saved.d_lse.empty(), "nsa: a gated sum has no LSE; d_lse has {} elements", saved.d_lse.size());
    require(!inputs.pages.used(), "nsa: keys lie in pages; the backward pass needs them in one tensor");
    const auto fits = [](const MutableTensorView& view, const TensorView& like, std::string_view name) {
      if (view.data == nullptr) return;
      require(is_attention_dtype(view.dtype) && view.shape == like.shape && view.strides[3] == 1,
              "nsa: gradient '{}' has shape [{}]; expected [{}] in f32, bf16 or f16", name, fmt::join(view.shape, ", "),
              fmt::join(like.shape, ", "));
    };
    fits(gradients.d_q, inputs.q, "d_q");
    fits(gradients.d_k, inputs.k, "d_k");
    fits(gradients.d_v, inputs.v, "d_v");
    for (const SideGradient& side : gradients.side) {
      const TensorView* input = inputs.find_side(side.name);
      require(input != nullptr, "nsa: gradient of side input '{}' is wanted, which is not given", side.name);
      fits(side.view, *input, side.name);
    }
  }

  // ---- compression

  TokenCompression compression() const { return {params.length, params.stride, params.compress, params.rope_theta}; }

  static PlanContext without_state(PlanContext context) {
    context.state = nullptr;
    return context;
  }

  std::unique_ptr<MethodState> new_state() const { return std::make_unique<CompressedTokenState>(); }

  // ---- plans

  /// Compressed tokens that a query at this position sees.
  std::int64_t visible_tokens(const Problem& problem, std::int64_t position, std::int64_t count) const {
    if (!problem.causal) return count;
    if (position < params.length - 1) return 0;
    return std::min(count, (position - params.length + 1) / params.stride + 1);
  }

  Plan compressed_plan(const Problem& problem, const CompressedTokens& tokens) const {
    constexpr std::int64_t tile_q = 128;
    PlanBuilder builder(problem, tile_q, 16, 1, problem.variable_length() ? problem.batch : 1);
    const std::uint16_t source = builder.add_source({"compressed", tokens.most, false});
    for (std::int64_t block = 0; block < builder.blocks(); ++block) {
      const std::int64_t count = tokens.counts[static_cast<std::size_t>(block)];
      const score::QueryTiles tiles(problem, block, tile_q, 16);
      for (std::int64_t tile = 0; tile < tiles.count(); ++tile) {
        const std::int64_t common = visible_tokens(problem, tiles.first_position(tile), count);
        const std::int64_t most = visible_tokens(problem, tiles.last_position(tile), count);
        builder.run(0, common, EntryMask::none, 0, source);
        if (most > common) {
          const std::int64_t words = (most - common + 63) / 64;
          std::vector<std::uint64_t> bits(static_cast<std::size_t>(tiles.rows(tile) * words), 0);
          for (std::int64_t r = 0; r < tiles.rows(tile); ++r) {
            const std::int64_t end = visible_tokens(problem, tiles.first_position(tile) + r, count) - common;
            for (std::int64_t t = 0; t < end; ++t) bits[r * words + t / 64] |= std::uint64_t{1} << (t % 64);
          }
          builder.run(common, most - common, EntryMask::bitmask, builder.add_mask(bits), source);
        }
        builder.end_row();
      }
    }
    return std::move(builder).finish();
  }

  Plan window_plan(const Problem& problem, const RunOptions& options) const {
    score::PlanRows rows(problem, 128, 128, 1, !problem.variable_length());
    const std::int64_t reach = params.window - 1;
    const std::int64_t band = rows.add_band({reach, problem.causal ? 0 : reach});
    for (std::int64_t block = 0; block < rows.blocks(); ++block) {
      const score::QueryTiles tiles = rows.geometry(block);
      for (std::int64_t tile = 0; tile < tiles.count(); ++tile) {
        const std::int64_t first = std::max<std::int64_t>(0, tiles.first_position(tile) - reach);
        const std::int64_t end =
            problem.causal ? tiles.visible_keys(tile) : std::min(tiles.keys, tiles.last_position(tile) + reach + 1);
        rows.row(block, tile).run(first, end, EntryMask::band, band);
      }
    }
    return std::move(rows).finish(options.threads);
  }

  Plan select(const Problem& problem, const AttentionInputs& inputs, const CompressedTokens& tokens,
              const RunOptions& options) const {
    struct Scratch {
      std::vector<float> queries;
      std::vector<float> scores;
      std::vector<float> importance;
      std::vector<std::uint8_t> forced;
    };
    std::vector<Scratch> scratch(static_cast<std::size_t>(thread_count(options.threads)));
    std::vector<std::vector<float>> keys(static_cast<std::size_t>(problem.batch * problem.kv_heads));
    parallel_for(static_cast<std::int64_t>(keys.size()), options.threads, [&](std::int64_t i, int) {
      const std::int64_t count = tokens.counts[static_cast<std::size_t>(i / problem.kv_heads)];
      keys[static_cast<std::size_t>(i)].resize(static_cast<std::size_t>(count * problem.head_dim));
      for (std::int64_t t = 0; t < count; ++t) {
        to_float(tokens.k.view.row(i / problem.kv_heads, i % problem.kv_heads, t), tokens.k.view.dtype,
                 problem.head_dim, keys[static_cast<std::size_t>(i)].data() + t * problem.head_dim);
      }
    });
    score::PlanRows rows(problem, 1, params.block_size, problem.kv_heads);
    constexpr std::int64_t queries_at_once = 16;
    const auto select_band = [&](std::int64_t block, std::int64_t first, std::int64_t count, int thread) {
      const score::QueryTiles tiles = rows.geometry(block);
      const std::int64_t blocks = tiles.key_tiles();
      const std::int64_t sequence = rows.sequence_of(block);
      const std::vector<float>& own_keys = keys[static_cast<std::size_t>(block)];
      const std::int64_t token_count = tokens.counts[static_cast<std::size_t>(sequence)];
      Scratch& own = scratch[static_cast<std::size_t>(thread)];
      own.queries.resize(static_cast<std::size_t>(count * problem.head_dim));
      own.scores.resize(static_cast<std::size_t>(count * token_count));
      own.importance.assign(static_cast<std::size_t>(count * blocks), 0.0F);
      for (std::int64_t g = 0; g < problem.group() && token_count > 0; ++g) {
        score::load_queries(problem, inputs, sequence, rows.head_of(block) + g, first, count, own.queries.data());
        score::multiply_transposed(own.queries.data(), count, problem.head_dim, own_keys.data(), token_count,
                                   problem.head_dim, problem.head_dim, problem.softmax_scale(), own.scores.data(),
                                   token_count);
        for (std::int64_t i = 0; i < count; ++i) {
          float* row = own.scores.data() + i * token_count;
          const std::int64_t visible = visible_tokens(problem, tiles.first_position(first + i), token_count);
          if (visible == 0) continue;
          score::exponentiate(row, visible, score::row_maximum(row, visible));
          const float sum = score::row_sum(row, visible);
          for (std::int64_t t = 0; t < visible; ++t) row[t] /= sum;
          score::add_block_importance({row, static_cast<std::size_t>(visible)}, params.block_size / params.stride,
                                      params.length / params.stride,
                                      {own.importance.data() + i * blocks, static_cast<std::size_t>(blocks)});
        }
      }
      for (std::int64_t i = 0; i < count; ++i) {
        choose(tiles, first + i, {own.importance.data() + i * blocks, static_cast<std::size_t>(blocks)}, own.forced,
               rows.row(block, first + i));
      }
    };
    rows.for_each_band(queries_at_once, options.threads, select_band);
    return std::move(rows).finish(options.threads);
  }

  void choose(const score::QueryTiles& tiles, std::int64_t query, std::span<const float> importance,
              std::vector<std::uint8_t>& forced, score::PlanRow& row) const {
    const std::int64_t visible = tiles.visible_tiles(query);
    const std::int64_t own = score::own_block(tiles, query);
    forced.assign(static_cast<std::size_t>(visible), 0);
    for (std::int64_t j = 0; j < visible; ++j) {
      if (j < params.init || (j <= own && j > own - params.local)) forced[static_cast<std::size_t>(j)] = 1;
    }
    const auto candidates = importance.first(static_cast<std::size_t>(visible));
    score::add_query_blocks(tiles, query, score::top_k(candidates, params.top_k, forced), row);
  }

  // ---- branches

  static AttentionInputs branch_inputs(const AttentionInputs& inputs, const CompressedTokens& tokens,
                                       std::size_t branch) {
    AttentionInputs own;
    own.q = inputs.q;
    own.k = inputs.k;
    own.v = inputs.v;
    own.pages = inputs.pages;
    if (branch == kCompressed) own.sources.push_back({tokens.k.view, tokens.v.view, {}});
    if (branch == kWindow && inputs.find_side("k_window") != nullptr) {
      own.k = *inputs.find_side("k_window");
      own.v = *inputs.find_side("v_window");
    }
    return own;
  }

  /// `selected` is the plan of an earlier call with these inputs, or null; that branch is run where asked for. Outputs
  /// lie in `memory`.
  Branches run_branches(const Problem& problem, const AttentionInputs& inputs, const PlanContext& context,
                        const Plan* selected, bool run_selected, CallTensors& memory) const {
    const RunOptions& options = context.run;
    const auto start = std::chrono::steady_clock::now();
    Branches branches;
    branches.tokens = compression().forward(problem, inputs, context);
    if (branches.tokens.most > 0) branches.plans[kCompressed] = compressed_plan(problem, branches.tokens);
    branches.plans[kSelected] = selected != nullptr ? *selected : select(problem, inputs, branches.tokens, options);
    branches.plans[kWindow] = window_plan(problem, options);
    branches.plan_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    const std::array<std::int64_t, 4> shape{batch, problem.q_heads, problem.q_len, problem.value_dim};
    for (std::size_t m = 0; m < kBranches; ++m) {
      if (m == kSelected && !run_selected) continue;
      const MutableTensorView o = memory.make(DType::f32, shape);
      branches.o[m] = reinterpret_cast<const float*>(o.data);
      branches.lse[m].assign(static_cast<std::size_t>(batch * problem.q_heads * problem.q_len),
                             -std::numeric_limits<float>::infinity());
      if (m == kCompressed && branches.tokens.most == 0) {
        std::fill_n(reinterpret_cast<float*>(o.data), elements_of(shape), 0.0F);
        continue;
      }
      const RunReport report =
          run(branches.plans[m], branch_inputs(inputs, branches.tokens, m), {o, branches.lse[m]}, options);
      branches.kernel_ms += report.kernel_ms;
      if (m == kSelected) branches.report = report;
    }
    return branches;
  }

  std::array<float, kBranches> gates_of(const AttentionInputs& inputs, std::int64_t b, std::int64_t h,
                                        std::int64_t n) const {
    std::array<float, kBranches> gates{static_cast<float>(params.gate_bias_compressed),
                                       static_cast<float>(params.gate_bias_selected),
                                       static_cast<float>(params.gate_bias_window)};
    const TensorView* logits = inputs.find_side("gate_logits");
    for (std::size_t m = 0; m < kBranches; ++m) {
      if (logits != nullptr) {
        gates[m] += load_as_float(logits->row(b, h, n), logits->dtype, static_cast<std::int64_t>(m));
      }
      gates[m] = 1 / (1 + std::exp(-gates[m]));
    }
    return gates;
  }

  /// Writes the output gradients of the branches to d_o[m], and those of the gate logits. Where the selected
  /// branch was not run: returns the gradient of its LSE that turns dO_selected . O into dO_selected . O_selected.
  std::vector<float> gate_gradients(const Problem& problem, const AttentionInputs& inputs, const SavedForward& saved,
                                    const Gradients& gradients, const Branches& branches,
                                    const std::array<MutableTensorView, kBranches>& d_o,
                                    const RunOptions& options) const {
    const bool from_sum = branches.o[kSelected] == nullptr;
    const MutableTensorView* d_logits = gradients.find_side("gate_logits");
    const std::int64_t dim = problem.value_dim;
    std::vector<float> d_lse(from_sum ? branches.lse[kSelected].size() : 0);
    std::vector<std::vector<float>> scratch(static_cast<std::size_t>(thread_count(options.threads)));
    for_each_row(saved.d_o.shape, options.threads, [&](std::int64_t b, std::int64_t h, std::int64_t n, int thread) {
      std::vector<float>& own = scratch[static_cast<std::size_t>(thread)];
      own.resize(static_cast<std::size_t>(3 * dim));
      float* given = own.data();
      float* scaled = given + dim;
      float* o = scaled + dim;
      const std::array<float, kBranches> gates = gates_of(inputs, b, h, n);
      const std::int64_t row = (b * problem.q_heads + h) * problem.q_len + n;
      to_float(saved.d_o.row(b, h, n), saved.d_o.dtype, dim, given);
      if (from_sum) to_float(saved.o.row(b, h, n), saved.o.dtype, dim, o);
      std::array<float, kBranches> shares{};  // gate * dO . O_branch
      for (std::size_t m = 0; m < kBranches; ++m) {
        if (branches.o[m] != nullptr) shares[m] = gates[m] * dot(given, branches.o[m] + row * dim, dim);
        for (std::int64_t d = 0; d < dim; ++d) scaled[d] = gates[m] * given[d];
        std::byte* to = d_o[m].row(b, h, n);
        from_float(scaled, dim, d_o[m].dtype, to);
        if (m != kSelected || !from_sum) continue;
        to_float(to, d_o[m].dtype, dim, scaled);  // as rounded
        d_lse[static_cast<std::size_t>(row)] = dot(scaled, o, dim);
      }
      if (from_sum) {
        shares[kSelected] = dot(given, o, dim) - shares[kCompressed] - shares[kWindow];
        d_lse[static_cast<std::size_t>(row)] -= shares[kSelected];
      }
      for (std::size_t m = 0; m < kBranches && d_logits != nullptr && d_logits->data != nullptr; ++m) {
        store_from_float(d_logits->row(b, h, n), d_logits->dtype, static_cast<std::int64_t>(m),
                         shares[m] * (1 - gates[m]));
      }
    });
    return d_lse;
  }

  /// to = sum of float tensors of its shape; those without data count as 0.
  static void write_sum(const std::array<MutableTensorView, kBranches>& from, const MutableTensorView& to,
                        const RunOptions& options) {
    if (to.data == nullptr) return;
    const std::int64_t dim = to.shape[3];
    std::vector<std::vector<float>> scratch(static_cast<std::size_t>(thread_count(options.threads)));
    for_each_row(to.shape, options.threads, [&](std::int64_t b, std::int64_t h, std::int64_t n, int thread) {
      std::vector<float>& sum = scratch[static_cast<std::size_t>(thread)];
      sum.assign(static_cast<std::size_t>(dim), 0.0F);
      for (const MutableTensorView& tensor : from) {
        if (tensor.data == nullptr) continue;
        const auto* row = reinterpret_cast<const float*>(tensor.row(b, h, n));
        for (std::int64_t d = 0; d < dim; ++d) sum[d] += row[d];
      }
      from_float(sum.data(), dim, to.dtype, to.row(b, h, n));
    });
  }

  /// Gradients of the three uses of keys (or values) to the tensors they were read from.
  static void share_out(const AttentionInputs& inputs, const Gradients& gradients, const std::string& of,
                        const MutableTensorView& selected, const MutableTensorView& window,
                        const MutableTensorView& compressed, const MutableTensorView& to, const RunOptions& options) {
    std::array<MutableTensorView, kBranches> same{selected, {}, {}};
    const auto place = [&](const std::string& name, const MutableTensorView& own, MutableTensorView& among) {
      if (inputs.find_side(name) == nullptr) {
        among = own;
      } else if (const MutableTensorView* side = gradients.find_side(name)) {
        write_sum({own, {}, {}}, *side, options);
      }
    };
    place(of + "_window", window, same[1]);
    place(of + "_compress", compressed, same[2]);
    write_sum(same, to, options);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(nsa, tessera::Nsa);
