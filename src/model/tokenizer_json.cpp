// Reading tokenizer.json.
#include <unordered_set>

#include "core/error.h"
#include "model/text/bpe.h"
#include "model/text/byte_characters.h"
#include "model/text/unicode.h"
#include "model/text/unigram.h"
#include "model/tokenizer_parts.h"

namespace tessera::model {

namespace {

using Parts = Tokenizer::Parts;

/// The value of a key without a copy; null if it is missing.
const Json& part_of(const Json& object, const char* key) {
  static const Json none;
  const auto found = object.find(key);
  return found == object.end() ? none : *found;
}

std::int32_t checked_id(const Json& value, std::string_view entry, std::string_view name, std::int64_t vocab_size) {
  require(value.is_number_integer(), "{}: token '{}' has an id that is no integer", name, shortened(entry));
  const auto id = value.is_number_unsigned() && value.get<std::uint64_t>() >= std::uint64_t{1} << 62
                      ? std::int64_t{-1}
                      : value.get<std::int64_t>();
  require(id >= 0 && id < vocab_size, "{}: token '{}' has id {}; expected an id below vocab_size {}", name,
          shortened(entry), value.dump(), vocab_size);
  return static_cast<std::int32_t>(id);
}

class Reader {
 public:
  Reader(const Json& json, std::string_view name, std::int64_t vocab_size)
      : json_(json),
        model_(part_of(json, "model")),
        name_(name),
        where_(fmt::format("{}: 'model'", name)),
        vocab_size_(vocab_size) {}

  Tokenizer read() {
    require(json_.is_object(), "{}: expected a JSON object", name_);
    require(model_.is_object(), "{}: the key 'model' is missing; expected an object", name_);
    // Early files leave the type of BPE models out.
    const auto type = get_or<std::string>(model_, "type", where_, "BPE");
    require(type == "BPE" || type == "Unigram", "{}: model.type '{}' is not supported; supported: BPE, Unigram", name_,
            shortened(type));
    read_added();
    if (type == "BPE" && is_of_bytes()) {
      read_vocabulary();
      take_bytes();
    } else {
      if (type == "BPE") {
        read_vocabulary();
        read_bpe();
      } else {
        read_unigram();
      }
      parts_->normalizer = text::Normalizer::read(part_of(json_, "normalizer"), fmt::format("{}: 'normalizer'", name_));
      parts_->pre_tokenizer =
          text::PreTokenizer::read(part_of(json_, "pre_tokenizer"), fmt::format("{}: 'pre_tokenizer'", name_));
    }
    read_decoder();
    for (const text::AddedToken& token : parts_->added) {
      parts_->place(token.id, token.content, token.special ? Parts::Kind::special : Parts::Kind::text);
    }
    read_prefix(part_of(json_, "post_processor"), 0);
    if (!prefix_ && !parts_->id_of_byte) prefix_.emplace();
    parts_->finish();
    Tokenizer tokenizer(std::move(parts_));
    if (prefix_) tokenizer.set_prefix(*std::move(prefix_));
    return tokenizer;
  }

 private:
  void read_added() {
    const Json& list = part_of(json_, "added_tokens");
    require(list.is_null() || list.is_array(), "{}: 'added_tokens' is no list", name_);
    const std::string where = fmt::format("{}: 'added_tokens'", name_);
    std::unordered_set<std::int32_t> used;
    for (const Json& token : list) {
      text::AddedToken added;
      added.content = get<std::string>(token, "content", where);
      added.id = checked_id(get<Json>(token, "id", where), added.content, name_, vocab_size_);
      added.special = get_or<bool>(token, "special", where, false);
      added.single_word = get_or<bool>(token, "single_word", where, false);
      added.lstrip = get_or<bool>(token, "lstrip", where, false);
      added.rstrip = get_or<bool>(token, "rstrip", where, false);
      added.normalized = get_or<bool>(token, "normalized", where, !added.special);
      require(used.insert(added.id).second, "{}: two added tokens have id {}", name_, added.id);
      parts_->added.push_back(std::move(added));
    }
  }

  /// A byte-level vocabulary without merges: one token per byte, for any bytes.
  bool is_of_bytes() const {
    const Json& merges = part_of(model_, "merges");
    const Json& splitter = part_of(json_, "pre_tokenizer");
    return (merges.is_null() || merges.empty()) && part_of(json_, "normalizer").is_null() && splitter.is_object() &&
           part_of(splitter, "type") == Json("ByteLevel") && part_of(splitter, "add_prefix_space") != Json(true) &&
           part_of(model_, "ignore_merges") != Json(true);
  }

