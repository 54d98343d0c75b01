// `tessera tokenize`: the token ids of a text.
#include <fmt/format.h>

#include <chrono>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "command.h"
#include "core/error.h"
#include "io/json.h"
#include "model/tokenizer_folder.h"
#include "model/tokenizer_gguf.h"
#include "tessera/model.h"

namespace tessera::cli {

namespace {

struct Options {
  std::string model;
  std::string prompt;
  bool special = false;
  bool chat = false;
  std::string system;
  bool json = false;
};

model::Tokenizer tokenizer_of(const std::string& path) {
  constexpr std::int64_t any_size = std::int64_t{1} << 22;
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) return model::read_tokenizer(path, any_size);
  if (path.ends_with(".gguf")) return model::read_tokenizer(GgufFile::open(path));
  return model::Tokenizer::read(parse_json_file(path), path, any_size);
}

/// Templates belong to models, which know their special tokens.
std::vector<std::int32_t> chat_tokens(const Options& options, const std::string& text) {
  std::vector<ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system});
  messages.push_back({"user", text});
  return Model::load(options.model, {.weights = WeightMemory::mapped}).encode_chat(messages);
}

void run_tokenize(const Options& options) {
  require(options.system.empty() || options.chat, "--system needs --chat");
  const model::Tokenizer tokenizer = tokenizer_of(options.model);
  const std::string text = read_text_file(options.prompt);
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::int32_t> tokens =
      options.chat ? chat_tokens(options, text) : tokenizer.encode(text, options.special);
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  const std::string decoded = tokenizer.decode(tokens);
  if (options.json) {
    const std::vector<unsigned char> bytes(decoded.begin(), decoded.end());
    print_json({{"tokens", tokens}, {"decoded_bytes", bytes}, {"milliseconds", took.count()}});
    return;
  }
  for (const std::int32_t token : tokens) {
    const std::string piece(tokenizer.bytes_of(token));
    fmt::print("{}\t{}\n", token, nlohmann::json(piece).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, "tokenize", "Show the token ids of a text",
                                  "tessera tokenize --model models/tessera-bytes --prompt README.md");
  command->add_option("--model", options->model, "Folder with tokenizer.json, such a file, or a *.gguf file")
      ->required();
  command->add_option("--prompt", options->prompt, "File with the text")->required();
  command->add_flag("--special", options->special, "Names of special tokens in the text are those tokens");
  command->add_flag("--chat", options->chat, "The text is a message of the user: apply the model's chat template");
  command->add_option("--system", options->system, "System message of --chat");
  add_json_option(*command, options->json);
  command->callback([options] { run_tokenize(*options); });
}

}  // namespace tessera::cli
