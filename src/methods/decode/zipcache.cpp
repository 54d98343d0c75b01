// ZipCache (ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification,
// arXiv:2405.14256): every token is quantised, those that matter with more bits.
//
// Probe queries judge the prompt: its last 5% and as many random earlier ones. A = softmax(q.k / sqrt D) of these
// alone, causal. Key i of a kv head has the saliency sum(A over probes and over the query heads of the group) / (number
// of probes that see it); plain sums over-rate early tokens, which more probes see. The lowest floor(r * N) tokens of
// each kv head are unimportant, the others important; either class is quantised with its own number of bits. Keys: per
// channel, over the tokens of the class. Values: first divided by sqrt(max |v|) of their channel, then per token, over
// the channels of all heads together (channel-separable tokenwise quantisation). New tokens stay whole until there are
// `interval` of them; the attention of the current query splits them in the same ratio, and they are quantised and
// appended, with scales of their own. Decoding multiplies codes (kernels/quantized_attention.h).
//
// Tokens of a class of 16 bits are no codes: they stay as they are, in the cache's own type.
//
// Differs from the authors' code: it divides by N - i, which is the number of probes up to a factor when they lie
// evenly; here they are counted. Random probes are one of each stretch of the prompt, so that a prompt in chunks is
// probed alike. As there, the channels' square roots are of both classes together, and "token" number i of a class is
// the i-th of every kv head, which may be different ones of the text. Queries of a group judge one list per kv head
// (theirs: one per query head, with repeated keys). Which token a row is need not be kept, for rotated keys can be
// summed in any order. Scales are floats of 32 bits.
//
// A further prompt attends to what is there and is judged, by its own probes, and quantised at its end, with the tokens
// decoded before it that were still whole. plan() is dense: every token is attended to.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "cache/quantized_store.h"
#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "kernels/quantized_attention.h"
#include "methods/compressing_cache.h"
#include "methods/registry.h"
#include "score/row_probe.h"
#include "score/score_order.h"

namespace tessera {
namespace {

struct ZipCacheParams {
  double unimportant = 0.4;
  std::int64_t important_bits = 4;
  std::int64_t unimportant_bits = 2;
  std::int64_t interval = 100;
  double recent_probes = 0.05;
  double random_probes = 0.05;
  void visit(ParameterList& v) {
    v("unimportant", unimportant, 0, 1, "share of the tokens that get fewer bits");
    v("important_bits", important_bits, 2, 16, "bits of a number of the other tokens: 2, 3, 4 or 8; 16: as they are");
    v("unimportant_bits", unimportant_bits, 2, 16, "bits of a number of theirs: 2, 3, 4 or 8; 16: as they are");
    v("interval", interval, 1, kMostTokens, "decoded tokens that are quantised together");
    v("recent_probes", recent_probes, 0, 1,
      "share of the prompt at its end whose queries judge it, at least one query");
    v("random_probes", random_probes, 0, 1, "share of the prompt, before that, whose queries judge it");
  }
};

/// Queries that judge a prompt, gathered while it comes in and its length is not known yet.
class Probes {
 public:
  Probes(const ZipCacheParams& params, const LayerCacheShape& shape)
      : recent_(params.recent_probes),
        stretch_(params.random_probes > 0 ? (1 - params.recent_probes) / params.random_probes : 0),
        q_heads_(shape.q_heads),
        head_dim_(shape.head_dim) {}

  /// Queries of the last tokens of `tokens`, with the LSE of each [q_heads][rows], or none.
  void observe(const TensorView& q, std::int64_t tokens, std::span<const float> lse) {
    const std::int64_t rows = q.tokens();
    if (positions_.empty()) {
      begin_ = tokens - rows;
      lse_known_ = true;
    }
    // What the pass before this one needs is kept in case this one is taken back.
    drop_unneeded(tokens - rows - begin_);
    const std::int64_t first = tokens - rows - begin_;
    const std::int64_t last = tokens - begin_;
    std::vector<std::int64_t> chosen = random_positions(first, last);
    for (std::int64_t p = std::max(first, recent_begin(last)); p < last; ++p) chosen.push_back(p);
    std::sort(chosen.begin(), chosen.end());
    chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
    for (const std::int64_t p : chosen) add(q, p - first, p, lse);
  }
  /// One query that judges alone: the last of `tokens`.
  void observe_one(const TensorView& q, std::int64_t tokens, std::span<const float> lse) {
    clear();
    lse_known_ = true;
    add(q, q.tokens() - 1, tokens - 1, lse);
  }
  /// The prompt has `tokens` tokens with all before it: what judges it is left.
  void settle(std::int64_t tokens) { drop_unneeded(tokens - begin_); }