  /// Added tokens also stand in the vocabulary or not, as the writer pleases.
  void read_vocabulary() {
    const Json& vocabulary = part_of(model_, "vocab");
    require(!vocabulary.is_null(), "{}: the key 'vocab' is missing; expected an object", where_);
    require(vocabulary.is_object(), "{}: 'vocab' is no object", where_);
    parts_->ids.reserve(vocabulary.size());
    for (const auto& [entry, value] : vocabulary.items()) {
      const std::int32_t id = checked_id(value, entry, name_, vocab_size_);
      const bool fresh = static_cast<std::size_t>(id) >= parts_->kinds.size() ||
                         parts_->kinds[static_cast<std::size_t>(id)] == Parts::Kind::unused;
      require(fresh, "{}: id {} is given to two tokens, one of them '{}'", name_, id, shortened(entry));
      parts_->place(id, entry, Parts::Kind::text);
      parts_->ids.emplace(entry, id);
    }
    check_added();
  }

  void check_added() const {
    for (const text::AddedToken& token : parts_->added) {
      const auto at = static_cast<std::size_t>(token.id);
      const bool taken = at < parts_->kinds.size() && parts_->kinds[at] != Parts::Kind::unused;
      if (!taken) continue;  // an argument of a message is read whether or not it is shown
      require(parts_->tokens[at] == token.content,
              "{}: id {} is '{}' in the vocabulary and '{}' among the added tokens", name_, token.id,
              shortened(parts_->tokens[at]), shortened(token.content));
    }
  }

  void take_bytes() {
    parts_->id_of_byte.emplace().fill(-1);
    std::unordered_set<std::int32_t> added;
    for (const text::AddedToken& token : parts_->added) added.insert(token.id);
    for (const auto& [entry, id] : parts_->ids) {
      if (added.contains(id)) continue;
      const auto bytes = text::spelt_bytes(entry);
      require(bytes.has_value(), "{}: token '{}' is not spelt in byte-level characters", name_, shortened(entry));
      if (bytes->size() == 1) (*parts_->id_of_byte)[static_cast<unsigned char>((*bytes)[0])] = id;
    }
  }

  std::int32_t token_id(std::string_view token, std::string_view what) const {
    const auto found = parts_->ids.find(token);
    require(found != parts_->ids.end(), "{}: {} '{}' is not in the vocabulary", where_, what, shortened(token));
    return found->second;
  }

  void read_bpe() {
    text::BpeOptions options;
    if (const auto unknown = get_optional<std::string>(model_, "unk_token", where_)) {
      options.unknown = token_id(*unknown, "unk_token");
    }
    options.fuse_unknown = get_or<bool>(model_, "fuse_unk", where_, false);
    options.byte_fallback = get_or<bool>(model_, "byte_fallback", where_, false);
    options.ignore_merges = get_or<bool>(model_, "ignore_merges", where_, false);
    options.continuing_subword_prefix = get_or<std::string>(model_, "continuing_subword_prefix", where_, "");
    options.end_of_word_suffix = get_or<std::string>(model_, "end_of_word_suffix", where_, "");
    const auto dropout = get_or<double>(model_, "dropout", where_, 0.0);
    require(dropout == 0, "{}: dropout {} is not supported; expected 0 or null", where_, dropout);
    const Json& list = part_of(model_, "merges");
    require(list.is_null() || list.is_array(), "{}: 'merges' is no list", where_);
    text::MergeTable merges(list.size());
    std::uint32_t rank = 0;
    for (const Json& merge : list) {
      const auto [left, right] = read_merge(merge);
      const std::string_view tail =
          std::string_view(right).substr(std::min(right.size(), options.continuing_subword_prefix.size()));
      const std::string joined = left + std::string(tail);
      merges.set(token_id(left, "a merge's"), token_id(right, "a merge's"),
                 {rank++, token_id(joined, fmt::format("merge '{} {}' makes", shortened(left), shortened(right)))});
    }
    parts_->model = std::make_unique<text::Bpe>(parts_->ids, std::move(merges), std::move(options));
  }

  std::pair<std::string, std::string> read_merge(const Json& merge) const {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      return {merge[0].get<std::string>(), merge[1].get<std::string>()};
    }
    require(merge.is_string(), "{}: an entry of 'merges' is neither a text nor a pair of texts", where_);
    const auto text = merge.get<std::string>();
    const std::size_t space = text.find(' ');
    require(space != std::string::npos && text.find(' ', space + 1) == std::string::npos,
            "{}: merge '{}' is not two tokens with one space between", where_, shortened(text));
    return {text.substr(0, space), text.substr(space + 1)};
  }

