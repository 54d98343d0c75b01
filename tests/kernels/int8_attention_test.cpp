// Rows as bytes, their products, and attention on 8-bit integers, for every instruction set of this machine.
#include "kernels/int8_attention.h"

#include <gtest/gtest.h>

#include "kernels/emulated_bytes.h"
#include "kernels/int8_reference.h"
#include "kernels/kernel_case.h"
#include "kernels/quantised_rows.h"

namespace tessera::testing {
namespace {

struct TestedTable {
  std::string name;
  const kernels::ByteKernels* kernels;
};
std::vector<TestedTable> tested_tables() {
  std::vector<TestedTable> tables;
  for (const Isa isa : supported_isas()) tables.push_back({std::string(name_of(isa)), &kernels::byte_kernels_of(isa)});
  if (supported_isas().size() == 1) return tables;  // the emulation is built for AVX2
#ifndef TESSERA_NO_EMULATED_LEVELS
  tables.push_back({"avx512 emulated", &kernels::emulated_avx512_bytes()});
  tables.push_back({"avx512_bf16 emulated", &kernels::emulated_avx512_bf16_bytes()});
#endif
  return tables;
}

TEST(ByteRows, RoundToLevelsHalvesAwayFromZero) {
  for (const TestedTable& tested : tested_tables()) {
    SCOPED_TRACE(tested.name);
    const kernels::ByteKernels& table = *tested.kernels;
    kernels::ByteRowBlock block(2, 5);
    const std::array<float, 10> numbers{-127.0F, 0.5F, -0.5F, 1.49F, -63.5F, 2.5F, 126.5F, 0.0F, -1.5F, 3.0F};
    for (std::int64_t i = 0; i < 10; ++i) block.row(i / 5)[i % 5] = numbers[i];
    EXPECT_EQ(block.quantise(table, 2, kernels::kLevels8, 0), 1.0F);
    for (std::int64_t i = 0; i < 10; ++i) {
      EXPECT_EQ(static_cast<std::int8_t>(block.bytes[i / 5 * block.stride + i % 5]), std::lround(numbers[i])) << i;
    }
    EXPECT_EQ(block.quantise(table, 2, kernels::kLevels8, kernels::kByteShift), 1.0F);
    for (std::int64_t i = 0; i < 10; ++i) {
      EXPECT_EQ(block.bytes[i / 5 * block.stride + i % 5], std::lround(numbers[i]) + 128) << i;
    }
    // Four bits: bytes from -7 to 7.
    const float scale = block.quantise(table, 2, kernels::kLevels4, 0);
    EXPECT_FLOAT_EQ(scale, 127.0F / 7);
    EXPECT_EQ(static_cast<std::int8_t>(block.bytes[0]), -7);
    EXPECT_EQ(static_cast<std::int8_t>(block.bytes[4]), -4);  // -3.5
    // Zeros, and a row with NaN, which leaves the others alone.
    kernels::ByteRowBlock zeros(2, 5);
    EXPECT_EQ(zeros.quantise(table, 1, kernels::kLevels8, 0), 1.0F);
    zeros.row(0)[2] = 254;
    zeros.row(1)[3] = std::numeric_limits<float>::infinity();
    EXPECT_EQ(zeros.quantise(table, 2, kernels::kLevels8, 0), 2.0F);
    EXPECT_EQ(zeros.spoilt[0], 0);
    EXPECT_EQ(zeros.spoilt[1], 1);
  }
}

TEST(ByteRows, ProductsAreExactForAllBytes) {
  Random random(5);
  std::uniform_int_distribution<int> byte(0, 255);
  for (const TestedTable& tested : tested_tables()) {
    SCOPED_TRACE(tested.name);
    const kernels::ByteKernels& table = *tested.kernels;
    for (const std::int64_t rows : {1, 2, 5, 6, 7, 13}) {
      for (const std::int64_t panels : {1, 2, 3, 4, 5, 9}) {
        for (const std::int64_t words : {1, 2, 17, 40}) {
          const std::int64_t stride = (words + 15) / 16 * 64;
          std::vector<std::uint8_t> a(static_cast<std::size_t>(rows * stride));
          std::vector<std::uint8_t> b(static_cast<std::size_t>(panels * 16 * stride));
          const int extreme = chance(random, 30) ? 1 : 0;  // all products as large as they get
          for (std::uint8_t& x : a) x = static_cast<std::uint8_t>(extreme != 0 ? 255 : byte(random));
          for (std::uint8_t& x : b) x = static_cast<std::uint8_t>(extreme != 0 ? 0x80 : byte(random));
          std::vector<std::uint32_t> packed(static_cast<std::size_t>(panels * stride / 4 * 16));
          for (std::int64_t p = 0; p < panels; ++p) {
            const std::uint8_t* pointers[16];
            for (int i = 0; i < 16; ++i) pointers[i] = b.data() + (p * 16 + i) * stride;
            table.pack_rows(pointers, stride / 4, packed.data() + p * stride / 4 * 16);
          }
          std::vector<std::int32_t> products(static_cast<std::size_t>(rows * panels * 16));
          table.multiply(a.data(), stride, rows, packed.data(), stride / 4 * 16, panels, words, products.data(),
                         panels * 16);
          for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t c = 0; c < panels * 16; ++c) {
              std::int64_t expected = 0;
              for (std::int64_t d = 0; d < words * 4; ++d) {
                expected += std::int64_t{a[r * stride + d]} * static_cast<std::int8_t>(b[c * stride + d]);
              }
              ASSERT_EQ(products[r * panels * 16 + c], expected) << rows << " x " << panels;
            }
          }
        }
      }
    }
  }
}

