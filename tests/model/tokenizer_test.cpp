// Parts of tokenizers against their definitions, and whole ones on texts that are awkward.
#include "model/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "model/chat_template.h"
#include "model/text/added_tokens.h"
#include "model/text/bpe.h"
#include "model/text/byte_characters.h"
#include "model/text/charsmap.h"
#include "model/text/pattern.h"
#include "model/text/pre_tokenizer.h"
#include "model/text/unicode.h"
#include "model/text/unigram.h"

namespace tessera::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Ids = std::vector<std::int32_t>;

template <class Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(UnicodeTest, IllFormedPartsAreReplaced) {
  const std::string bad = "\xEF\xBF\xBD";
  EXPECT_EQ(text::replace_invalid("a\xC3\xA9\xF0\x9F\x98\x80"), "a\xC3\xA9\xF0\x9F\x98\x80");
  EXPECT_EQ(text::replace_invalid("\xC3("), bad + "(");
  EXPECT_EQ(text::replace_invalid("\xF0\x9F\x98"), bad);              // a beginning counts as one
  EXPECT_EQ(text::replace_invalid("\xED\xA0\x80"), bad + bad + bad);  // a surrogate
  EXPECT_EQ(text::replace_invalid("\xC0\xAF"), bad + bad);            // overlong
  EXPECT_EQ(text::replace_invalid("\xF4\x90\x80\x80"), bad + bad + bad + bad);
  EXPECT_EQ(text::replace_invalid("\xE4\xBD x"), bad + " x");
}

TEST(ByteCharactersTest, EveryByteComesBack) {
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) bytes += static_cast<char>(byte);
  EXPECT_EQ(text::spelt_bytes(text::spelt_in_characters(bytes)), bytes);
  EXPECT_EQ(text::spelt_in_characters(" \n"), "\xC4\xA0\xC4\x8A");
  EXPECT_FALSE(text::spelt_bytes("a b").has_value());
  EXPECT_EQ(text::named_byte("<0x0A>"), '\n');
  EXPECT_FALSE(text::named_byte("<0xG0>").has_value());
}

TEST(PatternTest, TheDialectIsThatOfTheFiles) {
  const auto matches = [](const char* expression, std::string_view text) {
    std::vector<std::string> found;
    for (const text::Range& range : text::Pattern(expression, "p").find_all(text)) {
      found.emplace_back(text.substr(range.begin, range.end - range.begin));
    }
    return found;
  };
  EXPECT_THAT(matches(R"(\s+)", "a \xE2\x80\x83\xC2\x85z\xE1\xA0\x8E"), ElementsAre(" \xE2\x80\x83\xC2\x85"));
  EXPECT_THAT(matches(R"([^\s\p{L}]+)", "a1 \xE1\xA0\x8E!"), ElementsAre("1", "\xE1\xA0\x8E!"));
  EXPECT_THAT(matches(R"(\w+)", "e\xCC\x81_9-x"), ElementsAre("e\xCC\x81_9", "x"));
  EXPECT_THAT(matches(R"(^a)", "a\na"), ElementsAre("a", "a"));
  EXPECT_THAT(matches(R"(x*)", "axb"), ElementsAre("", "x", "", ""));
  EXPECT_THAT(message_of([] { text::Pattern("[a&&b]", "p"); }), HasSubstr("sets within a character class"));
  EXPECT_THAT(message_of([] { text::Pattern("(", "p"); }), HasSubstr("p: the pattern '(' cannot be read"));
  EXPECT_THAT(message_of([] { text::Pattern("(a+)+$", "p").find_all(std::string(60, 'a') + "!"); }),
              HasSubstr("matching a pattern at byte 0"));
}

/// Joins the pair of the lowest rank, the leftmost of them, until there is none.
Ids merged_naively(Ids ids, const text::MergeTable& merges) {
  while (true) {
    const text::MergeTable::Merge* best = nullptr;
    std::size_t place = 0;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      const auto* found = merges.find(ids[i], ids[i + 1]);
      if (found != nullptr && (best == nullptr || found->rank < best->rank)) {
        best = found;
        place = i;
      }
    }
    if (best == nullptr) return ids;
    ids[place] = best->id;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(place) + 1);
  }
}

