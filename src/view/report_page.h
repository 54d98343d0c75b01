// One HTML file, without a network, of what a command measured: charts and tables that sort.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace tessera {

/// The page of a report {"kind", "command", ...} as `tessera compare` and `tessera eval` print it, or as
/// view/attention_view.h makes it for `tessera view`. The report itself lies in the page, and what is drawn is drawn
/// from it, charts by Chart.js, which is part of the page too. Throws Error for another kind.
std::string report_page(const nlohmann::ordered_json& report);

}  // namespace tessera
