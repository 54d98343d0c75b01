#include "support/csv.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace tessera::cli {

namespace {

using OrderedJson = nlohmann::ordered_json;
using Cells = std::vector<std::pair<std::string, std::string>>;

void flatten(const OrderedJson& value, const std::string& name, Cells& out) {
  if (value.is_object() && name != "params") {
    for (const auto& [key, inner] : value.items())
      flatten(inner, name.empty() ? key : fmt::format("{}.{}", name, key), out);
    return;
  }
  if (value.is_null()) return;
  const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
  std::string quoted;
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  out.emplace_back(name, text.find_first_of(",\"\n") == std::string::npos ? text : '"' + quoted + '"');
}

}  // namespace

std::string csv_of(const OrderedJson& rows) {
  std::vector<std::string> columns;
  std::vector<Cells> lines;
  for (const OrderedJson& row : rows) {
    flatten(row, "", lines.emplace_back());
    auto place = columns.begin();
    for (const auto& [name, text] : lines.back()) {
      const auto found = std::find(columns.begin(), columns.end(), name);
      // A column that earlier rows lacked stands behind the one before it in its own row.
      place = (found == columns.end() ? columns.insert(place, name) : found) + 1;
    }
  }
  std::string text = fmt::format("{}\n", fmt::join(columns, ","));
  for (const Cells& line : lines) {
    std::vector<std::string> cells;
    for (const std::string& column : columns) {
      const auto found = std::find_if(line.begin(), line.end(), [&](const auto& cell) { return cell.first == column; });
      cells.push_back(found == line.end() ? "" : found->second);
    }
    text += fmt::format("{}\n", fmt::join(cells, ","));
  }
  return text;
}

}  // namespace tessera::cli