  /// [1, q_heads, probes, head_dim] of f32.
  TensorView queries() const {
    return view_of(queries_.data(), DType::f32, {1, q_heads_, std::ssize(positions_), head_dim_}, Layout::bnhd);
  }
  std::int64_t count() const { return std::ssize(positions_); }
  std::int64_t position(std::int64_t probe) const { return begin_ + positions_[static_cast<std::size_t>(probe)]; }
  /// LSE of the probes of a query head; empty when not of every probe.
  std::vector<float> lse(std::int64_t q_head) const {
    std::vector<float> own;
    if (!lse_known_) return own;
    for (std::int64_t i = 0; i < count(); ++i) own.push_back(lse_[static_cast<std::size_t>(i * q_heads_ + q_head)]);
    return own;
  }

  /// Tokens beyond the first `tokens` never were.
  void truncate(std::int64_t tokens) {
    while (!positions_.empty() && begin_ + positions_.back() >= tokens) positions_.pop_back();
    resize();
  }
  void clear() {
    positions_.clear();
    begin_ = 0;
    std::vector<float>().swap(queries_);
    std::vector<float>().swap(lse_);
  }
  std::size_t memory_bytes() const { return (queries_.capacity() + lse_.capacity()) * sizeof(float); }

 private:
  std::int64_t width() const { return q_heads_ * head_dim_; }
  std::int64_t recent_begin(std::int64_t tokens) const {
    const auto recent = static_cast<std::int64_t>(std::ceil(recent_ * static_cast<double>(tokens)));
    return tokens - std::max<std::int64_t>(1, recent);
  }
  void resize() {
    queries_.resize(positions_.size() * static_cast<std::size_t>(width()));
    lse_.resize(positions_.size() * static_cast<std::size_t>(q_heads_));
  }

  /// The random position of each stretch that lies in [first, last).
  std::vector<std::int64_t> random_positions(std::int64_t first, std::int64_t last) const {
    std::vector<std::int64_t> chosen;
    if (stretch_ <= 0) return chosen;
    const auto begin_of = [&](std::int64_t i) {
      return static_cast<std::int64_t>(std::ceil(static_cast<double>(i) * stretch_));
    };
    for (auto i = static_cast<std::int64_t>(static_cast<double>(first) / stretch_); begin_of(i) < last; ++i) {
      const std::int64_t size = begin_of(i + 1) - begin_of(i);
      if (size <= 0) continue;
      std::mt19937 random(static_cast<std::uint32_t>(i));
      const std::int64_t p = begin_of(i) + static_cast<std::int64_t>(random()) % size;
      if (p >= first && p < last) chosen.push_back(p);
    }
    return chosen;
  }

  void add(const TensorView& q, std::int64_t row, std::int64_t position, std::span<const float> lse) {
    const auto probe = static_cast<std::size_t>(count());
    positions_.push_back(position);
    resize();
    lse_known_ = lse_known_ && !lse.empty();
    for (std::int64_t head = 0; head < q_heads_; ++head) {
      to_float(q.row(0, head, row), q.dtype, head_dim_,
               queries_.data() + static_cast<std::int64_t>(probe) * width() + head * head_dim_);
      if (lse.empty()) continue;
      lse_[probe * static_cast<std::size_t>(q_heads_) + static_cast<std::size_t>(head)] =
          lse[static_cast<std::size_t>(head * q.tokens() + row)];
    }
  }

