// Products with weights in ggml blocks, of every type and for every instruction set of this machine.
#include "kernels/block_product.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/cpu/bytes.h"
#include "kernels/emulated_bytes.h"

namespace tessera::testing {
namespace {

using kernels::BlockRows;
using kernels::ByteActivations;
using kernels::ByteKernels;
using kernels::kBlockChunk;

constexpr GgmlType kTypes[]{GgmlType::q8_0, GgmlType::q4_0, GgmlType::q4_1, GgmlType::q5_0, GgmlType::q5_1,
                            GgmlType::q2_k, GgmlType::q3_k, GgmlType::q4_k, GgmlType::q5_k, GgmlType::q6_k};

std::vector<std::pair<std::string, const ByteKernels*>> tested_tables() {
  std::vector<std::pair<std::string, const ByteKernels*>> tables;
  for (const Isa isa : supported_isas()) {
    tables.emplace_back(std::string(name_of(isa)), &kernels::byte_kernels_of(isa));
  }
#ifndef TESSERA_NO_EMULATED_LEVELS
  if (supported_isas().size() > 1) {  // the emulation is built for AVX2
    tables.emplace_back("avx512 emulated", &kernels::emulated_avx512_bytes());
    tables.emplace_back("avx512_bf16 emulated", &kernels::emulated_avx512_bf16_bytes());
  }
#endif
  return tables;
}

/// Random bits; scales are halves between 2^-8 and 2^-7 with a random sign.
std::vector<std::byte> random_blocks(GgmlType type, std::int64_t numbers, std::mt19937& random) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(bytes_of(type, numbers)));
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  std::vector<std::size_t> halves{0};
  if (type == GgmlType::q4_1 || type == GgmlType::q5_1 || type == GgmlType::q4_k || type == GgmlType::q5_k) {
    halves = {0, 2};
  }
  if (type == GgmlType::q2_k) halves = {80, 82};
  if (type == GgmlType::q3_k) halves = {108};
  if (type == GgmlType::q6_k) halves = {208};
  for (std::size_t block = 0; block < bytes.size(); block += static_cast<std::size_t>(block_of(type).bytes)) {
    for (const std::size_t at : halves) {
      bytes[block + at + 1] = static_cast<std::byte>(0x1C | (random() & 0x83));
    }
  }
  return bytes;
}

std::vector<float> random_floats(std::int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> numbers(static_cast<std::size_t>(count));
  for (float& number : numbers) number = normal(random);
  return numbers;
}

struct Quantised {
  std::vector<std::int8_t> bytes, paired, quartered;
  std::vector<float> scales, sums, sums_of_groups, group_weights;
  ByteActivations view;
};
Quantised quantised(const ByteKernels& table, const std::vector<float>& x, std::int64_t rows, std::int64_t inputs) {
  const std::int64_t padded = (inputs + kBlockChunk - 1) / kBlockChunk * kBlockChunk;
  Quantised q;
  q.bytes.resize(static_cast<std::size_t>(rows * padded));
  q.paired.resize(static_cast<std::size_t>(rows * padded));
  q.quartered.resize(static_cast<std::size_t>(rows * padded));
  q.scales.resize(static_cast<std::size_t>(rows * padded / 32));
  q.sums.resize(static_cast<std::size_t>(rows * padded / 16));
  q.sums_of_groups.resize(static_cast<std::size_t>(rows * padded / 32));
  q.group_weights.resize(static_cast<std::size_t>(rows * padded / 16));
  for (std::int64_t r = 0; r < rows; ++r) {
    table.quantise_activations(x.data() + r * inputs, inputs, q.bytes.data() + r * padded, q.paired.data() + r * padded,
                               q.quartered.data() + r * padded, q.scales.data() + r * padded / 32,
                               q.sums.data() + r * padded / 16, q.sums_of_groups.data() + r * padded / 32,
                               q.group_weights.data() + r * padded / 16);
  }
  q.view = {rows,
            padded,
            q.bytes.data(),
            q.paired.data(),
            q.quartered.data(),
            q.scales.data(),
            q.sums.data(),
            q.sums_of_groups.data(),
            q.group_weights.data()};
  return q;
}