TEST(BpeTest, MergesAsByHand) {
  std::mt19937 random(5);
  const std::string letters = "abc";
  for (int round = 0; round < 40; ++round) {
    std::vector<std::string> tokens{"a", "b", "c"};
    text::IdOfToken ids{{"a", 0}, {"b", 1}, {"c", 2}};
    text::MergeTable merges;
    for (std::uint32_t rank = 0; rank < 25; ++rank) {
      const auto left = static_cast<std::int32_t>(random() % tokens.size());
      const auto right = static_cast<std::int32_t>(random() % tokens.size());
      const std::string joined = tokens[static_cast<std::size_t>(left)] + tokens[static_cast<std::size_t>(right)];
      if (joined.size() > 8 || ids.contains(joined)) continue;
      ids.emplace(joined, static_cast<std::int32_t>(tokens.size()));
      merges.set(left, right, {rank, static_cast<std::int32_t>(tokens.size())});
      tokens.push_back(joined);
    }
    const text::Bpe bpe(ids, merges, {});
    for (int length = 1; length < 60; length += 7) {
      std::string word;
      Ids characters;
      for (int i = 0; i < length; ++i) {
        characters.push_back(static_cast<std::int32_t>(random() % 3));
        word += letters[static_cast<std::size_t>(characters.back())];
      }
      Ids found;
      bpe.encode(word, found);
      ASSERT_EQ(found, merged_naively(characters, merges)) << word << " in round " << round;
    }
  }
}

TEST(BpeTest, UnknownCharacters) {
  const text::IdOfToken ids{{"?", 0}, {"a", 1}, {"<0xC3>", 2}, {"<0xA9>", 3}};
  const auto encode = [&](text::BpeOptions options, std::string_view word) {
    Ids found;
    text::Bpe(ids, text::MergeTable(), std::move(options)).encode(word, found);
    return found;
  };
  EXPECT_EQ(encode({}, "axxa"), (Ids{1, 1}));
  EXPECT_EQ(encode({.unknown = 0}, "axxa"), (Ids{1, 0, 0, 1}));
  EXPECT_EQ(encode({.unknown = 0, .fuse_unknown = true}, "axxa"), (Ids{1, 0, 1}));
  EXPECT_EQ(encode({.unknown = 0, .byte_fallback = true}, "a\xC3\xA9x"), (Ids{1, 2, 3, 0}));
}

TEST(BpeTest, ScoresBecomeMerges) {
  const std::vector<std::string> tokens{"a", "b", "ab", "ba", "aba"};
  text::IdOfToken ids;
  for (std::size_t i = 0; i < tokens.size(); ++i) ids.emplace(tokens[i], static_cast<std::int32_t>(i));
  const std::vector<float> scores{0, 0, -2, -1, -3};
  const auto merges = text::merges_of_scores(tokens, ids, scores, std::vector<bool>(5, true));
  Ids found;
  text::Bpe(ids, merges, {}).encode("aba", found);
  EXPECT_EQ(found, (Ids{4}));  // "ba" first, then "a" + "ba"
  found.clear();
  std::vector<bool> mergeable(5, true);
  mergeable[4] = false;
  text::Bpe(ids, text::merges_of_scores(tokens, ids, scores, mergeable), {}).encode("aba", found);
  EXPECT_EQ(found, (Ids{0, 3}));
}

/// The best score of any cut of a word.
double best_score(std::string_view word, const text::IdOfToken& ids, const std::vector<double>& scores) {
  if (word.empty()) return 0;
  double best = -std::numeric_limits<double>::infinity();
  for (std::size_t length = 1; length <= word.size(); ++length) {
    const auto found = ids.find(word.substr(0, length));
    if (found == ids.end()) continue;
    best =
        std::max(best, scores[static_cast<std::size_t>(found->second)] + best_score(word.substr(length), ids, scores));
  }
  return best;
}

