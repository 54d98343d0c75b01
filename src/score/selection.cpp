#include "score/selection.h"

#include <algorithm>

namespace tessera::score {

namespace {

void add_pages(PlanBuilder& builder, const std::vector<std::int32_t>& pages, std::int64_t page, std::int64_t keys) {
  for (std::size_t i = 0; i < pages.size();) {
    std::size_t end = i + 1;
    while (end < pages.size() && pages[end] == pages[end - 1] + 1) ++end;
    const std::int64_t first = pages[i] * page;
    builder.run(first, std::min(keys, (pages[end - 1] + 1) * page) - first);
    i = end;
  }
}

}  // namespace

Plan plan_of(const Problem& problem, const Selection& selection) {
  PlanBuilder builder(problem, problem.q_len, 128, selection.heads, problem.batch);
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    const std::vector<std::int32_t>& list = selection.lists[static_cast<std::size_t>(block)];
    if (selection.page == 1) {
      builder.gather(builder.add_tokens(list), static_cast<std::int64_t>(list.size()));
    } else {
      add_pages(builder, list, selection.page, problem.kv_len);
    }
    builder.end_row();
  }
  return std::move(builder).finish();
}

}  // namespace tessera::score
