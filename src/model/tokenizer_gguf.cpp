#include "model/tokenizer_gguf.h"

#include <algorithm>

#include "core/error.h"
#include "model/text/bpe.h"
#include "model/text/unicode.h"
#include "model/tokenizer_parts.h"

namespace tessera::model {

namespace {

using Kind = Tokenizer::Parts::Kind;

constexpr std::string_view kKey = "tokenizer.ggml.";
constexpr std::int64_t kMostTokens = std::int64_t{1} << 24;

/// Values of tokenizer.ggml.token_type.
enum TokenType : std::int64_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

class Reader {
 public:
  explicit Reader(const GgufFile& file) : file_(file) {}

  Tokenizer read() {
    const auto model = file_.get<std::string>(key("model"));
    require(model == "gpt2" || model == "llama", "{}: '{}' is '{}', which is not supported; supported: gpt2, llama",
            file_.name(), key("model"), shortened(model));
    read_tokens();
    const auto pre = file_.get_or<std::string>(key("pre"), "default");
    // What the tokenizers named here do unless the file says otherwise.
    const bool whole_words = pre == "llama3" || pre == "llama-v3" || pre == "llama-bpe" || pre == "tekken";
    if (model == "gpt2") {
      read_byte_level(pre, whole_words);
    } else {
      read_sentencepiece();
    }
    parts_->finish();
    Tokenizer tokenizer(parts_);
    const bool bos = file_.get_or<bool>(key("add_bos_token"), model == "llama" || whole_words);
    const auto id = optional_id("bos_token_id");
    tokenizer.set_prefix(bos && id ? std::vector{*id} : std::vector<std::int32_t>());
    return tokenizer;
  }

 private:
  static std::string key(std::string_view name) { return fmt::format("{}{}", kKey, name); }

  std::optional<std::int32_t> optional_id(std::string_view name) const {
    const auto id = file_.get_optional<std::int64_t>(key(name));
    if (!id || *id < 0 || *id >= std::ssize(tokens_)) return std::nullopt;  // writers put -1 and the like for none
    return static_cast<std::int32_t>(*id);
  }

  void read_tokens() {
    tokens_ = file_.get<std::vector<std::string>>(key("tokens"));
    require(!tokens_.empty() && std::ssize(tokens_) <= kMostTokens, "{}: '{}' has {} entries; expected 1 to {}",
            file_.name(), key("tokens"), tokens_.size(), kMostTokens);
    types_ = file_.get_or<std::vector<std::int64_t>>(key("token_type"),
                                                     std::vector<std::int64_t>(tokens_.size(), TokenType::normal));
    require(types_.size() == tokens_.size(), "{}: '{}' has {} entries; expected one per token, {}", file_.name(),
            key("token_type"), types_.size(), tokens_.size());
    parts_->ids.reserve(tokens_.size());
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      const auto id = static_cast<std::int32_t>(i);
      const bool special = types_[i] == control || types_[i] == unknown;
      parts_->place(id, tokens_[i], special ? Kind::special : Kind::text);
      parts_->ids.emplace(tokens_[i], id);
      if (types_[i] != control && types_[i] != user_defined) continue;
      require(text::is_valid_utf8(tokens_[i]), "{}: special token {} is not valid UTF-8", file_.name(), i);
      text::AddedToken added;
      added.content = tokens_[i];
      added.id = id;
      added.special = types_[i] == control;
      added.normalized = false;
      parts_->added.push_back(std::move(added));
    }
  }

  void read_byte_level(const std::string& pre, bool whole_words) {
    parts_->pre_tokenizer = text::PreTokenizer::of_gguf(pre, file_.name());
    parts_->decoder = text::TokenDecoder::byte_level();
    const auto list = file_.get<std::vector<std::string>>(key("merges"));
    text::MergeTable merges(list.size());
    std::uint32_t rank = 0;
    for (const std::string& merge : list) {
      const std::size_t space = merge.find(' ', 1);
      require(space != std::string::npos, "{}: '{}': '{}' is not two tokens with one space between", file_.name(),
              key("merges"), shortened(merge));
      const std::string left = merge.substr(0, space);
      const std::string right = merge.substr(space + 1);
      merges.set(id_of(left), id_of(right), {rank++, id_of(left + right)});
    }
    text::BpeOptions options;
    options.ignore_merges = whole_words;
    parts_->model = std::make_unique<text::Bpe>(parts_->ids, std::move(merges), std::move(options));
  }

  std::int32_t id_of(const std::string& token) const {
    const auto found = parts_->ids.find(token);
    require(found != parts_->ids.end(), "{}: '{}' speaks of '{}', which is no token", file_.name(), key("merges"),
            shortened(token));
    return found->second;
  }

  void read_sentencepiece() {
    const bool prefix = file_.get_or<bool>(key("add_space_prefix"), true);
    parts_->normalizer = text::Normalizer::sentencepiece(prefix);
    parts_->decoder = text::TokenDecoder::sentencepiece(prefix);
    const auto given = file_.get<std::vector<double>>(key("scores"));
    require(given.size() == tokens_.size(), "{}: '{}' has {} entries; expected one per token, {}", file_.name(),
            key("scores"), given.size(), tokens_.size());
    std::vector<float> scores;
    std::vector<bool> mergeable;
    for (std::size_t i = 0; i < given.size(); ++i) {
      require(given[i] == given[i], "{}: '{}' has NaN at {}", file_.name(), key("scores"), i);
      scores.push_back(static_cast<float>(given[i]));
      mergeable.push_back(types_[i] == normal || types_[i] == user_defined || types_[i] == unused);
    }
    text::BpeOptions options;
    options.byte_fallback = true;
    options.fuse_unknown = true;
    options.unknown = optional_id("unknown_token_id");
    if (!options.unknown) {
      const auto found = std::find(types_.begin(), types_.end(), TokenType::unknown);
      if (found != types_.end()) options.unknown = static_cast<std::int32_t>(found - types_.begin());
    }
    parts_->model = std::make_unique<text::Bpe>(
        parts_->ids, text::merges_of_scores(tokens_, parts_->ids, scores, mergeable), std::move(options));
  }

  const GgufFile& file_;
  std::vector<std::string> tokens_;
  std::vector<std::int64_t> types_;
  std::shared_ptr<Tokenizer::Parts> parts_ = std::make_shared<Tokenizer::Parts>();
};

}  // namespace

Tokenizer read_tokenizer(const GgufFile& file) {
  return Reader(file).read();
}

}  // namespace tessera::model