TEST(UnigramTest, FindsTheBestCut) {
  const std::vector<std::string> pieces{"<unk>", "a", "b", "ab", "ba", "aab", "bb", "abba"};
  std::mt19937 random(3);
  for (int round = 0; round < 30; ++round) {
    text::IdOfToken ids;
    std::vector<double> scores;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      ids.emplace(pieces[i], static_cast<std::int32_t>(i));
      scores.push_back(-static_cast<double>(random() % 1000) / 100);
    }
    const text::Unigram unigram(pieces, scores, 0, false, ids);
    for (unsigned bits = 0; bits < 256; bits += 5) {
      std::string word;
      for (unsigned i = 0; i < 8; ++i) word += (bits >> i & 1) != 0 ? 'a' : 'b';
      Ids found;
      unigram.encode(word, found);
      double sum = 0;
      std::string spelt;
      for (const std::int32_t id : found) {
        sum += scores[static_cast<std::size_t>(id)];
        spelt += pieces[static_cast<std::size_t>(id)];
      }
      EXPECT_EQ(spelt, word);
      EXPECT_NEAR(sum, best_score(word, ids, scores), 1e-12);
    }
    Ids found;
    unigram.encode("axya", found);
    EXPECT_EQ(found, (Ids{1, 0, 1}));
  }
  const text::IdOfToken ids{{"a", 0}};
  Ids found;
  const std::vector<std::string> one{"a"};
  EXPECT_THAT(message_of([&] { text::Unigram(one, {0.0}, std::nullopt, false, ids).encode("x", found); }),
              HasSubstr("no token for 'x'"));
}

TEST(PreTokenizerTest, CutsAsItIsTold) {
  const auto cut = [](const char* json, const std::string& text) {
    const text::Words words = text::PreTokenizer::read(Json::parse(json), "p").apply(text, true);
    std::vector<std::string> parts;
    for (const text::Range& range : words.ranges)
      parts.push_back(words.text.substr(range.begin, range.end - range.begin));
    return parts;
  };
  const auto split = [&](const std::string& behavior, const char* invert = "false") {
    return cut((R"({"type":"Split","pattern":{"String":"-"},"behavior":")" + behavior + R"(","invert":)" + invert + "}")
                   .c_str(),
               "a--b-c");
  };
  EXPECT_THAT(split("Removed"), ElementsAre("a", "b", "c"));
  EXPECT_THAT(split("Removed", "true"), ElementsAre("-", "-", "-"));
  EXPECT_THAT(split("Isolated"), ElementsAre("a", "-", "-", "b", "-", "c"));
  EXPECT_THAT(split("MergedWithPrevious"), ElementsAre("a-", "-", "b-", "c"));
  EXPECT_THAT(split("MergedWithNext"), ElementsAre("a", "-", "-b", "-c"));
  EXPECT_THAT(split("Contiguous"), ElementsAre("a", "--", "b", "-", "c"));
  EXPECT_THAT(cut(R"({"type":"Metaspace","prepend_scheme":"first","split":true})", "a b"), ElementsAre("\xE2\x96\x81"
                                                                                                       "a",
                                                                                                       "\xE2\x96\x81"
                                                                                                       "b"));
}

TEST(AddedTokensTest, FlagsDecideWhatIsTaken) {
  const std::vector<text::AddedToken> tokens{{.content = "<s>", .id = 1, .special = true},
                                             {.content = "<s>x", .id = 2},
                                             {.content = "word", .id = 3, .single_word = true},
                                             {.content = "|", .id = 4, .lstrip = true, .rstrip = true}};
  const text::AddedTokenFinder finder(tokens);
  const auto cut = [&](const std::string& text, bool special = true) {
    std::vector<std::string> parts;
    for (const text::Stretch& s : finder.split(text, [&](text::Range) { return special; })) {
      parts.push_back(std::to_string(s.token) + ":" + text.substr(s.range.begin, s.range.end - s.range.begin));
    }
    return parts;
  };
  EXPECT_THAT(cut("a<s>b<s>x"), ElementsAre("-1:a", "1:<s>", "-1:b", "2:<s>x"));
  EXPECT_THAT(cut("a<s>b<s>x", false), ElementsAre("-1:a<s>b", "2:<s>x"));
  EXPECT_THAT(cut("words word.sword"), ElementsAre("-1:words ", "3:word", "-1:.sword"));
  EXPECT_THAT(cut("a  |\n b"), ElementsAre("-1:a", "4:  |\n ", "-1:b"));
}