TEST(BlockProduct, FollowsTheDefinition) {
  std::mt19937 random(11);
  for (const auto& [name, table] : tested_tables()) {
    for (const GgmlType type : kTypes) {
      const std::int64_t block = block_of(type).numbers;
      for (const std::int64_t blocks : {1, 3, 4, 8, 9, 24, 28, 33}) {
        SCOPED_TRACE(name + " " + name_of(type) + " " + std::to_string(blocks));
        const std::int64_t inputs = block * blocks;
        const std::int64_t outputs = 1 + blocks % 4;
        for (const std::int64_t rows : {std::int64_t{1}, 2 + blocks % 7}) {
          const auto bytes = random_blocks(type, outputs * inputs, random);
          const auto x = random_floats(rows * inputs, random);
          const Quantised q = quantised(*table, x, rows, inputs);
          std::vector<float> y(static_cast<std::size_t>(rows * outputs), -1.0F);
          table->multiply_blocks({type, bytes.data(), bytes_of(type, inputs), outputs, inputs}, q.view, y.data(),
                                 outputs);
          std::vector<float> weights(static_cast<std::size_t>(outputs * inputs));
          dequantise(type, bytes.data(), outputs * inputs, weights.data());
          for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t o = 0; o < outputs; ++o) {
              double sum = 0;
              double size = 0;
              for (std::int64_t i = 0; i < inputs; ++i) {
                const double number =
                    static_cast<double>(q.scales[static_cast<std::size_t>((r * q.view.padded + i) / 32)]) *
                    q.bytes[static_cast<std::size_t>(r * q.view.padded + i)];
                // Rounding is that of code and zero apart, up to 256 times the weight itself.
                const double term = static_cast<double>(weights[static_cast<std::size_t>(o * inputs + i)]) * number;
                sum += term;
                size += std::abs(number);
              }
              EXPECT_NEAR(y[static_cast<std::size_t>(r * outputs + o)], sum, 2e-6 * size) << r << " " << o;
            }
          }
        }
      }
    }
  }
}

TEST(BlockProduct, ActivationsRoundToTheNearestByte) {
  std::mt19937 random(3);
  const auto x = random_floats(96, random);
  for (const auto& [name, table] : tested_tables()) {
    SCOPED_TRACE(name);
    std::vector<float> numbers = x;
    std::fill(numbers.begin() + 32, numbers.begin() + 64, 0.0F);
    const Quantised q = quantised(*table, numbers, 1, 96);
    for (std::size_t i = 0; i < 96; ++i) {
      EXPECT_LE(std::abs(static_cast<float>(q.bytes[i]) * q.scales[i / 32] - numbers[i]), 0.5001F * q.scales[i / 32]);
    }
    EXPECT_EQ(q.scales[1], 0.0F);
    EXPECT_EQ(q.sums[2], 0.0F);
    int sum = 0;
    for (std::size_t i = 16; i < 32; ++i) sum += q.bytes[i];
    EXPECT_FLOAT_EQ(q.sums[1], q.scales[0] * static_cast<float>(sum));
  }
}

TEST(BlockProduct, WidensAsTheReference) {
  std::mt19937 random(5);
  for (const auto& [name, table] : tested_tables()) {
    for (const GgmlType type : kTypes) {
      SCOPED_TRACE(name + " " + name_of(type));
      const std::int64_t numbers = 2304;
      const auto bytes = random_blocks(type, numbers, random);
      std::vector<float> expected(static_cast<std::size_t>(numbers));
      std::vector<float> found(static_cast<std::size_t>(numbers));
      dequantise(type, bytes.data(), numbers, expected.data());
      table->widen_blocks(type, bytes.data(), numbers, found.data());
      for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 2e-6F) << i;
    }
  }
}

