#include "view/report_page.h"

#include <fmt/format.h>

#include <array>
#include <string_view>

#include "core/error.h"
#include "report_assets.h"

namespace tessera {

namespace {

/// What the page of one kind of report consists of, beside what all share.
struct Kind {
  std::string_view name;
  std::string_view title;
  std::string_view body;
  std::string_view script;
  bool charts = true;
};

constexpr std::array kKinds{
    Kind{"compare", "methods compared", report_assets::kCompareBody, report_assets::kCompareScript},
    Kind{"eval", "answers compared", report_assets::kEvalBody, report_assets::kEvalScript},
    Kind{"view", "attention and plans", report_assets::kViewBody, report_assets::kViewScript, false},
};

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

const Kind& kind_of(const nlohmann::ordered_json& report) {
  const auto name = report.value("kind", std::string());
  for (const Kind& kind : kKinds) {
    if (kind.name == name) return kind;
  }
  fail("a report of kind '{}' has no page", name);
}

}  // namespace

std::string report_page(const nlohmann::ordered_json& report) {
  const Kind& kind = kind_of(report);
  return fmt::format(
      "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n<meta name=viewport "
      "content=\"width=device-width\">\n<title>Tessera: {}</title>\n<style>{}</style>\n</head>\n"
      "<body>\n{}\n<script id=report type=\"application/json\">{}</script>\n<script>{}</script>\n<script>{}</script>\n"
      "<script>{}</script>\n</body>\n</html>\n",
      kind.title, report_assets::kStyle, kind.body, embedded(report),
      kind.charts ? report_assets::kCharts : std::string_view(), report_assets::kCommonScript, kind.script);
}

}  // namespace tessera
