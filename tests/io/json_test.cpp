// JSON from outside: good text is read, bad text ends in one tessera::Error that says where and what.
#include "io/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "io/temporary_folder.h"

namespace tessera {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

template <class Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Json, ReadsValues) {
  const Json object =
      parse_json(R"({"i": -3, "d": 1.5, "b": true, "s": "x", "l": [1, 2], "t": ["a"], "n": null})", "f");
  EXPECT_EQ(get<std::int64_t>(object, "i", "f"), -3);
  EXPECT_EQ(get<double>(object, "d", "f"), 1.5);
  EXPECT_EQ(get<double>(object, "i", "f"), -3.0);
  EXPECT_TRUE(get<bool>(object, "b", "f"));
  EXPECT_EQ(get<std::string>(object, "s", "f"), "x");
  EXPECT_EQ(get<std::vector<std::int64_t>>(object, "l", "f"), (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(get<std::vector<std::string>>(object, "t", "f"), std::vector<std::string>{"a"});
  EXPECT_EQ(get_or<std::int64_t>(object, "n", "f", 7), 7);
  EXPECT_EQ(get_or<std::int64_t>(object, "missing", "f", 8), 8);
  EXPECT_EQ(get_optional<double>(object, "missing", "f"), std::nullopt);
}

TEST(Json, NamesFileKeyAndExpectedType) {
  const Json object = parse_json(R"({"i": 1.5, "u": 18446744073709551615, "l": [1, "a"]})", "f");
  const auto message = [&](std::string_view key) {
    return message_of([&] { get<std::int64_t>(object, key, "config.json"); });
  };
  EXPECT_THAT(message("i"), AllOf(HasSubstr("config.json"), HasSubstr("'i'"), HasSubstr("1.5"), HasSubstr("integer")));
  EXPECT_THAT(message("u"), HasSubstr("integer"));
  EXPECT_THAT(message("gone"), AllOf(HasSubstr("'gone'"), HasSubstr("missing")));
  EXPECT_THAT(message_of([&] { get<std::vector<std::int64_t>>(object, "l", "f"); }), HasSubstr("list of 64-bit"));
  EXPECT_THAT(message_of([&] { get<bool>(Json::array(), "x", "f"); }), HasSubstr("expected an object"));
}

TEST(Json, SaysLineAndColumnOfMistakes) {
  EXPECT_THAT(message_of([] { parse_json("{\n  \"a\": 1,\n  \"b\" 2\n}", "config.json"); }),
              AllOf(HasSubstr("config.json"), HasSubstr("line 3"), HasSubstr("column 7")));
}

TEST(Json, RefusesBadText) {
  const std::string deep = std::string(100, '[') + std::string(100, ']');
  const std::string very_deep(3'000'000, '[');
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("nul"), std::string("1 2"), std::string(R"({"a":1,"a":2})"),
        std::string("{\"a\":1e999}"), std::string("\"\xff\""), std::string("[1,]"), std::string("\"\0\"", 3),
        std::string("// comment"), deep, very_deep}) {
    EXPECT_THROW(parse_json(text, "text"), Error) << text.substr(0, 40);
  }
  EXPECT_NO_THROW(parse_json(deep, "text", {.depth = 100}));
  EXPECT_THROW(parse_json("[1,2,3]", "text", {.bytes = 6}), Error);
}

TEST(Json, ReadsFiles) {
  const testing::TemporaryFolder folder;
  EXPECT_EQ(get<std::int64_t>(parse_json_file(folder.file("a.json", R"({"x": 5})")), "x", "a"), 5);
  EXPECT_THAT(message_of([&] { parse_json_file(folder / "missing.json"); }),
              AllOf(HasSubstr("missing.json"), HasSubstr("No such file")));
  EXPECT_THROW(parse_json_file(folder.path()), Error);
  EXPECT_THROW(parse_json_file(folder.file("empty.json", "")), Error);
}

}  // namespace
}  // namespace tessera