TEST(CharacterMapTest, DamagedRulesAreRefused) {
  EXPECT_THAT(message_of([] { text::CharacterMap("!!", "n"); }), HasSubstr("is not base64"));
  EXPECT_THAT(message_of([] { text::CharacterMap("AA==", "n"); }), HasSubstr("has 1 bytes"));
  EXPECT_THAT(message_of([] { text::CharacterMap("/////wAA", "n"); }), HasSubstr("4294967295 bytes of rules follow"));
  EXPECT_EQ(text::CharacterMap("AAAAAA==", "n").apply("abc"), "abc");
}

/// Letters and a few names, one token per character.
Tokenizer small_tokenizer() {
  Json vocabulary = Json::object();
  for (int i = 0; i < 256; ++i) vocabulary[text::byte_characters()[static_cast<std::size_t>(i)]] = i;
  vocabulary["\xC4\x8A\xC4\x8A"] = 256;  // two line breaks
  Json added = Json::array();
  int id = 257;
  for (const char* name : {"<|im_start|>", "<|im_end|>"}) {
    added.push_back({{"id", id++}, {"content", name}, {"special", true}});
  }
  return Tokenizer::read({{"added_tokens", added},
                          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
                          {"decoder", {{"type", "ByteLevel"}}},
                          {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", {"\xC4\x8A \xC4\x8A"}}}}},
                         "t", 300);
}

TEST(TokenizerTest, NamesCountInMarkupOnly) {
  const Tokenizer tokenizer = small_tokenizer();
  EXPECT_EQ(tokenizer.encode("<|im_end|>").size(), 10U);
  EXPECT_EQ(tokenizer.encode("<|im_end|>", true), (Ids{258}));
  const std::vector<TextPart> parts{{"<|im_start|>", true}, {"<|im_end|>", false}, {"<|im", true}, {"_end|>", true}};
  const Ids ids = tokenizer.encode(parts);
  EXPECT_EQ(ids.size(), 12U);
  EXPECT_EQ(ids.front(), 257);
  EXPECT_EQ(ids.back(), 258);
  // Words may reach over the seam of two parts.
  EXPECT_EQ(tokenizer.encode(std::vector<TextPart>{{"\n", true}, {"\n", false}}), (Ids{256}));
  EXPECT_EQ(tokenizer.decode(ids), "<|im_end|>");
  EXPECT_EQ(tokenizer.name_of(258), "<|im_end|>");
  EXPECT_EQ(tokenizer.bytes_of(258), "");
  EXPECT_EQ(tokenizer.bytes_of(256), "\n\n");
}

TEST(ChatTemplateTest, RolesAreChecked) {
  const auto chatml = ChatTemplate::recognise("{{'<|im_start|>'}}", "t");
  EXPECT_EQ(chatml.kind(), ChatTemplate::Kind::chatml);
  const auto message = [&](const std::vector<ChatMessage>& messages) {
    return message_of([&] { chatml.render(messages, "", ""); });
  };
  EXPECT_EQ(message({{"system", "s"}, {"user", "u"}, {"assistant", "a"}, {"user", "u"}}), "no error");
  EXPECT_THAT(message({}), HasSubstr("no messages"));
  EXPECT_THAT(message({{"user", "u"}, {"user", "u"}}), HasSubstr("message 1 has the role 'user'; expected assistant"));
  EXPECT_THAT(message({{"user", "u"}, {"assistant", "a"}}), HasSubstr("the last message has the role 'assistant'"));
  EXPECT_THAT(message_of([] { ChatTemplate::recognise("{{ x }}", "file"); }),
              HasSubstr("file: the chat template is none"));
}

}  // namespace
}  // namespace tessera::model
