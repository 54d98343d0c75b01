// SPECs, declared parameters and their messages, and the documentation made of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "methods/head_patterns.h"
#include "methods/parameters.h"
#include "tessera/method.h"

namespace tessera {
namespace {

using testing::HasSubstr;

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}
std::string message_of_spec(const std::string& spec) {
  return message_of([&] { make_method(spec); });
}

/// A file in the test's temporary folder, removed at the end.
class TemporaryFile {
 public:
  TemporaryFile(const std::string& name, const std::string& text) : path_(testing::TempDir() + name) {
    std::ofstream(path_) << text;
  }
  ~TemporaryFile() { std::filesystem::remove(path_); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(Registry, HoldsTheMethodsSortedByFamilyAndName) {
  std::vector<std::pair<std::string, std::string>> names;
  for (const MethodEntry& entry : methods()) {
    names.emplace_back(entry.info.family, entry.info.name);
    EXPECT_FALSE(entry.info.summary.empty()) << entry.info.name;
    EXPECT_TRUE(entry.info.phases.prefill || entry.info.phases.decode) << entry.info.name;
  }
  EXPECT_TRUE(std::is_sorted(names.begin(), names.end()));
  for (const std::string name : {"dense", "window", "streaming", "oracle-topk", "xattention", "minference"}) {
    EXPECT_EQ(find_method(name).info.name, name);
  }
}

TEST(Registry, SuggestsTheNearestName) {
  EXPECT_THAT(message_of_spec("xatention"), HasSubstr("did you mean 'xattention'?"));
  EXPECT_THAT(message_of_spec(""), HasSubstr("unknown method ''"));
  EXPECT_THAT(message_of_spec("xattention:strid=4"), HasSubstr("unknown parameter 'strid'; did you mean 'stride'?"));
  EXPECT_THAT(message_of_spec("dense:k=1"), HasSubstr("unknown parameter 'k'; the method has none"));
}

TEST(Registry, NamesTheRangeAndTheType) {
  EXPECT_THAT(message_of_spec("xattention:tau=1.5"), HasSubstr("xattention: tau=1.5 is outside [0, 1]"));
  EXPECT_THAT(message_of_spec("window:left=-2"), HasSubstr("left=-2 is outside [-1, 2147483647]"));
  EXPECT_THAT(message_of_spec("window:left=4.5"), HasSubstr("left=4.5 is not an integer"));
  EXPECT_THAT(message_of_spec("window:left=99999999999999999999"), HasSubstr("is not an integer"));
  EXPECT_THAT(message_of_spec("window:left=18446744073709551615"), HasSubstr("is not an integer"));
  EXPECT_THAT(message_of_spec("window:left=wide"), HasSubstr("left=\"wide\" is not an integer"));
  EXPECT_THAT(message_of_spec("xattention:tau=nan"), HasSubstr("is not a number"));
  EXPECT_THAT(message_of_spec("oracle-topk:unit=blok"), HasSubstr("did you mean 'block'?"));
  EXPECT_THAT(message_of_spec("oracle-topk:diagonal=1"), HasSubstr("is not true or false"));
  EXPECT_THAT(message_of_spec("window:left"), HasSubstr("'left' is not key=value"));
  EXPECT_THAT(message_of_spec("window:=4"), HasSubstr("is not key=value"));
  EXPECT_THAT(message_of_spec("window:left=4,left=5"), HasSubstr("'left' is given twice"));
  EXPECT_THAT(message_of_spec("xattention:stride=24"), HasSubstr("stride=24 does not divide block=128"));
}

TEST(Registry, ParametersRoundTrip) {
  const auto method = make_method("oracle-topk:unit=token,p=0.25,diagonal=false,k=7");
  const auto json = nlohmann::json::parse(method->parameters());
  EXPECT_EQ(json["unit"], "token");
  EXPECT_EQ(json["p"], 0.25);
  EXPECT_EQ(json["diagonal"], false);
  EXPECT_EQ(json["k"], 7);
  EXPECT_EQ(json["rule"], "topk") << "defaults are filled in";
  EXPECT_EQ(find_method("oracle-topk").make(method->parameters())->parameters(), method->parameters());
}

TEST(Registry, EveryDeclaredDefaultIsAccepted) {
  for (const MethodEntry& entry : methods()) {
    std::string spec = entry.info.name;
    char separator = ':';
    for (const ParameterInfo& parameter : entry.parameters) {
      if (parameter.type == "string") continue;
      spec += separator + parameter.name + "=" + parameter.default_value;
      separator = ',';
    }
    EXPECT_EQ(make_method(spec)->parameters(), make_method(entry.info.name)->parameters()) << spec;
    const auto json = nlohmann::json::parse(make_method(entry.info.name)->parameters());
    EXPECT_EQ(json.size(), entry.parameters.size()) << entry.info.name;
  }
}

TEST(Registry, DocumentationNamesEveryMethodAndParameter) {
  const std::string text = methods_markdown();
  for (const MethodEntry& entry : methods()) {
    EXPECT_THAT(text, HasSubstr("### " + entry.info.name + "\n"));
    for (const ParameterInfo& parameter : entry.parameters) {
      EXPECT_THAT(text, HasSubstr("| `" + parameter.name + "` | " + parameter.type + " | " + parameter.default_value));
      EXPECT_FALSE(parameter.description.empty()) << entry.info.name << " " << parameter.name;
    }
  }
}

TEST(Registry, ReadsMethodFiles) {
  const TemporaryFile good("method.json", R"({"method": "window", "parameters": {"left": 7}})");
  EXPECT_EQ(nlohmann::json::parse(make_method(good.path())->parameters())["left"], 7);
  const TemporaryFile bare("bare.json", R"({"method": "dense"})");
  EXPECT_EQ(make_method(bare.path())->info().name, "dense");
  const TemporaryFile unknown("unknown.json", R"({"method": "window", "parameter": {}})");
  EXPECT_THAT(message_of_spec(unknown.path()), HasSubstr("unknown key 'parameter'"));
  const TemporaryFile wrong("wrong.json", R"({"method": "window", "parameters": [1]})");
  EXPECT_THAT(message_of_spec(wrong.path()), HasSubstr("parameters are not a JSON object"));
  const TemporaryFile broken("broken.json", "{\"method\": ");
  EXPECT_THAT(message_of_spec(broken.path()), HasSubstr("not valid JSON"));
  EXPECT_THAT(message_of_spec("missing-file.json"), HasSubstr("missing-file.json"));
}

TEST(HeadPatterns, ReadsTheFormatOfTheSearch) {
  const TemporaryFile file("heads.json",
                           R"([{"0": ["vertical_and_slash", 1000, 6096, 0.93], "2": ["stream_llm", 100, 800, 1]},
                                             {"1": ["block_sparse", 1000, 1, 0.5]}])");
  const HeadPatterns patterns = read_head_patterns({file.path()});
  ASSERT_EQ(patterns.size(), 2U);
  EXPECT_EQ(patterns[0].at(0), (HeadPattern{HeadPattern::Kind::vertical_and_slash, 1000, 6096}));
  EXPECT_EQ(patterns[0].at(2), (HeadPattern{HeadPattern::Kind::stream_llm, 100, 800}));
  EXPECT_EQ(patterns[1].at(1).kind, HeadPattern::Kind::block_sparse);
  EXPECT_EQ(patterns[0].count(1), 0U);
}

TEST(HeadPatterns, RefusesAnythingElse) {
  const auto message = [](const std::string& text) {
    const TemporaryFile file("bad.json", text);
    return message_of([&] { read_head_patterns({file.path()}); });
  };
  EXPECT_THAT(message(R"({"0": 1})"), HasSubstr("is not an array"));
  EXPECT_THAT(message(R"([[1]])"), HasSubstr("layer 0: expected an object of heads"));
  EXPECT_THAT(message(R"([{"x": ["stream_llm", 1, 1, 1]}])"), HasSubstr("'x' is not a head number"));
  EXPECT_THAT(message(R"([{}, {"3": ["slash", 1, 1, 1]}])"), HasSubstr("layer 1, head 3: unknown pattern 'slash'"));
  EXPECT_THAT(message(R"([{"3": ["stream_llm", -1, 1, 1]}])"), HasSubstr("size -1"));
  EXPECT_THAT(message(R"([{"3": ["stream_llm", 1]}])"), HasSubstr("expected [pattern, size, size, score]"));
}

}  // namespace
}  // namespace tessera