  /// Keeps what a prompt of `tokens` tokens is judged by.
  void drop_unneeded(std::int64_t tokens) {
    const std::int64_t recent = recent_begin(tokens);
    const std::vector<std::int64_t> random = random_positions(0, std::max<std::int64_t>(0, recent));
    std::size_t kept = 0;
    for (std::size_t i = 0; i < positions_.size(); ++i) {
      const std::int64_t p = positions_[i];
      if (p < recent && !std::binary_search(random.begin(), random.end(), p)) continue;
      if (kept < i) {
        positions_[kept] = p;
        const std::int64_t to = static_cast<std::int64_t>(kept);
        const std::int64_t from = static_cast<std::int64_t>(i);
        std::copy_n(queries_.data() + from * width(), width(), queries_.data() + to * width());
        std::copy_n(lse_.data() + from * q_heads_, q_heads_, lse_.data() + to * q_heads_);
      }
      ++kept;
    }
    positions_.resize(kept);
    resize();
  }

  double recent_;
  double stretch_;  ///< tokens that one random probe stands for; 0: none
  std::int64_t q_heads_;
  std::int64_t head_dim_;
  std::int64_t begin_ = 0;               ///< where the prompt begins
  std::vector<std::int64_t> positions_;  ///< from there, ascending
  std::vector<float> queries_;           ///< [probes][q_heads][head_dim]
  std::vector<float> lse_;               ///< [probes][q_heads]
  bool lse_known_ = true;
};

/// Bits of a class whose tokens are kept in the cache's own type.
constexpr std::int64_t kExactBits = 16;

/// Codes of the tokens of one class of every kv head; none where the class is exact.
struct Class {
  bool exact;
  QuantizedStore keys;
  QuantizedStore values;

  Class(const LayerCacheShape& shape, std::int64_t bits)
      : exact(bits == kExactBits),
        keys(QuantizedSide::keys, shape.kv_heads, shape.head_dim,
             {.bits = code_bits(bits), .scales = QuantizedScales::channel}),
        values(QuantizedSide::values, shape.kv_heads, shape.value_dim,
               {.bits = code_bits(bits), .scales = QuantizedScales::token_of_layer, .channel_factors = true}) {}

 private:
  static int code_bits(std::int64_t bits) { return static_cast<int>(bits == kExactBits ? 8 : bits); }
};

class ZipCacheCache final : public CompressingCache {
 public:
  ZipCacheCache(const ZipCacheParams& params, const LayerCacheShape& shape)
      : CompressingCache(shape),
        params_(params),
        probes_(params, shape),
        important_(shape, params.important_bits),
        unimportant_(shape, params.unimportant_bits),
        exact_(shape),
        heads_(static_cast<std::size_t>(shape.kv_heads)) {}

 private:
  using Lists = std::vector<std::vector<std::int32_t>>;  ///< [kv_heads]: tokens from the oldest whole one, ascending

  void observe_pass(const CacheCall& call, std::span<const float> lse, const PlanContext&) override {
    if (call.prompt) {
      probes_.observe(call.q, tokens(), lse);
    } else if (size_of_head(0) >= params_.interval) {
      probes_.observe_one(call.q, tokens(), lse);
    }
  }

  std::int64_t due(std::int64_t whole_tokens, bool prompt_ended) const override {
    return prompt_ended ? whole_tokens : whole_tokens / params_.interval * params_.interval;
  }

  void compress(const WholeRows& rows, std::int64_t count, const PlanContext& context) override {
    probes_.settle(tokens());
    const Lists classes = split(count, context);
    const auto unimportant = static_cast<std::int64_t>(params_.unimportant * static_cast<double>(count));
    // The important ones of a head come first in its list.
    const auto factors =
        important_.values.find_factors(count, reader(rows.values, classes, 0, shape().value_dim), context.run.threads);
    store(rows, classes, 0, count - unimportant, factors, important_, context);
    store(rows, classes, count - unimportant, unimportant, factors, unimportant_, context);
    probes_.clear();
  }

