#include "support/number_list.h"

#include <algorithm>
#include <charconv>
#include <system_error>

#include "core/error.h"

namespace tessera::cli {

std::vector<double> number_list(std::string_view flag, const std::string& text, double low, double high) {
  std::vector<double> numbers;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    double number = 0;
    const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), number);
    require(error == std::errc{} && stop == word.data() + word.size(), "{}: '{}' is not a number", flag, word);
    require(number > low && number <= high, "{}: {} is out of range; expected above {}, up to {}", flag, word, low,
            high);
    numbers.push_back(number);
    begin = end + 1;
  }
  return numbers;
}

}  // namespace tessera::cli
