#include "io/json.h"

#include <algorithm>
#include <limits>
#include <unordered_set>
#include <utility>

#include "core/error.h"
#include "io/file_bytes.h"

namespace tessera {

namespace {

/// Reads a text event by event before the tree is built: checks the depth and that no object has a key twice, neither
/// of which the tree builder does.
class Checker : public nlohmann::json_sax<Json> {
 public:
  Checker(std::string_view text, std::string_view name, const JsonLimits& limits)
      : text_(text), name_(name), limits_(limits) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return enter(); }
  bool end_object() override { return leave(); }
  bool start_array(std::size_t) override { return enter(); }
  bool end_array() override { return leave(); }
  bool key(string_t& key) override {
    require(keys_.back().insert(key).second, "{}: an object holds the key '{}' twice", name_, shortened(key));
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const Json::exception& error) override {
    const std::string_view before = text_.substr(0, std::min(position, text_.size()));
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const std::size_t line_begin = before.rfind('\n') + 1;  // npos + 1 is 0
    // The library's text starts with its own code and position.
    std::string_view what = error.what();
    if (const auto colon = what.find(": "); colon != std::string_view::npos) what.remove_prefix(colon + 2);
    fail("{}: not valid JSON at line {}, column {}: {}", name_, line, before.size() - line_begin, shortened(what));
  }

 private:
  static std::string_view shortened(std::string_view text) { return text.substr(0, 160); }

  bool enter() {
    require(static_cast<int>(keys_.size()) < limits_.depth, "{}: JSON is nested deeper than {} levels", name_,
            limits_.depth);
    keys_.emplace_back();
    return true;
  }
  bool leave() {
    keys_.pop_back();
    return true;
  }

  std::string_view text_;
  std::string_view name_;
  const JsonLimits& limits_;
  std::vector<std::unordered_set<std::string>> keys_;  ///< of the objects (and arrays) around the current value
};

template <class T>
struct Conversion;

template <>
struct Conversion<std::int64_t> {
  static constexpr std::string_view expected = "a 64-bit integer";
  static bool matches(const Json& value) {
    constexpr auto largest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    return value.is_number_integer() && (!value.is_number_unsigned() || value.get<std::uint64_t>() <= largest);
  }
};
template <>
struct Conversion<double> {
  static constexpr std::string_view expected = "a number";
  static bool matches(const Json& value) { return value.is_number(); }
};
template <>
struct Conversion<bool> {
  static constexpr std::string_view expected = "true or false";
  static bool matches(const Json& value) { return value.is_boolean(); }
};
template <>
struct Conversion<std::string> {
  static constexpr std::string_view expected = "a string";
  static bool matches(const Json& value) { return value.is_string(); }
};
template <>
struct Conversion<std::vector<std::int64_t>> {
  static constexpr std::string_view expected = "a list of 64-bit integers";
  static bool matches(const Json& value) {
    return value.is_array() && std::all_of(value.begin(), value.end(), Conversion<std::int64_t>::matches);
  }
};
template <>
struct Conversion<std::vector<std::string>> {
  static constexpr std::string_view expected = "a list of strings";
  static bool matches(const Json& value) {
    return value.is_array() && std::all_of(value.begin(), value.end(), Conversion<std::string>::matches);
  }
};
template <>
struct Conversion<Json> {
  static constexpr std::string_view expected = "a value";
  static bool matches(const Json&) { return true; }
};

/// The value as text for a message.
std::string printed(const Json& value) {
  // Replace invalid UTF-8: dump() throws on it otherwise.
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

}  // namespace

Json parse_json(std::string_view text, std::string_view name, const JsonLimits& limits) {
  require(text.size() <= limits.bytes, "{}: {} bytes of JSON are too many; expected at most {}", name, text.size(),
          limits.bytes);
  Checker checker(text, name, limits);
  Json::sax_parse(text, &checker);
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {
    fail("{}: not valid JSON: {}", name, error.what());
  }
}

std::string read_text_file(const std::filesystem::path& path, std::size_t largest) {
  const FileBytes file(path);
  require(file.bytes().size() <= largest, "{}: {} bytes are too many; expected at most {}", path.string(),
          file.bytes().size(), largest);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

Json parse_json_file(const std::filesystem::path& path, const JsonLimits& limits) {
  return parse_json(read_text_file(path, limits.bytes), path.string(), limits);
}

template <class T>
std::optional<T> get_optional(const Json& object, std::string_view key, std::string_view name) {
  require(object.is_object(), "{}: expected an object with the key '{}'; got {}", name, key, printed(object));
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return std::nullopt;
  require(Conversion<T>::matches(*found), "{}: '{}' is {}; expected {}", name, key, printed(*found),
          Conversion<T>::expected);
  return found->template get<T>();
}

template <class T>
T get(const Json& object, std::string_view key, std::string_view name) {
  std::optional<T> value = get_optional<T>(object, key, name);
  require(value.has_value(), "{}: the key '{}' is missing; expected {}", name, key, Conversion<T>::expected);
  return *std::move(value);
}

template std::int64_t get(const Json&, std::string_view, std::string_view);
template double get(const Json&, std::string_view, std::string_view);
template bool get(const Json&, std::string_view, std::string_view);
template std::string get(const Json&, std::string_view, std::string_view);
template std::vector<std::int64_t> get(const Json&, std::string_view, std::string_view);
template std::vector<std::string> get(const Json&, std::string_view, std::string_view);
template Json get(const Json&, std::string_view, std::string_view);
template std::optional<std::int64_t> get_optional(const Json&, std::string_view, std::string_view);
template std::optional<double> get_optional(const Json&, std::string_view, std::string_view);
template std::optional<bool> get_optional(const Json&, std::string_view, std::string_view);
template std::optional<std::string> get_optional(const Json&, std::string_view, std::string_view);
template std::optional<std::vector<std::int64_t>> get_optional(const Json&, std::string_view, std::string_view);
template std::optional<std::vector<std::string>> get_optional(const Json&, std::string_view, std::string_view);
template std::optional<Json> get_optional(const Json&, std::string_view, std::string_view);

}  // namespace tessera
