// One sequence in a model: prefill in chunks, decode token by token.
#include <algorithm>
#include <chrono>

#include "core/error.h"
#include "model/available_memory.h"
#include "model/int8_cache.h"
#include "model/layers/decoder.h"
#include "model/layers/layer_method.h"
#include "model/parts.h"
#include "tessera/cache.h"

namespace tessera {

namespace {

/// The default chunk: activations of one pass stay below this. Where the method says that parts of the prompt change
/// nothing (Method::prefill_tile), the smaller bound, beside which 64 MiB are hardly faster; other methods choose
/// better when they see more queries at once, and caches that evict hold one layer whole instead of all when the prompt
/// comes in one pass.
constexpr std::int64_t kActivationBytes = std::int64_t{1} << 30;
constexpr std::int64_t kPartActivationBytes = std::int64_t{48} << 20;
/// Shorter chunks would multiply too few rows with weights, and pack keys too often.
constexpr std::int64_t kLeastChunk = 1024;
/// A slice of logits stays below this.
constexpr std::int64_t kLogitBytes = std::int64_t{1} << 25;

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

void choose_methods(SessionOptions& options) {
  if (!options.prefill) options.prefill = make_method("dense");
  const MethodInfo& prefill = options.prefill->info();
  require(prefill.phases.prefill, "method '{}' does not support prefill", prefill.name);
  if (!options.decode) options.decode = prefill.phases.decode ? options.prefill : make_method("dense");
  const MethodInfo& decode = options.decode->info();
  require(decode.phases.decode, "method '{}' does not support decode; expected one that does, or none for dense",
          decode.name);
  // The same method given twice is one: it shares its state, and its cache may evict while the prompt comes in.
  if (decode.name == prefill.name && options.decode->parameters() == options.prefill->parameters()) {
    options.decode = options.prefill;
  }
}

/// Storage of rows that are kept as numbers; of 8-bit caches that of their newest tokens.
DType storage_of(CacheType type) {
  if (type == CacheType::bf16) return DType::bf16;
  return type == CacheType::f16 ? DType::f16 : DType::f32;
}

/// Base of the rotary embedding where all layers turn all pairs (i, i + head_dim / 2) by its powers; else 0. Caches
/// that turn keys know no other.
double plain_rope_theta(const ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  const bool plain = rope.scaling == RopeScaling::none && !rope.interleaved &&
                     (rope.dims == 0 || rope.dims == config.head_dim) &&
                     std::all_of(config.layer_kinds.begin(), config.layer_kinds.end(),
                                 [](const LayerConfig& layer) { return layer.rope == LayerRope::global; });
  return plain ? rope.theta : 0;
}

LayerCacheShape cache_shape(const ModelConfig& config, const SessionOptions& options) {
  require(options.capacity >= 0, "capacity is {}; expected 0 (the model's limit) or more", options.capacity);
  return {.q_heads = config.q_heads,
          .kv_heads = config.kv_heads,
          .head_dim = config.head_dim,
          .value_dim = config.head_dim,
          .dtype = storage_of(options.kv_dtype),
          .page_size = options.page_size,
          .capacity = options.capacity > 0 ? options.capacity : config.max_positions,
          .rope_theta = plain_rope_theta(config)};
}

}  // namespace

class Session::Implementation {
 public:
  Implementation(const Model& model, SessionOptions options)
      : model_(model),
        options_(std::move(options)),
        decoder_(model.config(), model.parts().weights),
        shape_(cache_shape(model.config(), options_)) {
    choose_methods(options_);
    require(!options_.chunk || *options_.chunk >= 0, "chunk is {}; expected 0 (whole prompt) or more",
            options_.chunk.value_or(0));
    if (options_.run.workspace == nullptr) options_.run.workspace = &workspace_;
    shape_.own_prompt = options_.prefill == options_.decode;
    const ModelConfig& config = model.config();
    for (const Method* method : {options_.prefill.get(), options_.decode.get()}) {
      method->check_model(config.layers, config.q_heads, config.kv_heads);
    }
    const MethodInfo& decode = options_.decode->info();
    require(config.attention_softcap == 0 || !decode.own_cache,
            "method '{}' keeps its own cache, which does not cap scores as {} does; expected a method without one",
            decode.name, config.architecture);
    for (std::int64_t layer = 0; layer < config.layers; ++layer) caches_.push_back(new_cache(layer));
    new_states();
  }

