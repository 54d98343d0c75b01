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

/// The function inside a feed-forward layer: f(gate) * up.
enum class Activation : std::uint8_t {
  silu,
  gelu,       ///< exact, by the error function
  gelu_tanh,  ///< the approximation by tanh
};
std::string_view name_of(Activation activation);

/// How the frequencies of rotary embedding are changed for contexts longer than those of pretraining.
enum class RopeScaling : std::uint8_t {
  none,
  linear,    ///< frequencies / factor (arXiv:2306.15595)
  dynamic,   ///< a larger base for sequences above `original_positions` (dynamic NTK)
  yarn,      ///< arXiv:2309.00071
  llama3,    ///< long waves / factor, short ones kept, a ramp between (arXiv:2407.21783)
  longrope,  ///< a factor per frequency, one list for short and one for long sequences (arXiv:2402.13753)
};
std::string_view name_of(RopeScaling scaling);

/// Rotary position embedding of some layers. Fields that a scaling does not read keep their defaults.
struct RopeConfig {
  double theta = 10000;
  std::int64_t dims = 0;     ///< of each head that rotate, the first ones; even; 0: all
  bool interleaved = false;  ///< pairs are neighbours (2i, 2i + 1), not i and i + dims / 2
  RopeScaling scaling = RopeScaling::none;
  double factor = 1;                       ///< linear, dynamic, yarn, llama3; at least 1 for dynamic and yarn
  std::int64_t original_positions = 0;     ///< longest sequence of pretraining; every scaling but linear reads it
  double attention_factor = 1;             ///< cosines and sines times this: yarn and longrope
  double beta_fast = 32;                   ///< yarn: rotations above which a frequency is kept
  double beta_slow = 1;                    ///< yarn: rotations below which it is divided by the factor
  bool whole_dims = true;                  ///< yarn: the ramp starts and ends at whole dimensions
  double low_frequency_factor = 1;         ///< llama3: waves above original_positions / this are long
  double high_frequency_factor = 4;        ///< llama3: waves below original_positions / this are short
  std::vector<double> short_factors = {};  ///< longrope: [dims / 2]
  std::vector<double> long_factors = {};   ///< longrope: [dims / 2], for sequences above original_positions
  friend bool operator==(const RopeConfig&, const RopeConfig&) = default;
};
/// What cosines and sines are multiplied by when a YaRN configuration does not say: m(factor, mscale) / m(factor,
/// mscale_all_dim) with m(s, c) = 0.1 c ln(s) + 1, or m(factor, 1) unless both are given.
double yarn_attention_factor(double factor, double mscale = 0, double mscale_all_dim = 0);
/// The same for longrope: sqrt(1 + ln(factor) / ln(original_positions)), 1 for a factor of at most 1.
double longrope_attention_factor(double factor, std::int64_t original_positions);

/// Which rotary embedding a layer has.
enum class LayerRope : std::uint8_t { global, local, none };

/// What differs from layer to layer.
struct LayerConfig {
  std::int64_t window = 0;  ///< keys that a query sees, itself and those before it; 0: all
  LayerRope rope = LayerRope::global;
  bool experts = false;  ///< its feed-forward part is a mixture of experts
  friend bool operator==(const LayerConfig&, const LayerConfig&) = default;
};

/// Mixture of experts: softmax over the scores of all experts, the `chosen` largest per token.
struct ExpertsConfig {
  std::int64_t count = 0;   ///< 0: the model has none
  std::int64_t chosen = 0;  ///< per token
  std::int64_t intermediate_size = 0;
  bool normalise = true;  ///< the weights of the chosen are divided by their sum
  friend bool operator==(const ExpertsConfig&, const ExpertsConfig&) = default;
};

/// Shape and features of a decoder-only transformer: what config.json, or the metadata of another format, says.
struct ModelConfig {
  std::string architecture = "llama";  ///< model_type of the Hugging Face layout, see architectures()
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;  ///< of layers without experts
  std::int64_t layers = 0;
  std::int64_t q_heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_positions = 0;  ///< longest sequence the model was made for
  RopeConfig rope;
  RopeConfig local_rope;                 ///< of layers with LayerRope::local
  std::vector<LayerConfig> layer_kinds;  ///< [layers]; empty: every layer is as LayerConfig{} says
  double norm_epsilon = 1e-6;
  Activation activation = Activation::silu;
  bool qkv_bias = false;
  bool output_bias = false;  ///< of the projection behind attention
  bool mlp_bias = false;
  bool qk_norm = false;            ///< RMSNorm over every head of queries and keys before rotation
  bool norm_plus_one = false;      ///< norms multiply by 1 + weight
  bool post_norms = false;         ///< also norms behind attention and behind the feed-forward part
  bool fused_projections = false;  ///< files hold q, k, v as one matrix, and gate, up as one
  double embedding_scale = 1;      ///< embeddings times this
  double attention_scale = 0;      ///< scores are q k times this; 0: 1 / sqrt(head_dim)
  double attention_softcap = 0;    ///< scores become cap * tanh(score / cap); 0: off
  double final_softcap = 0;        ///< the same for logits
  ExpertsConfig experts;
  bool tied_head = false;  ///< the output head is the embedding
  std::optional<std::int32_t> bos_token;
  std::vector<std::int32_t> eos_tokens;

  LayerConfig layer(std::int64_t index) const {
    return layer_kinds.empty() ? LayerConfig{} : layer_kinds[static_cast<std::size_t>(index)];
  }
  const RopeConfig& rope_of(LayerRope kind) const { return kind == LayerRope::local ? local_rope : rope; }
};

