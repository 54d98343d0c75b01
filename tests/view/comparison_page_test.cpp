#include "view/comparison_page.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tessera {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

PlanMap small_map() {
  Problem problem;
  problem.q_len = problem.kv_len = 8;
  problem.head_dim = problem.value_dim = 8;
  problem.causal = true;
  PlanMap map(8, 8);
  map.add(dense_plan(problem, 4, 4), 0, 0);
  return map;
}

ComparisonPage example_page() {
  ComparisonPage page{.model = "a model",
                      .document = "notes & <drafts>",
                      .tokens = 8,
                      .key = "12345",
                      .key_position = 4,
                      .machine = "two threads",
                      .results = {}};
  page.results.push_back({.method = "dense",
                          .parameters = "{}",
                          .density = 1,
                          .prefill_ms = 4000,
                          .attention_ms = 2000,
                          .bits_per_byte = 1.5,
                          .answer = "12345",
                          .found = true,
                          .maps = {}});
  page.results.push_back({.method = "window:left=3",
                          .parameters = R"({"left":3})",
                          .density = 0.05,
                          .prefill_ms = 2000,
                          .attention_ms = 500,
                          .bits_per_byte = 1.6,
                          .answer = "<b>\x01\xff",
                          .found = false,
                          .maps = {}});
  page.results.back().maps.push_back({.layer = 2, .q_head = 1, .map = small_map()});
  return page;
}

TEST(ComparisonPage, ShowsTheNumbersAgainstTheFirstMethod) {
  const std::string html = html_of(example_page());
  EXPECT_THAT(html, HasSubstr("<td>5.0 %<td>2.00 s<td>2.00 ×<td>0.50 s<td>4.00 ×<td>1.600<td class=lost>"));
  EXPECT_THAT(html, HasSubstr("class=found>12345"));
  EXPECT_THAT(html, HasSubstr("layer 2, head 1 · <b>100 %</b>"));
  EXPECT_THAT(html, HasSubstr("left:50.00%"));
}

TEST(ComparisonPage, EscapesTextFromOutside) {
  const std::string html = html_of(example_page());
  EXPECT_THAT(html, HasSubstr("notes &amp; &lt;drafts&gt;"));
  EXPECT_THAT(html, HasSubstr("&lt;b&gt;.."));
  EXPECT_THAT(html, HasSubstr("{&quot;left&quot;:3}"));
  EXPECT_THAT(html, Not(HasSubstr("<drafts>")));
}

TEST(ComparisonPage, NeedsNoNetwork) {
  const std::string html = html_of(example_page());
  EXPECT_THAT(html, HasSubstr("src=\"data:image/png;base64,"));
  for (const char* link : {"http:", "https:", "<script", "<link", "@import", "url("}) {
    EXPECT_THAT(html, Not(HasSubstr(link)));
  }
}

}  // namespace
}  // namespace tessera