  /// Saliency of the oldest `count` whole tokens of a kv head.
  std::vector<float> saliency(std::int64_t head, std::span<const std::vector<float>> columns,
                              std::span<const std::int64_t> visible, std::int64_t count) const {
    std::vector<float> sums(static_cast<std::size_t>(count), 0.0F);
    for (std::int64_t q_head = head * shape().group(); q_head < (head + 1) * shape().group(); ++q_head) {
      const std::vector<float>& own = columns[static_cast<std::size_t>(q_head)];
      for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += own[j];
    }
    for (std::int64_t j = 0; j < count; ++j) {
      const auto seen_by = visible.end() - std::upper_bound(visible.begin(), visible.end(), j);
      if (seen_by > 0) sums[static_cast<std::size_t>(j)] /= static_cast<float>(seen_by);
    }
    return sums;
  }

  /// The important tokens of each kv head and then the others, both ascending.
  Lists split(std::int64_t count, const PlanContext& context) const {
    const std::int64_t oldest = tokens() - size_of_head(0);
    std::vector<std::int64_t> visible;
    for (std::int64_t i = 0; i < probes_.count(); ++i) visible.push_back(probes_.position(i) - oldest + 1);
    std::vector<std::vector<float>> columns(static_cast<std::size_t>(shape().q_heads));
    parallel_for(shape().q_heads, context.run.threads, [&](std::int64_t q_head, int) {
      const std::int64_t head = q_head / shape().group();
      AttentionInputs inputs = inputs_of_head(head);
      inputs.q = queries_of_kv_head(probes_.queries(), shape().group(), head);
      std::vector<float>& own = columns[static_cast<std::size_t>(q_head)];
      own.assign(static_cast<std::size_t>(size_of_head(head)), 0.0F);
      score::ProbeBuffers buffers;
      score::probe_columns(problem_of_head(head, probes_.count()), inputs, 0, q_head % shape().group(), visible,
                           probes_.lse(q_head), own, buffers);
    });
    const auto unimportant = static_cast<std::int64_t>(params_.unimportant * static_cast<double>(count));
    Lists lists;
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      const std::vector<float> scores = saliency(head, columns, visible, count);
      std::vector<std::int32_t> order(static_cast<std::size_t>(count));
      std::iota(order.begin(), order.end(), 0);
      const auto important = order.begin() + (count - unimportant);
      if (important != order.end()) std::nth_element(order.begin(), important, order.end(), score::ScoreOrder{scores});
      std::sort(order.begin(), important);
      std::sort(important, order.end());
      lists.push_back(std::move(order));
    }
    return lists;
  }

  /// Reads place `first` + token of every list.
  QuantizedStore::ReadRow reader(const std::vector<kernels::KeyRows>& from, const Lists& lists, std::int64_t first,
                                 std::int64_t dim) const {
    return [&from, &lists, first, dim, dtype = shape().dtype](std::int64_t head, std::int64_t token, float* row) {
      const auto h = static_cast<std::size_t>(head);
      to_float(from[h].row(lists[h][static_cast<std::size_t>(first + token)]), dtype, dim, row);
    };
  }

  /// Quantises places [first, first + count) of every list.
  void store(const WholeRows& rows, const Lists& lists, std::int64_t first, std::int64_t count,
             const QuantizedStore::ChannelFactors& factors, Class& to, const PlanContext& context) {
    if (count == 0) return;
    if (to.exact) return keep_exactly(rows, lists, first, count);
    to.keys.append(count, reader(rows.keys, lists, first, shape().head_dim), context.run.threads);
    to.values.append(count, reader(rows.values, lists, first, shape().value_dim), context.run.threads, factors);
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      kernels::QuantizedHead& own = heads_[static_cast<std::size_t>(head)];
      own.keys.push_back(to.keys.tiles(head, to.keys.batches() - 1));
      own.values.push_back(to.values.tiles(head, to.values.batches() - 1));
    }
  }

