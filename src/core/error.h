// Formatting of errors: one line with the argument, its value and what was expected.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "tessera/core.h"

namespace tessera {

/// Throws tessera::Error with a formatted message.
template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

/// fail() unless the condition holds. For mistakes of the user; our own invariants are asserts.
template <class... Args>
void require(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) fail(format, std::forward<Args>(args)...);
}

/// The name of `known` nearest to `name` by edit distance.
std::string nearest_name(std::string_view name, std::span<const std::string> known);

}  // namespace tessera
