#include "methods/axis_values.h"

#include <charconv>
#include <vector>

#include "core/error.h"
#include "methods/parameters.h"

namespace tessera {

std::array<std::int64_t, 3> axis_values(std::string_view method, std::string_view parameter, const std::string& text,
                                        std::int64_t minimum, std::int64_t missing) {
  std::vector<std::int64_t> numbers;
  const char* next = text.data();
  const char* const end = text.data() + text.size();
  while (true) {
    std::int64_t value = 0;
    const auto [rest, failed] = std::from_chars(next, end, value);
    const bool good = failed == std::errc{} && value >= minimum && value <= kMostTokens && numbers.size() < 3;
    require(good && (rest == end || *rest == 'x'),
            "{}: {} is '{}'; expected one to three numbers of {} or more joined by x", method, parameter, text,
            minimum);
    numbers.push_back(value);
    if (rest == end) break;
    next = rest + 1;
  }
  std::array<std::int64_t, 3> values{missing, missing, missing};
  std::copy(numbers.begin(), numbers.end(), values.end() - static_cast<std::ptrdiff_t>(numbers.size()));
  return values;
}

}  // namespace tessera