TEST(ByteRows, TilesHoldScalesAndSums) {
  Random random(2);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(37 * 10);
  for (float& x : numbers) x = normal(random);
  const kernels::ByteKernels& table = kernels::byte_kernels_of(default_isa());
  const kernels::QuantisedRows rows = kernels::quantise_rows(
      table, 37, 10, 12, kernels::kLevels8, 2,
      [&](std::int64_t place, float* row) { std::copy_n(numbers.data() + place * 10, 10, row); });
  ASSERT_EQ(rows.tiles(), 4);
  EXPECT_EQ(rows.stride, 16);
  for (std::int64_t t = 0; t < 4; ++t) {
    float largest = 0;
    for (std::int64_t i = t * 120; i < std::min<std::int64_t>(370, (t + 1) * 120); ++i) {
      largest = std::max(largest, std::abs(numbers[i]));
    }
    EXPECT_FLOAT_EQ(rows.scales[t], largest / 127);
    for (std::int64_t r = 0; r < 16; ++r) {
      std::int64_t sum = 0;
      for (std::int64_t d = 0; d < 12; ++d) {
        const std::uint32_t word = rows.tile_panels(t)[d / 4 * 16 + r];
        const auto byte = static_cast<std::int8_t>(word >> d % 4 * 8 & 0xffU);
        sum += byte;
        const std::int64_t place = t * 12 + r;
        const bool present = r < 12 && place < 37 && d < 10;
        EXPECT_EQ(byte, present ? std::lround(numbers[place * 10 + d] / rows.scales[t]) : 0) << t << " " << r;
      }
      EXPECT_EQ(rows.shift_sums[t * 16 + r], 128 * sum);
    }
  }
}

/// Random whole tiles, in orders of their own per head where asked.
Plan random_tiles(Random& random, const Problem& problem, std::int64_t tile_q, std::int64_t tile_k, bool orders) {
  const bool own_rows = problem.variable_length() || chance(random, 50);
  PlanBuilder builder(problem, tile_q, tile_k, orders ? problem.q_heads : 1, own_rows || orders ? problem.batch : 1);
  for (std::int64_t block = 0; block < builder.blocks(); ++block) {
    const std::int64_t sequence = block / (orders ? problem.q_heads : 1);
    const std::int64_t keys = problem.kv_len_of(sequence);
    if (orders) {
      const auto shuffled = [&](std::int64_t n) {
        std::vector<std::int32_t> order(static_cast<std::size_t>(n));
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random);
        return order;
      };
      builder.set_key_order(block, shuffled(keys));
      std::vector<std::int32_t> queries = shuffled(problem.q_len_of(sequence));
      if (chance(random, 30)) queries.resize(queries.size() / 2 + 1);  // a subset
      builder.set_query_order(block, queries);
    }
    for (std::int64_t tile = 0; tile < builder.query_tiles(block); ++tile) {
      for (std::int64_t key_tile = 0; key_tile * tile_k < keys; ++key_tile) {
        if (chance(random, 40)) continue;
        if (chance(random, 50)) {
          builder.tiles(key_tile, 1);
        } else {
          builder.run(key_tile * tile_k, std::min(tile_k, keys - key_tile * tile_k));
        }
      }
      builder.end_row();
    }
  }
  return std::move(builder).finish();
}

