// `tessera run`: prefill and generate with a model.
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "io/safetensors.h"
#include "kernels/peak.h"
#include "support/measure.h"
#include "support/progress.h"
#include "support/prompt.h"
#include "support/qkv_file.h"
#include "support/run_options.h"
#include "tessera/model.h"

namespace tessera::cli {

namespace {

struct Options {
  std::string model;
  std::string prompt;
  bool chat = false;
  std::string system;
  std::string method = "dense";
  std::string decode_method;
  std::int64_t tokens = 128;
  SamplingOptions sampling;
  std::optional<std::int64_t> chunk;
  std::string kv_dtype = "f32";
  std::int64_t max_length = 0;
  double memory_limit = 0;
  bool exact_products = false;
  bool ignore_eos = false;
  bool bits_per_byte = false;
  bool no_bits_per_byte = false;
  bool measure_bandwidth = false;
  std::string logits_out;
  std::string dump_qkv;
  std::string dump_layers;
  LoadFlags load;
  RunFlags run;
  bool json = false;
};

/// Logits of the whole prompt, for --logits-out.
class LogitsFile {
 public:
  LogitsFile(std::size_t tokens, std::int64_t vocab) : vocab_(vocab), tokens_(static_cast<std::int64_t>(tokens)) {
    require(tokens_ <= (std::int64_t{1} << 31) / vocab,
            "--logits-out: {} tokens times vocabulary {} are more than 2^31 logits", tokens, vocab);
    values_.reserve(tokens * static_cast<std::size_t>(vocab));
  }
  void add(std::span<const float> logits) { values_.insert(values_.end(), logits.begin(), logits.end()); }
  void write(const std::string& path) const {
    const std::array tensors{named_tensor<float>("logits", DType::f32, {tokens_, vocab_}, values_)};
    write_safetensors(path, tensors);
  }

 private:
  std::int64_t vocab_;
  std::int64_t tokens_;
  std::vector<float> values_;
};

/// What memory gives between the steps of decoding, and how much of that they took: on a shared host it may double
/// within a second, so that a step is judged by the passes before and behind it.
class BandwidthMeter {
 public:
  explicit BandwidthMeter(int threads) : threads_(threads) {}
  /// Before the first decode step and behind each.
  void pass(const Session& session) {
    if (!reader_) {
      memory_before_ = peak_memory_mb();
      reader_.emplace(threads_);
    }
    const double ms = session.statistics().decode_ms;
    const double gbps = reader_->pass();
    if (!passes_.empty() && ms > ms_) {
      const double bytes = session.model().decoded_weight_bytes() + static_cast<double>(session.cache_bytes());
      shares_.push_back(bytes / 1e6 / (ms - ms_) / ((passes_.back() + gbps) / 2));
    }
    passes_.push_back(gbps);
    ms_ = ms;
  }
  void report(nlohmann::ordered_json& report) const {
    if (shares_.empty()) return;
    report["read_gbps"] = spread_of(passes_).median;
    report["decode_of_bandwidth"] = spread_of(shares_).median;
    report["peak_rss_mb"] = memory_before_;
  }