  void read_unigram() {
    const Json& list = part_of(model_, "vocab");
    require(list.is_array() && !list.empty(), "{}: 'vocab' is no list of pieces and scores", where_);
    require(static_cast<std::int64_t>(list.size()) <= vocab_size_, "{}: 'vocab' has {} pieces; expected at most {}",
            where_, list.size(), vocab_size_);
    std::vector<std::string> pieces;
    std::vector<double> scores;
    for (const Json& entry : list) {
      require(entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_number(),
              "{}: entry {} of 'vocab' is no pair of a piece and its score", where_, pieces.size());
      pieces.push_back(entry[0].get<std::string>());
      scores.push_back(entry[1].get<double>());
      const auto id = static_cast<std::int32_t>(pieces.size() - 1);
      parts_->place(id, pieces.back(), Parts::Kind::text);
      parts_->ids.insert_or_assign(pieces.back(), id);
    }
    check_added();
    std::optional<std::int32_t> unknown;
    if (const auto id = get_optional<std::int64_t>(model_, "unk_id", where_)) {
      require(*id >= 0 && *id < std::ssize(pieces), "{}: 'unk_id' is {}; expected an id below {}", where_, *id,
              pieces.size());
      unknown = static_cast<std::int32_t>(*id);
    }
    parts_->model = std::make_unique<text::Unigram>(pieces, std::move(scores), unknown,
                                                    get_or<bool>(model_, "byte_fallback", where_, false), parts_->ids);
  }

  void read_decoder() {
    const Json& json = part_of(json_, "decoder");
    const Json& splitter = part_of(json_, "pre_tokenizer");
    const bool spelt = parts_->id_of_byte || (splitter.is_object() && part_of(splitter, "type") == Json("ByteLevel"));
    parts_->decoder = json.is_null() && spelt ? text::TokenDecoder::byte_level()
                                              : text::TokenDecoder::read(json, fmt::format("{}: 'decoder'", name_));
  }

  /// What stands before the text in the template of a single text; end tokens are left out, as a prompt goes on.
  void read_prefix(const Json& json, int depth) {
    if (json.is_null()) return;
    const std::string where = fmt::format("{}: 'post_processor'", name_);
    const auto type = get<std::string>(json, "type", where);
    if (type == "Sequence" && depth < 8) {
      const Json& list = part_of(json, "processors");
      require(list.is_array(), "{}: 'processors' is no list", where);
      for (const Json& part : list) read_prefix(part, depth + 1);
    } else if (type == "BertProcessing" || type == "RobertaProcessing") {
      const Json& cls = part_of(json, "cls");
      require(cls.is_array() && cls.size() == 2, "{}: 'cls' is no pair of a token and its id", where);
      prefix_ = {checked_id(cls[1], "cls", name_, vocab_size_)};
    } else if (type == "TemplateProcessing") {
      const Json& single = part_of(json, "single");
      require(single.is_array(), "{}: 'single' is no list", where);
      prefix_.emplace();
      for (const Json& item : single) {
        require(item.is_object(), "{}: an entry of 'single' is no object", where);
        const Json& special = part_of(item, "SpecialToken");
        if (special.is_null()) break;  // the text
        const auto token = get<std::string>(special, "id", where);
        const Json& known = part_of(json, "special_tokens");
        require(known.is_object() && known.contains(token), "{}: '{}' is not among 'special_tokens'", where,
                shortened(token));
        const Json& entry = known.at(token);
        require(entry.is_object() && part_of(entry, "ids").is_array(), "{}: '{}' has no list of ids", where,
                shortened(token));
        for (const Json& id : part_of(entry, "ids")) {
          prefix_->push_back(checked_id(id, token, name_, vocab_size_));
        }
      }
    } else {
      require(type == "ByteLevel",
              "{}: type '{}' is not supported; supported: TemplateProcessing, ByteLevel, Sequence,"
              " BertProcessing, RobertaProcessing",
              where, shortened(type));
    }
  }

  const Json& json_;
  const Json& model_;
  std::string_view name_;
  std::string where_;
  std::int64_t vocab_size_;
  std::shared_ptr<Parts> parts_ = std::make_shared<Parts>();
  std::optional<std::vector<std::int32_t>> prefix_;
};

}  // namespace

Tokenizer Tokenizer::read(const Json& json, std::string_view name, std::int64_t vocab_size) {
  return Reader(json, name, vocab_size).read();
}

}  // namespace tessera::model
