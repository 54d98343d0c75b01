// The table that searches for heads write: one format for duo, razor and moa, in a file or in the parameters.
#include "methods/head_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "io/temporary_folder.h"
#include "methods/elastic_spans.h"
#include "methods/head_classes.h"
#include "methods/head_patterns.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;

constexpr const char* kTable = R"({"heads": [
  [{"class": "full", "gate": 0.9}, {"class": "span", "gate": 0.2, "sink": 4, "alpha": 34, "beta": 0}],
  [{"class": "full"}, {"alpha": 34, "beta": 0, "sink": 4}]]})";

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(HeadTable, IsReadAsClassesAndAsSpans) {
  const HeadClasses classes = read_head_classes({kTable});
  EXPECT_EQ(classes.gates, (std::vector<std::vector<double>>{{0.9, 0.2}, {1, 0}}));
  EXPECT_EQ(classes.sink, 4);
  EXPECT_EQ(classes.recent, 30);
  EXPECT_EQ(read_span_table({kTable}), (SpanTable{{{0, 1}, {34, 0}}, {{0, 1}, {34, 0}}}));
  const HeadTable table = head_table_of(Json::parse(kTable), "test");
  EXPECT_EQ(head_table_json(table), head_table_json(head_table_of(head_table_json(table), "again")));
  EXPECT_EQ(read_head_classes({head_table_json(table).dump()}).gates, classes.gates);
  // Spans that grow say nothing about recent tokens.
  const HeadClasses growing = read_head_classes({R"({"heads": [[{"sink": 4, "alpha": 4, "beta": 0.2}]]})"});
  EXPECT_EQ(growing.recent, -1);
  EXPECT_EQ(growing.gates[0][0], 0);
}

TEST(HeadTable, SaysWhatIsWrong) {
  const auto refusal = [](const std::string& text) { return message_of([&] { read_head_classes({text}); }); };
  EXPECT_THAT(refusal(R"({"heads": [[{"class": "half"}]]})"), HasSubstr("class is 'half'"));
  EXPECT_THAT(refusal(R"({"heads": [[{"class": "full", "size": 3}]]})"), HasSubstr("unknown key 'size'"));
  EXPECT_THAT(refusal(R"({"heads": [[{"class": "full", "gate": 2}]]})"), HasSubstr("gate is 2"));
  EXPECT_THAT(refusal(R"({"heads": [[{"alpha": 3, "beta": 0, "sink": 3}]]})"), HasSubstr("no place behind 3 sinks"));
  EXPECT_THAT(refusal(R"({"heads": [[{"class": "full"}], []]})"), HasSubstr("layer 1"));
  EXPECT_THAT(refusal(R"({"heads": []})"), HasSubstr("no heads"));
  EXPECT_THAT(refusal(R"({"heads": [[{"alpha": 9, "beta": 0, "sink": 3}, {"alpha": 8, "beta": 0, "sink": 3}]]})"),
              HasSubstr("head 1"));
  EXPECT_THAT(refusal("{"), HasSubstr("in the parameters"));
}

TEST(Configuration, StandsInTheMethodFile) {
  const testing::TemporaryFolder folder;
  const auto method_of = [&](const std::string& name, const Json& parameters) {
    const Json document{{"method", name}, {"parameters", parameters}, {"tuned", {{"length", 3}}}};
    return make_method(folder.file("method.json", document.dump()).string());
  };
  const Json table = Json::parse(kTable);
  for (const std::string name : {"duo", "razor"}) {
    const auto method = method_of(name, {{"heads", table}});
    EXPECT_NO_THROW(method->check_model(2, 4, 2));
    EXPECT_THROW(method->check_model(3, 4, 2), Error);
    // What a method reports makes it again.
    EXPECT_EQ(find_method(name).make(method->parameters())->parameters(), method->parameters());
    EXPECT_EQ(Json::parse(method->parameters())["heads"], table);
  }
  EXPECT_NO_THROW(method_of("moa", {{"config", table}}));
  EXPECT_NO_THROW(method_of("xattention", {{"thresholds", {{0.5, 0.9}}}}));
  EXPECT_NO_THROW(method_of("minference", {{"config", {{{"0", {"a_shape", 1, 2, 0.5}}}}}}));
  EXPECT_THAT(message_of([&] { method_of("duo", {{"heads", 3}}); }), HasSubstr("heads=3"));
  EXPECT_THAT(message_of([&] { method_of("duo", {{"heads", "missing.json"}}); }), HasSubstr("missing.json"));
  // Other strings stay strings.
  EXPECT_THAT(message_of([&] { method_of("xattention", {{"thresholds", {{2}}}}); }), HasSubstr("expected a number"));
}

}  // namespace
}  // namespace tessera
