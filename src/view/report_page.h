// One HTML file, without a network: charts and a sortable table of what `tessera compare` measured.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace tessera {

/// The page of a report {"kind": "compare", "command", "rows": [...], ...}. The report itself lies in the page, and
/// the charts are drawn from it by Chart.js, which is part of the page too.
std::string report_page(const nlohmann::ordered_json& report);

}  // namespace tessera