TEST(BlockProduct, ThreadsChangeNothing) {
  std::mt19937 random(7);
  const std::int64_t inputs = 1280;
  const std::int64_t outputs = 1000;
  const auto bytes = random_blocks(GgmlType::q4_k, outputs * inputs, random);
  const auto x = random_floats(11 * inputs, random);
  const BlockRows weights{GgmlType::q4_k, bytes.data(), bytes_of(GgmlType::q4_k, inputs), outputs, inputs};
  std::vector<std::vector<float>> results;
  for (const int threads : {1, 2, 3, 7}) {
    results.emplace_back(static_cast<std::size_t>(11 * outputs));
    kernels::multiply_blocks(weights, x.data(), 11, results.back().data(), threads, default_isa());
    EXPECT_EQ(results.back(), results.front());
  }
  // A row gives the same alone, up to rounding.
  std::vector<float> alone(static_cast<std::size_t>(outputs));
  kernels::multiply_blocks(weights, x.data() + 9 * inputs, 1, alone.data(), 2, default_isa());
  for (std::size_t o = 0; o < alone.size(); ++o) {
    EXPECT_NEAR(alone[o], results[0][9 * alone.size() + o], 1e-4 * (1 + std::abs(alone[o])));
  }
}

TEST(BlockProduct, TogetherAsAlone) {
  std::mt19937 random(13);
  const std::int64_t inputs = 768;
  const std::int64_t rows = 10;
  const auto x = random_floats(rows * inputs, random);
  const std::vector<std::pair<GgmlType, std::int64_t>> matrices{
      {GgmlType::q4_k, 1500}, {GgmlType::q8_0, 1}, {GgmlType::q5_1, 70}, {GgmlType::q6_k, 333}};
  std::vector<std::vector<std::byte>> blocks;
  std::vector<std::vector<float>> together, alone;
  std::vector<kernels::BlockProduct> products;
  for (const auto& [type, outputs] : matrices) {
    blocks.push_back(random_blocks(type, outputs * inputs, random));
    together.emplace_back(static_cast<std::size_t>(rows * outputs), -1.0F);
    alone.emplace_back(static_cast<std::size_t>(rows * outputs), -2.0F);
    products.push_back({{type, blocks.back().data(), bytes_of(type, inputs), outputs, inputs}, nullptr});
  }
  for (std::size_t m = 0; m < matrices.size(); ++m) products[m].y = together[m].data();
  for (const std::int64_t count : {std::int64_t{1}, rows}) {
    for (std::size_t m = 0; m < matrices.size(); ++m) {
      kernels::multiply_blocks(products[m].weights, x.data(), count, alone[m].data(), 1, default_isa());
    }
    for (const int threads : {1, 2, 3, 40}) {
      kernels::multiply_blocks(products, x.data(), count, threads, default_isa());
      for (std::size_t m = 0; m < matrices.size(); ++m) {
        const auto written = static_cast<std::size_t>(count * matrices[m].second);
        EXPECT_TRUE(
            std::equal(alone[m].begin(), alone[m].begin() + static_cast<std::ptrdiff_t>(written), together[m].begin()))
            << m << ", " << count << " rows, " << threads << " threads";
      }
    }
  }
}

TEST(BlockProduct, NotANumberSpoilsItsRowOnly) {
  std::mt19937 random(9);
  const auto bytes = random_blocks(GgmlType::q8_0, 3 * 64, random);
  auto x = random_floats(2 * 64, random);
  x[5] = std::numeric_limits<float>::infinity();
  std::vector<float> y(6);
  kernels::multiply_blocks({GgmlType::q8_0, bytes.data(), 68, 3, 64}, x.data(), 2, y.data(), 1, default_isa());
  for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(std::isnan(y[i]), i < 3) << i;
}

}  // namespace
}  // namespace tessera::testing