 private:
  int threads_;
  std::optional<kernels::MemoryReader> reader_;
  double memory_before_ = 0;  ///< without the reader's
  std::vector<double> passes_;
  std::vector<double> shares_;
  double ms_ = 0;
};

SessionOptions session_options(const Options& options) {
  SessionOptions result;
  result.prefill = make_method(options.method);
  if (!options.decode_method.empty()) result.decode = make_method(options.decode_method);
  result.kv_dtype = kv_dtype_of(options.kv_dtype);
  result.chunk = options.chunk;
  result.capacity = options.max_length;
  require(std::isfinite(options.memory_limit) && options.memory_limit < 1e9,
          "--memory-limit is {} MB; expected 0 (what is available), a number of MB, or a negative number (none)",
          options.memory_limit);
  result.memory_limit =
      options.memory_limit < 0 ? -1 : static_cast<std::int64_t>(std::llround(options.memory_limit * 1e6));
  result.exact_products = options.exact_products;
  result.run = run_options_of(options.run);
  result.cancelled = [] { return interrupted(); };
  return result;
}

double per_second(std::int64_t count, double milliseconds) {
  if (count == 0 || milliseconds <= 0) return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(count) * 1000 / milliseconds;
}

nlohmann::ordered_json report_of(const Generation& generation, const Session& session) {
  const SessionStatistics& statistics = session.statistics();
  return {{"text", generation.text},
          {"tokens", generation.tokens},
          {"prompt_tokens", statistics.prefill_tokens},
          {"prefill_ms", statistics.prefill_ms},
          {"prefill_tokens_per_s", per_second(statistics.prefill_tokens, statistics.prefill_ms)},
          {"attention_ms", statistics.attention_ms},
          {"decode_tokens_per_s", per_second(statistics.decode_tokens, statistics.decode_ms)},
          {"density", statistics.density()},
          {"cache_mb", static_cast<double>(session.cache_bytes()) / 1e6},
          {"cache_peak_mb", static_cast<double>(statistics.cache_peak_bytes) / 1e6},
          {"cache_tokens_kept", session.cache_tokens_kept()},
          {"peak_rss_mb", peak_memory_mb()},
          {"bits_per_byte", generation.bits_per_byte.value_or(std::numeric_limits<double>::quiet_NaN())}};
}

void print_summary(const Generation& generation, const Session& session) {
  const SessionStatistics& s = session.statistics();
  fmt::print(stderr, "prompt {} tokens in {:.0f} ms ({:.0f} tokens/s), density {:.4f}; ", s.prefill_tokens,
             s.prefill_ms, per_second(s.prefill_tokens, s.prefill_ms), s.density());
  if (s.decode_tokens > 0) fmt::print(stderr, "decode {:.1f} tokens/s; ", per_second(s.decode_tokens, s.decode_ms));
  fmt::print(stderr, "attention {:.0f} ms; cache {:.1f} MB ({:.0f} tokens), at most {:.1f} MB; peak memory {:.0f} MB",
             s.attention_ms, static_cast<double>(session.cache_bytes()) / 1e6, session.cache_tokens_kept(),
             static_cast<double>(s.cache_peak_bytes) / 1e6, peak_memory_mb());
  if (generation.bits_per_byte) fmt::print(stderr, "; prompt {:.4f} bits per byte", *generation.bits_per_byte);
  fmt::print(stderr, "\n");
}

std::vector<std::int32_t> prompt_tokens(const Model& model, const Options& options) {
  std::string text = read_prompt(options.prompt);
  if (!options.chat) return model.encode(text);
  std::vector<ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system});
  messages.push_back({"user", std::move(text)});
  return model.encode_chat(messages);
}

void run_run(const Options& options) {
  require(options.tokens >= 0, "-n is {}; expected 0 or more", options.tokens);
  require(options.max_length >= 0, "--max-length is {}; expected 0 (the model's limit) or more", options.max_length);
  require(options.dump_layers.empty() || !options.dump_qkv.empty(), "--dump-layers needs --dump-qkv");
  require(!options.measure_bandwidth || options.json, "--measure-bandwidth needs --json");
  SessionOptions wanted = session_options(options);
  const Model model = Model::load(options.model, load_options_of(options.load, options.run.threads));
  watch_interrupt();
  require(options.system.empty() || options.chat, "--system needs --chat");
  const std::vector<std::int32_t> prompt = prompt_tokens(model, options);
  require(!prompt.empty(), "--prompt {}: the prompt is empty and the model has no token to start with", options.prompt);
  std::optional<QkvFile> qkv;
  if (!options.dump_qkv.empty()) {
    qkv.emplace(model.config(), static_cast<std::int64_t>(prompt.size()), options.dump_layers);
    wanted.on_projections = [&qkv](const ProjectedRows& rows) { qkv->add(rows); };
  }
  Session session(model, wanted);
  require(static_cast<std::int64_t>(prompt.size()) <= session.capacity(),
          "--prompt {}: {} tokens exceed the {} {}; shorten it, or raise the limit with --max-length", options.prompt,
          prompt.size(), options.max_length > 0 ? "--max-length" : "model's max_position_embeddings of",
          session.capacity());

  ProgressLine progress;
  std::optional<LogitsFile> logits;
  if (!options.logits_out.empty()) logits.emplace(prompt.size(), model.config().vocab_size);
  GenerateOptions generate_options;
  generate_options.max_tokens = options.tokens;
  generate_options.sampling = options.sampling;
  generate_options.stop_at_eos = !options.ignore_eos;
  generate_options.bits_per_byte = options.bits_per_byte || (options.json && !options.no_bits_per_byte);
  generate_options.prefill.on_progress = [&](double done, std::int64_t total) {
    progress.show("prefill", done, total);
    if (done >= static_cast<double>(total)) progress.finish();
  };
  if (logits)
    generate_options.prefill.on_logits = [&](std::int64_t, std::span<const float> rows) { logits->add(rows); };
  BandwidthMeter meter(options.run.threads);
  if (options.json) {
    generate_options.on_decode_progress = [&](std::int64_t done, std::int64_t total) {
      progress.show("decode", static_cast<double>(done), total);
      if (options.measure_bandwidth) meter.pass(session);
    };
  } else {
    generate_options.on_text = [](std::string_view bytes) {
      std::fwrite(bytes.data(), 1, bytes.size(), stdout);
      require(std::fflush(stdout) == 0, "standard output: write failed");
    };
  }
  const Generation generation = generate(session, prompt, generate_options);
  progress.finish();
  if (logits) logits->write(options.logits_out);
  if (qkv) qkv->write(options.dump_qkv);
  if (options.json) {
    nlohmann::ordered_json report = report_of(generation, session);
    meter.report(report);
    print_json(report);
  } else {
    fmt::print("\n");
    print_summary(generation, session);
  }
}

}  // namespace

