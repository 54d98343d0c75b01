// The grid of the tokens: reading it, and what a problem with one may look like.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tessera/core.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;

std::string message_of(const Problem& problem) {
  try {
    problem.validate();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

Problem video(TokenGrid grid) {
  Problem problem;
  problem.q_len = problem.kv_len = 30;
  problem.head_dim = problem.value_dim = 8;
  problem.grid = grid;
  return problem;
}

TEST(TokenGrid, IsReadFromText) {
  EXPECT_EQ(grid_from_text("7").extent, (std::array<std::int64_t, 3>{1, 1, 7}));
  EXPECT_EQ(grid_from_text("5x7").extent, (std::array<std::int64_t, 3>{1, 5, 7}));
  EXPECT_EQ(grid_from_text("3x5x7").extent, (std::array<std::int64_t, 3>{3, 5, 7}));
  for (const char* text : {"", "x", "3x", "x3", "3x5x7x9", "0x4", "-3", "3X4", "3 x4", "3.5", "99999999999999999999"}) {
    EXPECT_THROW(grid_from_text(text), Error) << text;
  }
}

TEST(TokenGrid, CountsItsTokens) {
  const TokenGrid grid{{2, 3, 4}, 5, 1};
  EXPECT_EQ(grid.cells(), 24);
  EXPECT_EQ(grid.tokens(), 30);
}

TEST(TokenGrid, MustHoldEveryKey) {
  EXPECT_EQ(message_of(video({{2, 3, 4}, 5, 1})), "accepted");
  EXPECT_EQ(message_of(video({{1, 1, 30}, 0, 0})), "accepted");
  EXPECT_THAT(message_of(video({{2, 3, 4}, 5, 2})), HasSubstr("grid is 2x3x4 with 5 + 2 text tokens"));
  EXPECT_THAT(message_of(video({{2, 3, 4}, 0, 0})), HasSubstr("30 keys"));
  EXPECT_THAT(message_of(video({{2, 3, 0}, 5, 1})), HasSubstr("grid columns is 0"));
  EXPECT_THAT(message_of(video({{2, 3, 4}, -1, 7})), HasSubstr("grid prefix is -1"));
  // The product of these extents is 0 modulo 2^64.
  constexpr std::int64_t large = std::int64_t{1} << 30;
  EXPECT_THAT(message_of(video({{large, large, large}, 15, 15})), HasSubstr("do not fit"));
}

TEST(TokenGrid, MustHoldEveryQuery) {
  Problem problem = video({{2, 3, 4}, 5, 1});
  problem.q_len = 7;
  EXPECT_EQ(message_of(problem), "accepted");
  problem.q_offset = 24;
  EXPECT_THAT(message_of(problem), HasSubstr("queries 24 to 30"));
  problem.q_offset = -1;
  EXPECT_THAT(message_of(problem), HasSubstr("queries -1 to 5"));
}

TEST(TokenGrid, FitsEverySequenceOfABatch) {
  Problem problem = video({{2, 3, 5}, 0, 0});
  problem.batch = 2;
  EXPECT_EQ(message_of(problem), "accepted");
  problem.q_len = problem.kv_len = 60;
  problem.cu_seqlens_q = problem.cu_seqlens_k = {0, 30, 60};
  EXPECT_EQ(message_of(problem), "accepted");
  problem.cu_seqlens_q = problem.cu_seqlens_k = {0, 29, 60};
  EXPECT_THAT(message_of(problem), HasSubstr("29 keys of sequence 0"));
}

TEST(TokenGrid, OfAPlainSequenceIsOneRow) {
  Problem problem = video({});
  problem.grid.reset();
  EXPECT_EQ(problem.grid_of(0), (TokenGrid{{1, 1, 30}, 0, 0}));
}

}  // namespace
}  // namespace tessera
