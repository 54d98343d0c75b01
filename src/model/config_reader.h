// Keys of a configuration, with messages that name them.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"
#include "io/json.h"

namespace tessera::model {

// Far above every model there is; products of two stay far below 2^63.
constexpr std::int64_t kLargestSize = std::int64_t{1} << 26;
constexpr std::int64_t kMostLayers = 4096;
constexpr std::int64_t kMostHeads = 65536;
constexpr std::int64_t kMostExperts = 65536;
constexpr std::int64_t kMostPositions = std::int64_t{1} << 31;

/// One JSON object. Keys that are null count as missing.
class ConfigReader {
 public:
  ConfigReader(const Json& json, std::string name) : json_(json), name_(std::move(name)) {
    require(json.is_object(), "{}: expected a JSON object", name_);
  }

  template <class T>
  T value(std::string_view key) const {
    return get<T>(json_, key, name_);
  }
  template <class T>
  T value_or(std::string_view key, T fallback) const {
    return get_or<T>(json_, key, name_, std::move(fallback));
  }
  std::int64_t size(std::string_view key, std::int64_t largest) const {
    return checked(key, value<std::int64_t>(key), largest);
  }
  std::int64_t size_or(std::string_view key, std::int64_t fallback, std::int64_t largest) const {
    return find(key) == nullptr ? fallback : size(key, largest);
  }
  double positive(std::string_view key) const { return checked_positive(key, value<double>(key)); }
  double positive_or(std::string_view key, double fallback) const {
    return find(key) == nullptr ? fallback : positive(key);
  }
  /// Null when the key is missing.
  const Json* find(std::string_view key) const {
    const auto found = json_.find(key);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }
  /// The object under a key that is there.
  ConfigReader inside(std::string_view key) const { return {*find(key), fmt::format("{}: '{}'", name_, key)}; }
  const Json& json() const { return json_; }
  const std::string& name() const { return name_; }

 private:
  std::int64_t checked(std::string_view key, std::int64_t number, std::int64_t largest) const {
    require(number >= 1 && number <= largest, "{}: '{}' is {}; expected 1 to {}", name_, key, number, largest);
    return number;
  }
  double checked_positive(std::string_view key, double number) const {
    require(std::isfinite(number) && number > 0, "{}: '{}' is {}; expected a positive number", name_, key, number);
    return number;
  }

  const Json& json_;
  std::string name_;
};

}  // namespace tessera::model
