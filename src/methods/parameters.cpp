#include "methods/parameters.h"

#include <cmath>

#include "core/error.h"
#include "io/json.h"

namespace tessera {

namespace {

template <class... Cases>
struct Overloaded : Cases... {
  using Cases::operator()...;
};
template <class... Cases>
Overloaded(Cases...) -> Overloaded<Cases...>;

std::string text_of(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

template <class Number>
void check_range(std::string_view method, std::string_view name, Number value, Number minimum, Number maximum) {
  require(value >= minimum && value <= maximum, "{}: {}={} is outside [{}, {}]", method, name, value, minimum, maximum);
}

/// Integers may be written as 4 or 4.0.
std::int64_t integer_of(std::string_view method, std::string_view name, const Json& value) {
  constexpr double exact = 9007199254740992.0;  // 2^53
  if (value.is_number_float()) {
    const double real = value.get<double>();
    if (real == std::floor(real) && std::abs(real) <= exact) return static_cast<std::int64_t>(real);
  }
  const bool fits = value.is_number_integer() &&
                    !(value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{INT64_MAX});
  require(fits, "{}: {}={} is not an integer", method, name, text_of(value));
  return value.get<std::int64_t>();
}

}  // namespace

std::vector<ParameterInfo> ParameterList::describe() const {
  std::vector<ParameterInfo> infos;
  for (const Field& field : fields_) {
    ParameterInfo info;
    info.name = field.name;
    info.description = field.description;
    std::visit(Overloaded{[&](const Integer& v) {
                            info.type = "int";
                            info.default_value = fmt::format("{}", *v.value);
                            info.minimum = fmt::format("{}", v.minimum);
                            info.maximum = fmt::format("{}", v.maximum);
                          },
                          [&](const Real& v) {
                            info.type = "float";
                            info.default_value = fmt::format("{}", *v.value);
                            info.minimum = fmt::format("{}", v.minimum);
                            info.maximum = fmt::format("{}", v.maximum);
                          },
                          [&](const bool* v) {
                            info.type = "bool";
                            info.default_value = *v ? "true" : "false";
                          },
                          [&](const std::string* v) {
                            info.type = "string";
                            info.default_value = *v;
                          },
                          [&](const Configuration* v) {
                            info.type = "string";
                            info.default_value = v->text;
                          },
                          [&](const Choice& v) {
                            info.type = "choice";
                            info.default_value = v.names.at(v.get());
                            info.choices = v.names;
                          }},
               field.value);
    infos.push_back(std::move(info));
  }
  return infos;
}

void ParameterList::assign(std::string_view method, std::string_view json) const {
  const Json object = parse_json(json, fmt::format("parameters of {}", method));
  require(object.is_object(), "{}: parameters are not a JSON object", method);
  std::vector<std::string> known;
  for (const Field& field : fields_) known.push_back(field.name);
  for (const auto& item : object.items()) {
    const std::string& name = item.key();
    const Json& value = item.value();
    const auto found = std::find(known.begin(), known.end(), name);
    require(found != known.end() || known.empty(), "{}: unknown parameter '{}'; did you mean '{}'? (known: {})", method,
            name, nearest_name(name, known), fmt::join(known, ", "));
    require(found != known.end(), "{}: unknown parameter '{}'; the method has none", method, name);
    const Field& field = fields_[found - known.begin()];
    std::visit(Overloaded{[&](const Integer& v) {
                            const std::int64_t number = integer_of(method, field.name, value);
                            check_range(method, field.name, number, v.minimum, v.maximum);
                            *v.value = number;
                          },
                          [&](const Real& v) {
                            require(value.is_number(), "{}: {}={} is not a number", method, field.name, text_of(value));
                            const double number = value.get<double>();
                            check_range(method, field.name, number, v.minimum, v.maximum);
                            *v.value = number;
                          },
                          [&](bool* v) {
                            require(value.is_boolean(), "{}: {}={} is not true or false", method, field.name,
                                    text_of(value));
                            *v = value.get<bool>();
                          },
                          [&](std::string* v) {
                            require(value.is_string(), "{}: {}={} is not a string", method, field.name, text_of(value));
                            *v = value.get<std::string>();
                          },
                          [&](Configuration* v) {
                            require(value.is_string() || value.is_structured(),
                                    "{}: {}={} is neither the path of a file nor its content", method, field.name,
                                    text_of(value));
                            v->text = value.is_string() ? value.get<std::string>() : text_of(value);
                          },
                          [&](const Choice& v) {
                            const std::string choice = value.is_string() ? value.get<std::string>() : text_of(value);
                            const auto at = std::find(v.names.begin(), v.names.end(), choice);
                            require(at != v.names.end(), "{}: {}={} is not one of {}; did you mean '{}'?", method,
                                    field.name, choice, fmt::join(v.names, ", "), nearest_name(choice, v.names));
                            v.set(static_cast<std::size_t>(at - v.names.begin()));
                          }},
               field.value);
  }
}

std::string ParameterList::to_json() const {
  nlohmann::ordered_json object = nlohmann::ordered_json::object();
  for (const Field& field : fields_) {
    std::visit(Overloaded{[&](const Integer& v) { object[field.name] = *v.value; },
                          [&](const Real& v) { object[field.name] = *v.value; },
                          [&](const bool* v) { object[field.name] = *v; },
                          [&](const std::string* v) { object[field.name] = *v; },
                          [&](const Configuration* v) {
                            if (v->is_path()) {
                              object[field.name] = v->text;
                            } else {
                              object[field.name] = nlohmann::ordered_json::parse(v->text);
                            }
                          },
                          [&](const Choice& v) { object[field.name] = v.names.at(v.get()); }},
               field.value);
  }
  return object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace tessera
