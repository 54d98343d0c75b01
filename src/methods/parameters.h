// Parameters of methods, declared once: a struct visits its own fields, and from that visit come parsing, defaults,
// ranges, documentation and the JSON that reports what ran.
//
//   struct Params {
//     std::int64_t keep = 16;
//     void visit(ParameterList& v) { v("keep", keep, 1, 4096, "key tiles kept per query tile"); }
//   };
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "tessera/method.h"

namespace tessera {

/// Largest value of parameters that count tokens: token indices are 32-bit.
inline constexpr std::int64_t kMostTokens = 2147483647;

/// A parameter that is a JSON document: the path of its file, or the document itself, so that one method file can hold
/// everything.
struct Configuration {
  std::string text;
  bool empty() const { return text.empty(); }
  bool is_path() const { return !text.starts_with('{') && !text.starts_with('['); }
  /// For messages.
  std::string name() const { return is_path() ? text : "(in the parameters)"; }
};

/// Collects references to the fields of one parameter struct; valid as long as the struct.
class ParameterList {
 public:
  void operator()(std::string_view name, std::int64_t& field, std::int64_t minimum, std::int64_t maximum,
                  std::string_view description) {
    fields_.push_back({std::string(name), std::string(description), Integer{&field, minimum, maximum}});
  }
  void operator()(std::string_view name, double& field, double minimum, double maximum, std::string_view description) {
    fields_.push_back({std::string(name), std::string(description), Real{&field, minimum, maximum}});
  }
  void operator()(std::string_view name, bool& field, std::string_view description) {
    fields_.push_back({std::string(name), std::string(description), &field});
  }
  void operator()(std::string_view name, std::string& field, std::string_view description) {
    fields_.push_back({std::string(name), std::string(description), &field});
  }
  /// A string on the command line and in the documentation; JSON may give an object or an array instead of a path.
  void operator()(std::string_view name, Configuration& field, std::string_view description) {
    fields_.push_back({std::string(name), std::string(description), &field});
  }
  /// An enum with the values 0, 1, ... in the order of `choices`.
  template <class Enum, std::enable_if_t<std::is_enum_v<Enum>, int> = 0>
  void operator()(std::string_view name, Enum& field, std::initializer_list<std::string_view> choices,
                  std::string_view description) {
    Choice choice;
    choice.names.assign(choices.begin(), choices.end());
    choice.get = [&field] { return static_cast<std::size_t>(field); };
    choice.set = [&field](std::size_t index) { field = static_cast<Enum>(index); };
    fields_.push_back({std::string(name), std::string(description), std::move(choice)});
  }

  /// For the command line and the documentation, in the order of declaration; the fields hold the defaults.
  std::vector<ParameterInfo> describe() const;
  /// Sets the fields that a JSON object names. `method` begins the messages. Throws Error for text that is not an
  /// object, unknown keys (with the nearest name), wrong types and values out of range (with the range).
  void assign(std::string_view method, std::string_view json) const;
  /// All fields as a JSON object, in the order of declaration.
  std::string to_json() const;

 private:
  struct Integer {
    std::int64_t* value;
    std::int64_t minimum;
    std::int64_t maximum;
  };
  struct Real {
    double* value;
    double minimum;
    double maximum;
  };
  struct Choice {
    std::vector<std::string> names;
    std::function<std::size_t()> get;
    std::function<void(std::size_t)> set;
  };
  struct Field {
    std::string name;
    std::string description;
    std::variant<Integer, Real, bool*, std::string*, Configuration*, Choice> value;
  };

  std::vector<Field> fields_;
};

/// The declared fields of a parameter struct.
template <class Params>
ParameterList parameters_of(Params& params) {
  ParameterList list;
  params.visit(list);
  return list;
}

}  // namespace tessera
