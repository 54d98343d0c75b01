// Largest products of scattered keys with a few queries, for every instruction set.
#include "score/gathered_scores.h"

#include <gtest/gtest.h>

#include <cmath>

#include "score/attention_case.h"
#include "score/row_access.h"

namespace tessera {
namespace {

TEST(GatheredScores, AreTheLargestProductsOfEveryKindOfRows) {
  for (const test::CaseShape& shape :
       {test::CaseShape{.name = "floats", .q_len = 64, .kv_len = 70, .head_dim = 33},
        test::CaseShape{.name = "bf16", .q_len = 64, .kv_len = 70, .head_dim = 64, .dtype = DType::bf16},
        test::CaseShape{.name = "odd", .q_len = 64, .kv_len = 70, .head_dim = 7, .dtype = DType::bf16},
        test::CaseShape{.name = "f16", .q_len = 64, .kv_len = 70, .head_dim = 16, .dtype = DType::f16},
        test::CaseShape{.name = "pages", .q_len = 64, .kv_len = 70, .dtype = DType::bf16, .page_size = 16},
        test::CaseShape{.name = "bnhd", .q_len = 64, .kv_len = 70, .layout = Layout::bnhd}}) {
    test::AttentionCase input(shape);
    for (std::int64_t d = 0; d < 3; ++d) input.set_k(0, 0, 11, d, std::nanf(""));
    const std::int64_t dim = input.problem.head_dim;
    for (const Isa isa : supported_isas()) {
      RunOptions options;
      options.isa = isa;
      const score::GatheredKeys keys(input.problem, input.inputs, 0, 0, 70, options);
      for (const std::int64_t rows : {1, 5, 16, 17, 64}) {
        std::vector<float> queries(static_cast<std::size_t>(rows * dim));
        score::load_queries(input.problem, input.inputs, 0, 1, 0, rows, queries.data());
        score::QueryPanels panels;
        panels.pack(queries.data(), rows, dim, keys.pairs());
        const std::vector<std::int32_t> listed{69, 3, 3, 0, 11, 40, 41, 42, 43, 44, 45};
        std::vector<float> scores(listed.size());
        keys.largest(panels, listed, scores.data());
        for (std::size_t i = 0; i < listed.size(); ++i) {
          double best = -1e300;
          for (std::int64_t r = 0; r < rows; ++r) {
            double dot = 0;
            for (std::int64_t d = 0; d < dim; ++d) {
              dot += static_cast<double>(input.q(0, 1, r, d)) * input.k(0, 0, listed[i], d);
            }
            best = std::max(best, dot);
          }
          if (listed[i] == 11) {
            EXPECT_TRUE(std::isnan(scores[i]));
          } else {
            EXPECT_NEAR(scores[i], best, 1e-4) << shape.name << " " << name_of(isa) << ", rows " << rows << ", " << i;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace tessera
