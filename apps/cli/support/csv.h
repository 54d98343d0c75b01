// Rows of a report as comma-separated values.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace tessera::cli {

/// One line of names, then one line per row (an array of objects). Nested objects become columns "error.rel_l2"; an
/// object "params" stays one JSON text. Columns stand in the order in which they first appear; what a row lacks, and
/// null, is empty.
std::string csv_of(const nlohmann::ordered_json& rows);

}  // namespace tessera::cli