struct Outputs {
  std::vector<float> o;
  std::vector<float> lse;
};
Outputs attend(const Plan& plan, const AttentionInputs& inputs, Isa isa, int threads = 2) {
  const Problem& p = plan.problem;
  const std::int64_t batch = p.variable_length() ? 1 : p.batch;
  Outputs out;
  out.o.assign(static_cast<std::size_t>(batch * p.q_heads * p.q_len * p.value_dim), 99.0F);
  out.lse.assign(static_cast<std::size_t>(batch * p.q_heads * p.q_len), 99.0F);
  RunOptions options;
  options.isa = isa;
  options.threads = threads;
  kernels::run_int8(plan, inputs,
                    {mutable_view_of(out.o.data(), DType::f32, {batch, p.q_heads, p.q_len, p.value_dim}), out.lse},
                    options);
  return out;
}

TEST(Int8Attention, MatchesTheReferenceOnEveryInstructionSet) {
  int seed = 0;
  for (const std::int64_t tile_k : {8, 16, 40, 64, 130}) {
    for (const std::int64_t tile_q : {1, 16, 70}) {
      Random random(static_cast<std::uint64_t>(++seed));
      Problem problem;
      problem.batch = 2;
      problem.q_heads = 4;
      problem.kv_heads = chance(random, 50) ? 2 : 4;
      problem.q_len = pick(random, std::array<std::int64_t, 4>{1, 17, 71, 150});
      problem.kv_len = pick(random, std::array<std::int64_t, 4>{1, 33, 129, 200});
      CaseOptions options;
      options.head_dim = pick(random, std::array<std::int64_t, 5>{1, 20, 64, 80, 128});
      options.value_dim = pick(random, std::array<std::int64_t, 4>{3, 16, 72, 128});
      options.dtype = pick(random, kAllDtypes);
      if (chance(random, 30)) {
        problem.cu_seqlens_q = {0, problem.q_len, problem.q_len + 5};
        problem.cu_seqlens_k = {0, problem.kv_len, problem.kv_len + 9};
        problem.q_len += 5;
        problem.kv_len += 9;
      }
      problem.head_dim = options.head_dim;
      problem.value_dim = options.value_dim;
      const Plan plan = random_tiles(random, problem, tile_q, tile_k, chance(random, 50));
      const KernelCase c(random, plan, options);
      const Int8Result expected = int8_reference(plan, c.inputs);
      for (const Isa isa : supported_isas()) {
        const Outputs actual = attend(plan, c.inputs, isa);
        const std::string what = fmt::format("{} tiles {} x {} dims {} {}", name_of(isa), tile_q, tile_k,
                                             options.head_dim, options.value_dim);
        for (std::size_t row = 0; row < expected.lse.size(); ++row) {
          if (std::isinf(expected.lse[row])) {
            ASSERT_EQ(actual.lse[row], expected.lse[row]) << what;
          } else {
            ASSERT_NEAR(actual.lse[row], expected.lse[row], 1e-4F * (1 + std::abs(expected.lse[row]))) << what;
          }
          for (std::size_t d = 0; d < static_cast<std::size_t>(problem.value_dim); ++d) {
            const std::size_t i = row * static_cast<std::size_t>(problem.value_dim) + d;
            // A probability next to a half may round to the other side: the two exponentials differ by 1e-6.
            ASSERT_NEAR(actual.o[i], expected.o[i], 2 * expected.level[row] + 1e-5) << what << " row " << row;
          }
        }
        const Outputs one = attend(plan, c.inputs, isa, 1);
        ASSERT_EQ(one.o, actual.o) << what;
        ASSERT_EQ(one.lse, actual.lse) << what;
      }
    }
  }
}