  /// The rows of the same places, in the cache's own type.
  void keep_exactly(const WholeRows& rows, const Lists& lists, std::int64_t first, std::int64_t count) {
    const std::int64_t oldest = tokens() - size_of_head(0);
    for (std::int64_t head = 0; head < shape().kv_heads; ++head) {
      const auto h = static_cast<std::size_t>(head);
      for (std::int64_t i = first; i < first + count; ++i) {
        const std::int32_t token = lists[h][static_cast<std::size_t>(i)];
        exact_.append_stored(head, oldest + token, rows.keys[h].row(token), rows.values[h].row(token));
      }
    }
  }

  void attend_compressed(const TensorView& q, Branch& out, const PlanContext& context) override {
    if (exact_.rows() == 0) return attend_codes(q, out, context);
    Branch exact(shape().q_heads * q.tokens(), shape().value_dim);
    attend_all_rows(exact_, heads_as_batch(q, shape().kv_heads), 1 / std::sqrt(static_cast<float>(shape().head_dim)),
                    exact, context.run);
    if (heads_[0].keys.empty()) {
      out = std::move(exact);
      return;
    }
    Branch codes(shape().q_heads * q.tokens(), shape().value_dim);
    attend_codes(q, codes, context);
    const MutableTensorView o =
        mutable_view_of(out.o.data(), DType::f32, {1, shape().q_heads, q.tokens(), shape().value_dim});
    merge_branches(codes, exact, {o, out.lse}, context.run.threads);
  }

  void attend_codes(const TensorView& q, Branch& out, const PlanContext& context) const {
    const kernels::QuantizedProblem problem{shape().group() * q.tokens(), shape().head_dim, shape().value_dim,
                                            1 / std::sqrt(static_cast<float>(shape().head_dim))};
    kernels::attend_quantized(problem, heads_, queries_as_float(q).data(), out.o.data(), out.lse.data(), context.run);
  }

  void truncated(std::int64_t tokens) override {
    probes_.truncate(tokens);
    if (tokens > 0) return;
    probes_.clear();
    for (Class* kind : {&important_, &unimportant_}) {
      kind->keys.clear();
      kind->values.clear();
    }
    exact_.reset();
    heads_.assign(heads_.size(), {});
  }

  std::size_t bytes_of_compressed() const override {
    return important_.keys.memory_bytes() + important_.values.memory_bytes() + unimportant_.keys.memory_bytes() +
           unimportant_.values.memory_bytes() + exact_.memory_bytes() + probes_.memory_bytes();
  }

  ZipCacheParams params_;
  Probes probes_;
  Class important_;
  Class unimportant_;
  HeadPages exact_;                            ///< tokens of exact classes
  std::vector<kernels::QuantizedHead> heads_;  ///< both classes as the kernel reads them
};

struct ZipCache {
  using Params = ZipCacheParams;
  static constexpr bool reads_inputs = false;
  static MethodInfo info() {
    return {.name = "zipcache",
            .family = "decode",
            .summary = "quantises every token, the salient ones with more bits, and decodes on the codes",
            .paper =
                "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification, "
                "arXiv:2405.14256",
            .phases = {.prefill = true, .decode = true},
            .budget = {{"unimportant", 1, 0}}};
  }

  explicit ZipCache(Params given) : params(given) {
    for (const auto& [name, bits] :
         {std::pair("important_bits", params.important_bits), std::pair("unimportant_bits", params.unimportant_bits)}) {
      require(bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == kExactBits,
              "zipcache: {}={}; expected 2, 3, 4, 8 or 16", name, bits);
    }
    require(params.recent_probes + params.random_probes <= 1,
            "zipcache: recent_probes={} and random_probes={}; expected a sum of at most 1", params.recent_probes,
            params.random_probes);
  }

  std::int64_t prefill_tile() const { return 1; }

  Plan plan(const Problem& problem, const AttentionInputs&, const PlanContext&) const { return dense_plan(problem); }

  std::unique_ptr<LayerCache> new_cache(const LayerCacheShape& shape, const PlanContext&) const {
    return std::make_unique<ZipCacheCache>(params, shape);
  }

  Params params;
};

}  // namespace
}  // namespace tessera

TESSERA_METHOD(zipcache, tessera::ZipCache);
