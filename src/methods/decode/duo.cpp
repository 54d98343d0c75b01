// Retrieval heads keep every token, streaming heads the sinks and the recent ones.
//
// DuoAttention (DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads,
// arXiv:2410.10819), the deployment of its result: a configuration file says for every layer and kv head whether it is
// a retrieval head (gate at least `threshold`, or all but the `sparsity` lowest gates). Retrieval heads are dense. A
// query at position p of a streaming head sees the keys j <= p with j < sink or p - j < recent, and its cache is a ring
// of that size beside the sinks. A prompt that this method itself runs comes in by chunks, of which streaming heads
// keep no more than that, so that their memory is constant; a prompt that another prefill method runs is whole until
// its end. Without a file all heads are retrieval heads.
//
// Differs from the authors' code: the window is counted from each query, so that the chunk length changes nothing;
// whole_chunk = true lets queries see sinks, the `recent` tokens before their chunk, and their whole chunk, as theirs
// do. Heads are not reordered so that classes are contiguous: here every kv head has pages of its own. The search for
// the gates is src/tune/retrieval_gates.h.
#include <algorithm>

#include "core/error.h"
#include "core/parallel.h"
#include "methods/head_classes.h"
#include "methods/registry.h"
#include "methods/window_cache.h"
#include "score/a_shape.h"
#include "score/plan_rows.h"

namespace tessera {
namespace {

class Duo {
 public:
  struct Params {
    Configuration heads;
    std::int64_t sink = -1;
    std::int64_t recent = -1;
    double threshold = 0.5;
    double sparsity = -1;
    bool whole_chunk = false;
    void visit(ParameterList& v) {
      v("heads", heads,
        "JSON {\"retrieval\": [[gate of each kv head] per layer]} or {\"heads\": table}; none: all are retrieval "
        "heads");
      v("sink", sink, -1, kMostTokens, "first tokens that streaming heads keep; -1: of the file, else 64");
      v("recent", recent, -1, kMostTokens, "last tokens that they see, itself included; -1: of the file, else 256");
      v("threshold", threshold, 0, 1, "least gate of a retrieval head");
      v("sparsity", sparsity, -1, 1, "share of all heads that stream, those of the lowest gates; -1: by threshold");
      v("whole_chunk", whole_chunk, "queries see their whole prompt chunk and `recent` tokens before it");
    }
  };
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "duo",
            .family = "decode",
            .summary = "full cache for retrieval heads, sinks and recent tokens for the others, by a head file",
            .paper =
                "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, "
                "arXiv:2410.10819",
            .phases = {.prefill = true, .decode = true},
            .budget = {{"sparsity", 1, 0}}};
  }

  explicit Duo(const Params& params) : whole_chunk_(params.whole_chunk) {
    require(params.recent != 0, "duo: recent=0 is outside [1, {}]", kMostTokens);
    require(params.sparsity >= 0 || params.sparsity == -1, "duo: sparsity={} is neither -1 nor in [0, 1]",
            params.sparsity);
    HeadClasses classes;
    if (!params.heads.empty()) {
      file_ = params.heads.name();
      classes = read_head_classes(params.heads);
      retrieval_ = classes.retrieval(params.threshold, params.sparsity);
    }
    const auto first_of = [](std::int64_t a, std::int64_t b, std::int64_t c) { return a >= 0 ? a : (b >= 0 ? b : c); };
    shape_.n_init = first_of(params.sink, classes.sink, 64);
    shape_.n_local = first_of(params.recent, classes.recent, 256);
  }

  void check_model(std::int64_t layers, std::int64_t, std::int64_t kv_heads) const {
    if (retrieval_.empty()) return;
    require(std::ssize(retrieval_) == layers && std::ssize(retrieval_[0]) == kv_heads,
            "head classes '{}' are for {} layers of {} kv heads; the model has {} of {}", file_, retrieval_.size(),
            retrieval_[0].size(), layers, kv_heads);
  }

  std::int64_t prefill_tile() const { return whole_chunk_ ? 0 : 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext& context) const {
    check_layer(context.layer, problem.kv_heads);
    score::PlanRows rows(problem, 128, 128, problem.kv_heads, !problem.variable_length());
    const std::int64_t band = rows.add_band(shape_.band(problem.causal));
    for (std::int64_t block = 0; block < rows.blocks(); ++block) {
      const score::QueryTiles tiles = rows.geometry(block);
      const bool streams = !is_retrieval(context.layer, rows.head_of(block) / problem.group());
      parallel_for(tiles.count(), context.run.threads, [&](std::int64_t tile, int) {
        score::PlanRow& row = rows.row(block, tile);
        if (!streams) {
          row.everything(tiles, tile);
        } else if (whole_chunk_) {
          row.visible_run(tiles, tile, 0, shape_.n_init);
          row.visible_run(tiles, tile, std::max(shape_.n_init, tiles.offset - shape_.n_local), tiles.keys);
        } else {
          shape_.add(tiles, tile, band, row);
        }
      });
    }
    return std::move(rows).finish(context.run.threads);
  }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext& context) const {
    check_layer(context.layer, shape.kv_heads);
    std::vector<HeadWindow> windows;
    bool streams = false;
    for (std::int64_t head = 0; head < shape.kv_heads; ++head) {
      windows.push_back({!is_retrieval(context.layer, head), shape_.n_init, shape_.n_local});
      streams = streams || windows.back().limited;
    }
    if (!streams) return nullptr;
    // The next token is one of the recent ones, unless they are counted before it.
    const std::int64_t tail = whole_chunk_ ? shape_.n_local : shape_.n_local - 1;
    return std::make_unique<WindowCache>(shape, std::move(windows), tail, whole_chunk_);
  }

 private:
  bool is_retrieval(std::int64_t layer, std::int64_t head) const {
    return retrieval_.empty() || retrieval_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(head)];
  }
  void check_layer(std::int64_t layer, std::int64_t kv_heads) const {
    require(retrieval_.empty() || (layer < std::ssize(retrieval_) && std::ssize(retrieval_[0]) == kv_heads),
            "head classes '{}' are for {} layers of {} kv heads; this is layer {} with {}", file_, retrieval_.size(),
            retrieval_.empty() ? 0 : retrieval_[0].size(), layer, kv_heads);
  }

  std::string file_;
  std::vector<std::vector<bool>> retrieval_;  ///< [layer][kv head]; empty: all
  score::AShape shape_;
  bool whole_chunk_;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(duo, tessera::Duo);