/// Throws Error naming field, value and what was expected unless all sizes are in range and fit together. `name` stands
/// for the file in messages. Whoever fills a ModelConfig from a file calls it before anything is allocated.
void validate(const ModelConfig& config, std::string_view name);

/// A family of models that Model::load can read.
struct ArchitectureInfo {
  std::string_view name;         ///< model_type
  std::string_view class_name;   ///< in "architectures" of config.json
  std::string_view models;       ///< well-known ones
  std::string_view differences;  ///< from plain Llama
};
std::span<const ArchitectureInfo> architectures();
/// They, and the rotary scalings, as a page in Markdown.
std::string architectures_markdown();

/// Number types of the key/value cache.
enum class CacheType : std::uint8_t {
  f32,
  bf16,
  f16,
  i8,  ///< 8 bits with a step and a minimum per token and head; the newest tokens are kept as f32
};
std::string_view name_of(CacheType type);
/// Throws Error that lists the known names.
CacheType cache_type_from_name(std::string_view name);

/// One message of a conversation.
struct ChatMessage {
  std::string role;  ///< system, user or assistant
  std::string content;
};

/// Where the weights of a model lie.
enum class WeightMemory : std::uint8_t {
  automatic,  ///< "auto": copied if the files take at most half of the memory that the system has available, else
              ///< mapped
  mapped,     ///< pages of the files: loading takes no time, and processes share them
  copied,     ///< read into memory of the process, in huge pages where the system gives them: decoding is faster
};
std::string_view name_of(WeightMemory memory);
/// Throws Error that lists the known names.
WeightMemory weight_memory_from_name(std::string_view name);

/// How a model is loaded.
struct LoadOptions {
  WeightMemory weights = WeightMemory::automatic;
  int threads = 0;  ///< that copy; 0: all
};

/// A model: shape, weights and tokenizer. Immutable; sessions share it.
class Model {
 public:
  /// Reads a folder or a *.gguf file; matrices are used in place in the type the file has. Of a folder it reads
  /// config.json, model.safetensors or model.safetensors.index.json with its shards, tokenizer.json,
  /// tokenizer_config.json and generation_config.json. Without tokenizer.json token ids are byte values. Throws Error
  /// naming file, key, value and what was expected, and for weights to be copied that are larger than the memory
  /// available.
  static Model load(const std::filesystem::path& path, const LoadOptions& options = {});
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

  const ModelConfig& config() const;
  /// Bytes that the weights take in memory of the process (mapped ones not counted).
  std::size_t weight_bytes() const;
  /// Bytes of the matrices that one decoded token reads, in the form of the files: of the experts those chosen.
  double decoded_weight_bytes() const;

  /// Token ids of a text, preceded by the beginning-of-sequence token if the model's files put one and it is wanted.
  /// Names of special tokens in the text are text. Ill-formed UTF-8 becomes U+FFFD, except in byte-level vocabularies
  /// without merges, which throw Error for a byte that they lack.
  std::vector<std::int32_t> encode(std::string_view text, bool with_bos = true) const;
  /// Token ids of a conversation in the model's chat template, up to where the answer begins. Roles are system (first,
  /// if at all), then user and assistant in turn, user last. Throws Error when the files have no template, and for one
  /// that is not known, listing those that are.
  std::vector<std::int32_t> encode_chat(std::span<const ChatMessage> messages) const;
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
  CacheType kv_dtype = CacheType::f32;
  std::int64_t page_size = 64;
  /// Tokens per prefill chunk; 0: the whole prompt at once; absent: those whose activations fit in 48 MiB where chunks
  /// change nothing (Method::prefill_tile) and decoding keeps every token, else in 1 GiB. Methods plan per chunk, over
  /// all keys so far.
  std::optional<std::int64_t> chunk = {};
  std::int64_t capacity = 0;  ///< longest sequence; 0: the model's max_positions
  /// Bytes that caches and activations of the session may take; 0: what the system has available when a prompt comes;
  /// negative: unlimited. A prompt that needs more is refused before it runs.
  std::int64_t memory_limit = 0;
  /// Multiply bf16 weights and keys with float32 activations and queries. Otherwise, where the machine has products of
  /// bf16, prefill rounds those to bf16, which is about twice as fast, and decoding rounds the queries.
  bool exact_products = false;
  /// Count the pairs that decoding computes: statistics of a plan per token and layer, which decode_ms leaves out.
  bool count_decoding = false;
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
  double decode_planned_pairs = 0;  ///< the same of decoding, if it is counted (SessionOptions::count_decoding)
  double decode_allowed_pairs = 0;
  std::size_t cache_peak_bytes = 0;  ///< most that the cache held at once
  /// Share of the allowed pairs that prefill computed.
  double density() const { return allowed_pairs > 0 ? planned_pairs / allowed_pairs : 0; }
  /// Share of the pairs of new tokens and all before them that decoding computed; 0 where it was not counted.
  double decode_density() const { return decode_allowed_pairs > 0 ? decode_planned_pairs / decode_allowed_pairs : 0; }
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
  std::int64_t tokens() const;      ///< of the sequence, whether or not the cache still holds them
  std::int64_t capacity() const;    ///< longest sequence
  std::size_t cache_bytes() const;  ///< held for keys, values and what methods note about them
  /// Bytes that caches and activations hold at most after so many more tokens of prompt and so many decoded ones. Of
  /// caches that evict or compress only what is certain counts: one layer whole.
  std::size_t memory_needed(std::int64_t prompt, std::int64_t decoded = 0) const;
  /// Throws Error with the need and the limit when that does not fit (SessionOptions::memory_limit). prefill() asks it.
  void check_memory(std::int64_t prompt, std::int64_t decoded = 0) const;
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