  const Model& model() const { return model_; }
  std::int64_t tokens() const { return tokens_; }
  std::int64_t capacity() const { return shape_.capacity; }
  const SessionStatistics& statistics() const { return statistics_; }

  std::size_t cache_bytes() const {
    std::size_t bytes = 0;
    for (const auto& cache : caches_) bytes += cache->memory_bytes();
    for (const auto& state : {prefill_state_.get(), decode_state_.get()}) bytes += state ? state->memory_bytes() : 0;
    return bytes;
  }

  double cache_tokens_kept() const {
    double rows = 0;
    for (const auto& cache : caches_) rows += static_cast<double>(cache->rows_kept());
    return rows / static_cast<double>(model_.config().layers * model_.config().kv_heads);
  }

  std::span<const float> prefill(std::span<const std::int32_t> tokens, const PrefillObserver& observer) {
    check(tokens);
    const auto total = static_cast<std::int64_t>(tokens.size());
    check_memory(total, 0);
    const auto start = std::chrono::steady_clock::now();
    observation_ms_ = 0;
    const Chunks chunks = chunks_of(total);
    const std::int64_t before = tokens_;
    for (std::int64_t first = 0, rows = 0; first < total; first += rows) {
      rows = chunks.rows(first, total);
      model::AttentionCall call;
      call.method = options_.prefill.get();
      call.state = prefill_state_.get();
      call.run = options_.run;
      call.prompt = true;
      call.prompt_ends = first + rows == total;
      call.exact = options_.exact_products;
      call.round_queries = round_queries();
      call.length = before + total;
      call.on_plan = [&](std::int64_t layer, const Plan& plan) {
        note_peak();  // before the layer's cache may compress
        observe([&] {
          count(layer, plan, rows, statistics_.planned_pairs, statistics_.allowed_pairs);
          if (options_.on_plan) options_.on_plan(layer, plan);
        });
      };
      if (options_.on_projections) {
        call.on_projections = [&](const ProjectedRows& projected) {
          observe([&] { options_.on_projections(projected); });
        };
      }
      call.after_layer = [&](std::int64_t done) {
        check_cancelled();
        if (!observer.on_progress) return;
        const double share = static_cast<double>(done) / static_cast<double>(model_.config().layers);
        observer.on_progress(static_cast<double>(first) + static_cast<double>(rows) * share, total);
      };
      const auto hidden =
          forward(tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows)), call);
      if (observer.on_logits) {
        give_logits(hidden, before + first, observer);
      } else if (first + rows == total) {
        decoder_.head(last_row(hidden), logits_, options_.run, options_.exact_products);
      }
    }
    statistics_.prefill_tokens += total;
    statistics_.prefill_ms += milliseconds_since(start) - observation_ms_;
    // The rows of a long prompt are not needed again: decoding takes one row.
    if (total > 4096) {
      decoder_.release();
      widened_ = {};
    }
    return last_logits();
  }

  std::span<const float> decode(std::int32_t token) {
    const std::span<const std::int32_t> tokens(&token, 1);
    check(tokens);
    check_cancelled();
    const auto start = std::chrono::steady_clock::now();
    MethodState* state = options_.decode == options_.prefill ? prefill_state_.get() : decode_state_.get();
    model::AttentionCall call;
    call.method = options_.decode.get();
    call.state = state;
    call.run = options_.run;
    call.exact = options_.exact_products;
    call.round_queries = round_queries();
    observation_ms_ = 0;
    if (options_.count_decoding) {
      call.on_plan = [&](std::int64_t layer, const Plan& plan) {
        observe([&] { count(layer, plan, 1, statistics_.decode_planned_pairs, statistics_.decode_allowed_pairs); });
      };
    }
    const auto hidden = forward(tokens, call);
    note_peak();
    decoder_.head(hidden, logits_, options_.run, options_.exact_products);
    statistics_.decode_tokens += 1;
    statistics_.decode_ms += milliseconds_since(start) - observation_ms_;
    return last_logits();
  }

  std::size_t memory_needed(std::int64_t prompt, std::int64_t decoded) const {
    const ModelConfig& config = model_.config();
    const bool own = options_.decode->info().own_cache;
    const std::int64_t page = shape_.page_size;
    const std::int64_t tokens = (tokens_ + prompt + decoded + page - 1) / page * page;
    const std::int64_t row = config.kv_heads * config.head_dim;
    double bytes = 0;
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
      if (own && layer > 0 && !in_window(layer)) continue;
      bytes += static_cast<double>(tokens) * 2 * bytes_per_row(row);
    }
    // 8-bit layers are widened one at a time.
    if (options_.kv_dtype == CacheType::i8) bytes += static_cast<double>(tokens) * 2 * 4 * static_cast<double>(row);
    const auto rows = static_cast<double>(std::min(chunks_of(prompt).longest, prompt));
    bytes += rows * static_cast<double>(model::Decoder::bytes_per_token(config));
    bytes += static_cast<double>(model::Decoder::scratch_bytes(config));
    bytes += 4.0 * static_cast<double>(config.vocab_size) + static_cast<double>(options_.run.workspace_bytes);
    return static_cast<std::size_t>(bytes);
  }

  void check_memory(std::int64_t prompt, std::int64_t decoded) const {
    require(prompt >= 0 && decoded >= 0, "{} tokens of prompt and {} decoded; expected 0 or more", prompt, decoded);
    if (options_.memory_limit < 0) return;
    const std::size_t needed = memory_needed(prompt, decoded);
    std::size_t limit = static_cast<std::size_t>(options_.memory_limit);
    if (limit == 0) {
      const std::optional<std::size_t> available = model::available_memory();
      if (!available) return;
      limit = *available + cache_bytes();  // what is held already counts on both sides
    }
    require(
        needed <= limit,
        "a prompt of {} tokens and {} more need {:.2f} GB for keys and values ({}) and activations, but {:.2f} GB are "
        "{}; shorten it, or take a smaller chunk or kv_dtype",
        tokens_ + prompt, decoded, static_cast<double>(needed) / 1e9, name_of(options_.kv_dtype),
        static_cast<double>(limit) / 1e9, options_.memory_limit == 0 ? "available" : "allowed");
  }

  void reset() {
    forget();
    decoder_.release();
    widened_ = {};
    statistics_ = {};
    logits_.clear();
    logits_.shrink_to_fit();
  }

 private:
  /// To bf16, as the cache rounds keys.
  bool round_queries() const { return options_.kv_dtype == CacheType::bf16 && !options_.exact_products; }

  /// Whether a layer may have to leave keys out that lie before its window.
  bool in_window(std::int64_t layer) const {
    const std::int64_t window = model_.config().layer(layer).window;
    return window > 0 && window < shape_.capacity;
  }

  /// Caches of methods know no window: such layers keep every token in pages.
  std::unique_ptr<LayerCache> new_cache(std::int64_t layer) {
    const PlanContext context{.layer = layer, .layers = model_.config().layers, .state = nullptr, .run = options_.run};
    std::unique_ptr<LayerCache> own = in_window(layer) ? nullptr : options_.decode->new_cache(shape_, context);
    if (options_.kv_dtype != CacheType::i8) return own ? std::move(own) : make_paged_cache(shape_);
    require(!own, "method '{}' keeps its own cache, so kv_dtype cannot be i8; expected f32, bf16 or f16",
            options_.decode->info().name);
    return model::make_int8_cache(shape_, widened_, !in_window(layer) && model_.config().attention_softcap == 0);
  }

  /// Bytes of a row of keys or values of all heads.
  double bytes_per_row(std::int64_t numbers) const {
    if (options_.kv_dtype != CacheType::i8)
      return static_cast<double>(numbers) * static_cast<double>(size_of(shape_.dtype));
    return static_cast<double>(numbers) + 8.0 * static_cast<double>(shape_.kv_heads);
  }

  /// A pass; when it fails, the tokens of the pass are forgotten, or all where a cache evicted older ones meanwhile.
  std::span<const float> forward(std::span<const std::int32_t> tokens, const model::AttentionCall& call) {
    try {
      const auto hidden = decoder_.forward(tokens, caches_, call, statistics_.attention_ms);
      tokens_ += static_cast<std::int64_t>(tokens.size());
      return hidden;
    } catch (...) {
      bool undone = true;
      for (const auto& cache : caches_) undone = cache->truncate(tokens_) && undone;
      if (!undone) forget();
      throw;
    }
  }

  void forget() {
    for (const auto& cache : caches_) cache->reset();
    tokens_ = 0;
    new_states();
  }

  void note_peak() { statistics_.cache_peak_bytes = std::max(statistics_.cache_peak_bytes, cache_bytes()); }

  void new_states() {
    prefill_state_ = options_.prefill->new_state();
    decode_state_ = options_.decode == options_.prefill ? nullptr : options_.decode->new_state();
  }

  void check(std::span<const std::int32_t> tokens) const {
    require(!tokens.empty(), "no tokens given; expected at least one");
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      require(tokens[i] >= 0 && tokens[i] < model_.config().vocab_size,
              "token {} at place {} is outside the vocabulary of {}", tokens[i], i, model_.config().vocab_size);
    }
    const std::int64_t length = tokens_ + static_cast<std::int64_t>(tokens.size());
    require(length <= shape_.capacity, "a sequence of {} tokens exceeds the limit of {} tokens", length,
            shape_.capacity);
  }

  void check_cancelled() const {
    if (options_.cancelled && options_.cancelled()) throw Cancelled("interrupted");
  }

  /// Tokens of a chunk and, where the last chunk takes what would be too short for one, of that.
  struct Chunks {
    std::int64_t length;
    std::int64_t longest;
    /// Tokens of the chunk that begins at `first` of `total`.
    std::int64_t rows(std::int64_t first, std::int64_t total) const {
      return total - first <= longest ? total - first : length;
    }
  };

  Chunks chunks_of(std::int64_t total) const {
    if (options_.chunk) {
      const std::int64_t length = *options_.chunk == 0 ? total : *options_.chunk;
      return {length, length};
    }
    const auto fitting = [&](std::int64_t bytes, std::int64_t step) {
      return std::max(step, bytes / model::Decoder::bytes_per_token(model_.config()) / step * step);
    };
    const std::int64_t tile = options_.decode->info().own_cache ? 0 : prefill_tile();
    if (tile == 0 || tokens_ % tile != 0) {
      const std::int64_t length = fitting(kActivationBytes, kLeastChunk);
      return {length, length};
    }
    const std::int64_t length = fitting(kPartActivationBytes, (kLeastChunk + tile - 1) / tile * tile);
    return {length, length + tile - 1};
  }

  /// Of the prefill method in all layers.
  std::int64_t prefill_tile() const {
    std::int64_t tile = 1;
    for (std::int64_t layer = 0; layer < model_.config().layers; ++layer) {
      const std::int64_t window = in_window(layer) ? model_.config().layer(layer).window : 0;
      tile = common_prefill_tile(tile, model::LayerMethod(*options_.prefill, window, 0).prefill_tile());
    }
    return tile;
  }

  /// What the times of a call leave out.
  template <typename Observation>
  void observe(const Observation& observation) {
    const auto start = std::chrono::steady_clock::now();
    observation();
    observation_ms_ += milliseconds_since(start);
  }

  void count(std::int64_t layer, const Plan& plan, std::int64_t rows, double& planned, double& allowed) const {
    planned += static_cast<double>(tessera::statistics(plan).planned_pairs);
    // Of the sequence, not of the plan: a cache that evicted plans over what it kept.
    const auto queries = static_cast<double>(rows);
    const auto before = static_cast<double>(tokens_);
    double pairs = queries * (before + (queries + 1) / 2);
    if (const std::int64_t window = model_.config().layer(layer).window; window > 0) {
      // Rows whose position is below the window see what is there, the others the window.
      const double growing = std::clamp(static_cast<double>(window) - before, 0.0, queries);
      pairs = growing * (before + (growing + 1) / 2) + (queries - growing) * static_cast<double>(window);
    }
    allowed += pairs * static_cast<double>(model_.config().q_heads);
  }

  std::span<const float> last_row(std::span<const float> hidden) const {
    return hidden.last(static_cast<std::size_t>(model_.config().hidden_size));
  }

  std::span<const float> last_logits() const {
    return std::span(logits_).last(static_cast<std::size_t>(model_.config().vocab_size));
  }

  void give_logits(std::span<const float> hidden, std::int64_t position, const PrefillObserver& observer) {
    const auto start = std::chrono::steady_clock::now();
    const ModelConfig& config = model_.config();
    const auto width = static_cast<std::size_t>(config.hidden_size);
    const auto fitting = kLogitBytes / (config.vocab_size * static_cast<std::int64_t>(sizeof(float)));
    const auto slice = static_cast<std::size_t>(std::clamp<std::int64_t>(fitting, 1, 1024));
    for (std::size_t first = 0; first < hidden.size() / width; first += slice) {
      const std::size_t rows = std::min(slice, hidden.size() / width - first);
      decoder_.head(hidden.subspan(first * width, rows * width), logits_, options_.run, options_.exact_products);
      observer.on_logits(position + static_cast<std::int64_t>(first), logits_);
      check_cancelled();
    }
    observation_ms_ += milliseconds_since(start);
  }

  const Model& model_;
  Workspace workspace_;
  SessionOptions options_;
  model::Decoder decoder_;
  LayerCacheShape shape_;
  model::WidenedRows widened_;                       ///< shared by 8-bit caches
  std::vector<std::unique_ptr<LayerCache>> caches_;  ///< per layer
  std::int64_t tokens_ = 0;
  std::unique_ptr<MethodState> prefill_state_;
  std::unique_ptr<MethodState> decode_state_;
  std::vector<float> logits_;  ///< the last row is that of the last token
  SessionStatistics statistics_;
  double observation_ms_ = 0;  ///< of the running prefill: plan statistics and logits that only an observer wants
};