void add_run(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, "run", "Prefill a prompt and generate with a language model",
                                  "tessera run --model models/tessera-bytes --prompt README.md --method "
                                  "xattention:tau=0.9 -n 64");
  command
      ->add_option("--model", options->model,
                   "Folder with config.json, *.safetensors and tokenizer.json, or a *.gguf file")
      ->required();
  command->add_option("--prompt", options->prompt, "File with the prompt, or - for standard input")->required();
  command->add_flag("--chat", options->chat, "The prompt is a message of the user: apply the model's chat template");
  command->add_option("--system", options->system, "System message of --chat");
  command->add_option("--method", options->method, "Prefill method, and decode method if it supports that: SPEC")
      ->capture_default_str();
  command->add_option("--decode-method", options->decode_method, "Decode method, which owns the cache: SPEC");
  command->add_option("-n,--tokens", options->tokens, "Tokens to generate at most")->capture_default_str();
  command->add_option("--temperature", options->sampling.temperature, "0: always the most likely token")
      ->capture_default_str();
  command->add_option("--top-p", options->sampling.top_p, "Sample from the most likely tokens of this mass")
      ->capture_default_str();
  command->add_option("--seed", options->sampling.seed, "Seed of the sampling")->capture_default_str();
  command->add_option("--chunk", options->chunk,
                      "Tokens per prefill chunk, 0 for the whole prompt (default: those whose activations fit in 48 "
                      "MiB, in 1 GiB if the method needs the whole prompt)");
  command
      ->add_option("--kv-dtype", options->kv_dtype,
                   "Keys and values in the cache: f32, bf16, f16 or i8 (8 bits, a scale per token)")
      ->capture_default_str();
  command->add_option("--max-length", options->max_length, "Longest sequence (default: the model's limit)");
  command->add_option("--memory-limit", options->memory_limit,
                      "Refuse a prompt whose cache and activations need more MB (default: what is available; negative: "
                      "never)");
  command->add_flag("--exact-products", options->exact_products,
                    "Multiply bf16 weights and keys with float32 activations and queries, more slowly");
  command->add_flag("--ignore-eos", options->ignore_eos, "Do not stop at an end-of-sequence token");
  CLI::Option* bits = command->add_flag("--bits-per-byte", options->bits_per_byte,
                                        "Measure the bits per byte of the prompt, from the logits of all its tokens");
  command
      ->add_flag("--no-bits-per-byte", options->no_bits_per_byte, "Leave them out of --json, which measures them else")
      ->excludes(bits);
  command->add_flag("--measure-bandwidth", options->measure_bandwidth,
                    "Read memory between decoded tokens, and report the share of its bandwidth that decoding took, "
                    "weights and cache; peak memory is then that of the prefill");
  command->add_option("--logits-out", options->logits_out, "Write the prompt's logits: f32 [tokens, vocabulary]");
  command->add_option(
      "--dump-qkv", options->dump_qkv,
      "Write the prompt's queries, keys and values, layers along the batch axis, as attend --qkv reads");
  command->add_option("--dump-layers", options->dump_layers, "Layers of --dump-qkv, as 0-2+14 (default: all)");
  add_load_options(*command, options->load);
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->callback([options] { run_run(*options); });
}

}  // namespace tessera::cli
