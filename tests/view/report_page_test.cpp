#include "view/report_page.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tessera/core.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(ReportPage, TextOfTheReportCannotEndItsElement) {
  for (const char* kind : {"compare", "eval", "view"}) {
    const std::string html = report_page({{"kind", kind}, {"command", "x </script><script>alert(1)</script>"}});
    EXPECT_THAT(html, Not(HasSubstr("alert(1)</script>"))) << kind;
    EXPECT_THAT(html, HasSubstr("x \\u003c/script>")) << kind;
  }
}

TEST(ReportPage, EveryKindHasItsOwnPage) {
  const auto page = [](const char* kind) { return report_page({{"kind", kind}, {"command", ""}}); };
  EXPECT_THAT(page("compare"), HasSubstr("id=error-density"));
  EXPECT_THAT(page("eval"), HasSubstr("id=score-density"));
  EXPECT_THAT(page("view"), HasSubstr("id=attention"));
  EXPECT_THROW(page("x"), Error);
  EXPECT_THROW(report_page(nlohmann::ordered_json::object()), Error);
}

}  // namespace
}  // namespace tessera
