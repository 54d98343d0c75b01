// Plan files: what is saved is loaded; the format does not drift; a lying file is refused.
#include "plan/serialise.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "io/temporary_folder.h"
#include "plan/random_plans.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;

std::string content_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Hexadecimal text, 32 bytes a line.
std::string to_hex(const std::string& bytes) {
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    text += fmt::format("{:02x}", static_cast<unsigned char>(bytes[i]));
    if (i % 32 == 31 || i + 1 == bytes.size()) text += '\n';
  }
  return text;
}

/// Every feature once.
Plan golden_plan() {
  Problem problem;
  problem.batch = 2;
  problem.q_heads = 2;
  problem.kv_heads = 1;
  problem.q_len = 6;
  problem.kv_len = 20;
  problem.head_dim = 16;
  problem.value_dim = 8;
  problem.scale = 0.5F;
  problem.causal = true;
  problem.q_offset = 12;
  problem.cu_seqlens_q = {0, 4, 6};
  problem.cu_seqlens_k = {0, 16, 20};
  PlanBuilder builder(problem, 4, 8, 1, 2);
  const std::uint16_t pooled = builder.add_source({"pooled", 3, true});
  builder.set_query_order(0, {3, 1, 0, 2});
  builder.tiles(0, 1);
  builder.run(8, 8, EntryMask::band, builder.add_band({5, 0}));
  builder.gather(builder.add_tokens(std::vector<std::int32_t>{0, 2, 2}), 3, EntryMask::none, 0, pooled);
  builder.end_row();
  builder.run(0, 4, EntryMask::bitmask, builder.add_mask(std::vector<std::uint64_t>{0b1010, 0b0110}));
  builder.end_row();
  return std::move(builder).finish();
}

TEST(PlanFile, LoadsWhatWasSaved) {
  const testing::TemporaryFolder folder;
  testing::Random random(41);
  for (int i = 0; i < 60; ++i) {
    const Plan plan =
        testing::random_plan(random, testing::random_problem(random), {0, i % 2 == 0, i % 3 == 0, i % 4 == 0});
    SCOPED_TRACE(testing::describe(plan));
    save(plan, folder / "plan.safetensors");
    EXPECT_EQ(load_plan(folder / "plan.safetensors"), plan);
  }
}

TEST(PlanFile, KeepsTheGrid) {
  const testing::TemporaryFolder folder;
  Problem problem;
  problem.q_len = problem.kv_len = 27;
  problem.head_dim = problem.value_dim = 8;
  problem.grid = TokenGrid{{2, 3, 4}, 1, 2};
  const Plan plan = dense_plan(problem);
  save(plan, folder / "plan.safetensors");
  const Plan loaded = load_plan(folder / "plan.safetensors");
  EXPECT_EQ(loaded, plan);
  EXPECT_EQ(loaded.problem.grid, problem.grid);
  problem.grid.reset();
  EXPECT_FALSE(dense_plan(problem) == plan);
}

TEST(PlanFile, KeepsItsFormat) {
  const testing::TemporaryFolder folder;
  const Plan plan = golden_plan();
  save(plan, folder / "plan.safetensors");
  const std::string golden = content_of(std::filesystem::path(TESSERA_SOURCE_DIR) / "tests/plan/golden/plan_v1.hex");
  const std::string written = to_hex(content_of(folder / "plan.safetensors"));
  ASSERT_EQ(written, golden) << "plan files changed: raise the version and keep reading the old one";
  EXPECT_EQ(load_plan(folder / "plan.safetensors"), plan);
}

/// The golden plan's file with one text replaced by another of the same length.
std::string altered(const std::string& from, const std::string& to) {
  const testing::TemporaryFolder folder;
  save(golden_plan(), folder / "plan.safetensors");
  std::string bytes = content_of(folder / "plan.safetensors");
  const std::size_t at = bytes.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  EXPECT_EQ(from.size(), to.size());
  return bytes.replace(at, from.size(), to);
}

std::string message_of(const std::string& bytes) {
  try {
    read_plan(SafetensorsFile::parse(std::as_bytes(std::span(bytes)), "plan.safetensors"));
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(PlanFile, RefusesWhatIsNotAPlan) {
  EXPECT_THAT(message_of(altered("tessera-plan", "another-plan")), HasSubstr("not a plan file"));
  EXPECT_THAT(message_of(altered(R"("version":"1")", R"("version":"2")")), HasSubstr("version '2'"));
  EXPECT_THAT(message_of(altered(R"("entry_kind")", R"("entry_kinb")")), HasSubstr("no tensor 'entry_kind'"));
  EXPECT_THAT(message_of(altered(R"(\"tile_q\":4)", R"(\"tile_q\":0)")), HasSubstr("tile_q is 0"));
  EXPECT_THAT(message_of(altered(R"(\"tile_q\":4)", R"(\"tile_q\":x)")), HasSubstr("not valid JSON"));
  EXPECT_THAT(message_of(altered(R"(\"tile_q\":4)", R"(\"tile_p\":4)")), HasSubstr("'tile_q' is missing"));
  EXPECT_THAT(message_of(altered(R"(\"kv_len\":20)", R"(\"kv_len\":-9)")), HasSubstr("kv_len is -9"));
  EXPECT_THAT(message_of(altered(R"(\"causal\":true)", R"(\"causal\":1234)")), HasSubstr("true or false"));
  EXPECT_THAT(message_of(altered(R"([0,4,6])", R"([0,7,6])")), HasSubstr("cu_seqlens_q decreases"));
}

TEST(PlanFile, NeverCrashesOnAChangedByte) {
  const testing::TemporaryFolder folder;
  save(golden_plan(), folder / "plan.safetensors");
  const std::string good = content_of(folder / "plan.safetensors");
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const int flip : {0x01, 0x80, 0xFF}) {
      std::string bytes = good;
      bytes[i] = static_cast<char>(bytes[i] ^ flip);
      message_of(bytes);  // an Error or a valid plan; anything else ends the test
    }
    EXPECT_NE(message_of(good.substr(0, i)), "accepted");
  }
}

}  // namespace
}  // namespace tessera
