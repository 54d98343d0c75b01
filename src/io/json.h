// JSON from outside: parse errors and wrong types become one clear tessera::Error that names the file and the key.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "tessera/core.h"

namespace tessera {

using Json = nlohmann::json;

/// Limits for text that nobody vouches for.
struct JsonLimits {
  std::size_t bytes = std::size_t{1} << 28;
  int depth = 64;
};

/// Parses a whole text. `name` stands for the text in messages (a path, "--method", ...). Throws Error with line and
/// column for anything but one JSON value, for an object that holds a key twice, and beyond the limits.
Json parse_json(std::string_view text, std::string_view name, const JsonLimits& limits = {});

/// The whole content of a regular file; throws Error when it cannot be read or is larger than `largest` bytes.
std::string read_text_file(const std::filesystem::path& path, std::size_t largest = JsonLimits{}.bytes);
Json parse_json_file(const std::filesystem::path& path, const JsonLimits& limits = {});

/// The value of a key of an object, converted. T is std::int64_t, double, bool, std::string, std::vector<std::int64_t>,
/// std::vector<std::string> or Json (any value). Throws Error naming `name`, the key and the type expected when
/// `object` is no object, the key is missing or the value has another type. Integers must be written without fraction;
/// doubles may be written as integers.
template <class T>
T get(const Json& object, std::string_view key, std::string_view name);

/// The same, but nothing when the key is missing or null.
template <class T>
std::optional<T> get_optional(const Json& object, std::string_view key, std::string_view name);

template <class T>
T get_or(const Json& object, std::string_view key, std::string_view name, T fallback) {
  return get_optional<T>(object, key, name).value_or(std::move(fallback));
}

}  // namespace tessera