Session::Session(const Model& model, SessionOptions options)
    : implementation_(std::make_unique<Implementation>(model, std::move(options))) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

const Model& Session::model() const {
  return implementation_->model();
}

const SessionStatistics& Session::statistics() const {
  return implementation_->statistics();
}

std::int64_t Session::tokens() const {
  return implementation_->tokens();
}

std::int64_t Session::capacity() const {
  return implementation_->capacity();
}

std::size_t Session::cache_bytes() const {
  return implementation_->cache_bytes();
}

double Session::cache_tokens_kept() const {
  return implementation_->cache_tokens_kept();
}

std::span<const float> Session::prefill(std::span<const std::int32_t> tokens) {
  return prefill(tokens, {});
}

std::span<const float> Session::prefill(std::span<const std::int32_t> tokens, const PrefillObserver& observer) {
  return implementation_->prefill(tokens, observer);
}

std::span<const float> Session::decode(std::int32_t token) {
  return implementation_->decode(token);
}

std::size_t Session::memory_needed(std::int64_t prompt, std::int64_t decoded) const {
  return implementation_->memory_needed(prompt, decoded);
}

void Session::check_memory(std::int64_t prompt, std::int64_t decoded) const {
  implementation_->check_memory(prompt, decoded);
}

void Session::reset() {
  implementation_->reset();
}

}  // namespace tessera
