// Running language models: load a folder in Hugging Face layout, prefill with any method, generate.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/attention.h"
#include "tessera/core.h"
#include "tessera/method.h"
#include "tessera/plan.h"

namespace tessera {

/// Shape of a decoder-only transformer, from config.json.
struct ModelConfig {
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t layers = 0;
  std::int64_t q_heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_positions = 0;  ///< longest sequence the model was made for
  double rope_theta = 10000;
  double norm_epsilon = 1e-6;
  bool tied_head = false;  ///< the output head is the embedding
  std::optional<std::int32_t> bos_token;
  std::vector<std::int32_t> eos_tokens;
};

/// A model: shape, weights and tokenizer. Immutable; sessions share it.
class Model {
 public:
  /// Reads config.json, model.safetensors or model.safetensors.index.json with its shards (memory-mapped; float32
  /// weights are used in place, bf16 and f16 are widened), and tokenizer.json. Without tokenizer.json token ids are
  /// byte values. Throws Error naming file, key, value and what was expected.
  static Model load(const std::filesystem::path& folder, int threads = 0);
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

  const ModelConfig& config() const;
  /// Heap bytes of the weights (mapped ones not counted).
  std::size_t weight_bytes() const;

  /// Token ids of a text (any bytes), preceded by the beginning-of-sequence token if the model has one and it is
  /// wanted. Names of special tokens in the text are text. Throws Error for a byte that the vocabulary lacks.
  std::vector<std::int32_t> encode(std::string_view text, bool with_bos = true) const;
  /// Bytes of the tokens; special tokens have none.
  std::string decode(std::span<const std::int32_t> tokens) const;

  struct Parts;
  const Parts& parts() const { return *parts_; }

 private:
  explicit Model(std::unique_ptr<const Parts> parts);
  std::unique_ptr<const Parts> parts_;
};

/// What the attention of one layer reads for consecutive tokens of the prompt, with their positions rotated in.
struct ProjectedRows {
  std::int64_t layer = 0;
  std::int64_t position = 0;  ///< of the first row
  std::int64_t rows = 0;
  std::span<const float> q;  ///< [rows][q_heads * head_dim]
  std::span<const float> k;  ///< [rows][kv_heads * head_dim]
  std::span<const float> v;  ///< [rows][kv_heads * head_dim]
};

/// How a session runs.
struct SessionOptions {
  std::shared_ptr<const Method> prefill = {};  ///< null: dense
  std::shared_ptr<const Method> decode = {};   ///< null: `prefill` if it supports decoding, else dense; owns the cache
  DType kv_dtype = DType::f32;
  std::int64_t page_size = 64;
  /// Tokens per prefill chunk; 0: the whole prompt at once; absent: the whole prompt while its activations fit in
  /// 1 GiB. Methods plan per chunk, over all keys so far.
  std::optional<std::int64_t> chunk = {};
  std::int64_t capacity = 0;  ///< longest sequence; 0: the model's max_positions
  RunOptions run = {};
  /// Receives each plan that prefill ran, in order of chunks and layers.
  std::function<void(std::int64_t layer, const Plan& plan)> on_plan = {};
  /// Receives the rows of the prompt, layer by layer in each chunk, up to 1024 rows at a time, before the layer
  /// attends; as projected, not as the cache rounds or drops them.
  std::function<void(const ProjectedRows& rows)> on_projections = {};
  /// Asked between layers; true ends the call with Cancelled.
  std::function<bool()> cancelled = {};
};

/// Thrown by prefill and decode when SessionOptions::cancelled says so.
class Cancelled : public Error {
 public:
  using Error::Error;
};

/// What a session did since it was made or reset.
struct SessionStatistics {
  double prefill_ms = 0;  ///< without what only observers cost (logits of every position, plan statistics)
  double decode_ms = 0;
  double attention_ms = 0;  ///< plans and kernels, prefill and decode
  std::int64_t prefill_tokens = 0;
  std::int64_t decode_tokens = 0;
  double planned_pairs = 0;  ///< of prefill, over all layers and query heads
  double allowed_pairs = 0;
  std::size_t cache_peak_bytes = 0;  ///< most that the cache held at once
  /// Share of the allowed pairs that prefill computed.
  double density() const { return allowed_pairs > 0 ? planned_pairs / allowed_pairs : 0; }
};

/// One sequence in a model: cache, method state, statistics. Not thread-safe; the model must outlive it.
class Session {
 public:
  /// Throws Error for a method that does not support its phase and for a capacity above the address space.
  Session(const Model& model, SessionOptions options);
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  const Model& model() const;
  const SessionStatistics& statistics() const;
  std::int64_t tokens() const;       ///< of the sequence, whether or not the cache still holds them
  std::int64_t capacity() const;     ///< longest sequence
  std::size_t cache_bytes() const;   ///< held for keys, values and what methods note about them
  double cache_tokens_kept() const;  ///< tokens that the cache holds, mean over layers and kv heads

  struct PrefillObserver {
    /// Logits [rows][vocab_size] of prompt positions [first, first + rows); asked for only if set, in slices.
    std::function<void(std::int64_t first, std::span<const float> logits)> on_logits = {};
    /// Work done, in tokens, out of all of this call.
    std::function<void(double done, std::int64_t total)> on_progress = {};
  };
  /// Appends tokens and returns the logits [vocab_size] after the last one. Throws Error for ids outside the
  /// vocabulary and beyond the capacity; the session then holds what it held before the failing chunk, or nothing if
  /// a cache had begun to evict. The cache of the decode method compresses a layer once the last chunk has passed it.
  std::span<const float> prefill(std::span<const std::int32_t> tokens);
  std::span<const float> prefill(std::span<const std::int32_t> tokens, const PrefillObserver& observer);
  /// Appends one token with the decode method.
  std::span<const float> decode(std::int32_t token);
  /// Forgets the sequence and gives the cache's memory back.
  void reset();

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

/// How the next token is chosen.
struct SamplingOptions {
  double temperature = 0;  ///< 0: the most likely token (the lowest id among equals)
  double top_p = 1;        ///< keep the fewest most likely tokens that hold this mass
  std::uint64_t seed = 0;  ///< of std::mt19937_64; equal seeds give equal texts on every machine
};

struct GenerateOptions {
  std::int64_t max_tokens = 128;
  SamplingOptions sampling = {};
  bool stop_at_eos = true;
  /// Measure the bits per byte of the prompt: a head projection per prompt token.
  bool bits_per_byte = false;
  /// Receives the bytes of each new token.
  std::function<void(std::string_view bytes)> on_text = {};
  Session::PrefillObserver prefill = {};
  std::function<void(std::int64_t done, std::int64_t total)> on_decode_progress = {};
};

/// What generate() returns.
struct Generation {
  std::vector<std::int32_t> tokens;  ///< new ones, an end-of-sequence token included
  std::string text;                  ///< their bytes, perhaps not valid UTF-8
  /// Teacher-forced code length of the prompt in bits, divided by its bytes; absent unless asked for and the prompt has
  /// a byte that can be predicted.
  std::optional<double> bits_per_byte;
};

/// Prefills the prompt (at least one token) and generates until max_tokens, an end-of-sequence token or the session's
/// capacity. Statistics are in session.statistics(). Throws Error when the prompt exceeds the capacity.
Generation generate(Session& session, std::span<const std::int32_t> prompt, const GenerateOptions& options);

}  // namespace tessera
