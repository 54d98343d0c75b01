#include "view/report_page.h"

#include <fmt/format.h>

#include <string_view>

#include "report_assets.h"

namespace tessera {

namespace {

/// JSON inside a script element: no text of the report may end the element.
std::string embedded(const nlohmann::ordered_json& report) {
  const std::string json = report.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  std::string text;
  text.reserve(json.size());
  for (const char c : json) {
    if (c == '<') {
      text += "\\u003c";
    } else {
      text += c;
    }
  }
  return text;
}

}  // namespace

std::string report_page(const nlohmann::ordered_json& report) {
  return fmt::format(
      "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n<meta name=viewport "
      "content=\"width=device-width\">\n<title>Tessera: methods compared</title>\n<style>{}</style>\n</head>\n"
      "<body>\n{}\n<script id=report type=\"application/json\">{}</script>\n<script>{}</script>\n<script>{}</script>\n"
      "</body>\n</html>\n",
      report_assets::kStyle, report_assets::kBody, embedded(report), report_assets::kCharts, report_assets::kScript);
}

}  // namespace tessera