struct Small {
  Small() : random(3), c(random, dense_plan(problem(), 16, 16), options()) {}
  static Problem problem() {
    Problem p;
    p.q_heads = 2;
    p.q_len = 40;
    p.kv_len = 50;
    p.head_dim = 24;
    p.value_dim = 10;
    return p;
  }
  static CaseOptions options() {
    CaseOptions o;
    o.head_dim = 24;
    o.value_dim = 10;
    return o;
  }
  Random random;
  KernelCase c;
};

TEST(Int8Attention, AddingAVectorToAllKeysOnlyMovesTheLogSumExp) {
  Small small;
  const Outputs before = attend(small.c.plan, small.c.inputs, default_isa());
  const MutableTensorView& k = small.c.k.view;
  std::vector<double> added(24);
  for (std::size_t d = 0; d < 24; ++d) added[d] = 0.1 * static_cast<double>(d) - 1;
  for (std::int64_t j = 0; j < 50; ++j) {
    for (std::int64_t d = 0; d < 24; ++d) {
      store_from_float(k.row(0, 0, j), k.dtype, d,
                       load_as_float(k.row(0, 0, j), k.dtype, d) + static_cast<float>(added[d]));
    }
  }
  const Outputs after = attend(small.c.plan, small.c.inputs, default_isa());
  for (std::size_t i = 0; i < before.o.size(); ++i) ASSERT_NEAR(after.o[i], before.o[i], 2e-2);
  for (std::int64_t row = 0; row < 80; ++row) {
    double moved = 0;
    for (std::int64_t d = 0; d < 24; ++d) {
      moved += added[d] * load_as_float(small.c.q.view.row(0, row / 40, row % 40), DType::f32, d) / std::sqrt(24.0);
    }
    ASSERT_NEAR(after.lse[row], before.lse[row] + moved, 1e-2);
  }
}

TEST(Int8Attention, NanReachesOnlyTheRowsThatReadIt) {
  for (const Isa isa : supported_isas()) {
    Small small;
    // A query row.
    store_from_float(small.c.q.view.row(0, 1, 20), DType::f32, 3, std::numeric_limits<float>::quiet_NaN());
    Outputs out = attend(small.c.plan, small.c.inputs, isa);
    for (std::int64_t row = 0; row < 80; ++row) EXPECT_EQ(std::isnan(out.o[row * 10]), row == 60) << row;
    store_from_float(small.c.q.view.row(0, 1, 20), DType::f32, 3, 0.0F);
    // A value in the last tile, which the first query tile does not read.
    PlanBuilder builder(Small::problem(), 16, 16, 1, 1);
    for (std::int64_t tile = 0; tile < 3; ++tile) {
      builder.tiles(0, tile == 0 ? 3 : 4);
      builder.end_row();
    }
    const Plan plan = std::move(builder).finish();
    const Outputs clean = attend(plan, small.c.inputs, isa);
    store_from_float(small.c.v.view.row(0, 0, 49), DType::f32, 3, std::numeric_limits<float>::infinity());
    out = attend(plan, small.c.inputs, isa);
    for (std::int64_t row = 0; row < 80; ++row) {
      EXPECT_EQ(std::isnan(out.o[row * 10]), row % 40 >= 16) << row;
      if (row % 40 < 16) {
        EXPECT_NEAR(out.o[row * 10], clean.o[row * 10], 2e-2);
      }
    }
  }
}

TEST(Int8Attention, RefusesWhatItCannotDo) {
  Small small;
  const AttentionInputs& inputs = small.c.inputs;
  PlanBuilder part(Small::problem(), 64, 16, 1, 1);
  part.run(3, 20);
  part.end_row();
  EXPECT_THROW(attend(std::move(part).finish(), inputs, default_isa()), Error);
  PlanBuilder masked(Small::problem(), 64, 16, 1, 1);
  masked.tiles(0, 2, EntryMask::band, 0);
  masked.end_row();
  EXPECT_THROW(attend(std::move(masked).finish(), inputs, default_isa()), Error);
  AttentionInputs capped = inputs;
  capped.modifiers.softcap = 3;
  EXPECT_THROW(attend(small.c.plan, capped, default_isa()), Error);
  EXPECT_THROW(kernels::run_int8(small.c.plan, inputs, {}, {}), Error);
}

}  // namespace
}  // namespace tessera::testing
