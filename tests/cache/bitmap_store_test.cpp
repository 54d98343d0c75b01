// Bitmap-compressed rows: pruning, round trips, batches.
#include "cache/bitmap_store.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace tessera {
namespace {

using Orientation = BitmapStore::Orientation;

std::vector<float> random_rows(std::int64_t rows, std::int64_t dim, double share, std::uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<float> values(static_cast<std::size_t>(rows * dim));
  for (float& x : values) x = uniform(random) < share ? bf16_to_float(float_to_bf16(normal(random))) : 0.0F;
  return values;
}

TEST(BitmapStore, ReturnsWhatWasStored) {
  for (const auto orientation : {Orientation::keys, Orientation::values}) {
    for (const std::int64_t dim : {1, 7, 64, 65, 128}) {
      // All zero and all there too.
      for (const double share : {0.0, 0.02, 0.3, 1.0}) {
        for (const DType dtype : {DType::f32, DType::bf16}) {
          BitmapStore store(orientation, dim, dtype);
          const auto first = random_rows(256, dim, share);
          const auto second = random_rows(64, dim, share, 2);
          store.append(4, first.data());
          store.append(1, second.data());
          ASSERT_EQ(store.batches(), 2U);
          EXPECT_EQ(store.tokens(), 320);
          EXPECT_EQ(store.expand(0), first);
          EXPECT_EQ(store.expand(1), second);
        }
      }
    }
  }
}

TEST(BitmapStore, AppendingInPartsStoresTheSame) {
  const auto rows = random_rows(512, 40, 0.4);
  BitmapStore whole(Orientation::keys, 40, DType::f16);
  BitmapStore parts(Orientation::keys, 40, DType::f16);
  whole.append(8, rows.data());
  parts.append(4, rows.data());
  parts.append(4, rows.data() + 256 * 40);
  auto joined = parts.expand(0);
  const auto second = parts.expand(1);
  joined.insert(joined.end(), second.begin(), second.end());
  EXPECT_EQ(joined, whole.expand(0));
}

TEST(BitmapStore, TakesTheMemoryOfWhatIsLeft) {
  constexpr std::int64_t tokens = 256, dim = 128;
  BitmapStore store(Orientation::values, dim, DType::bf16);
  const auto rows = random_rows(tokens, dim, 0.3);
  store.append(tokens / 64, rows.data());
  // 8 bytes of bits and 4 of offset per 64 numbers, and 0.3 of them in 2 bytes, filled up to 8.
  EXPECT_LT(store.memory_bytes(), static_cast<std::size_t>(tokens * dim * 2) * 55 / 100);
  store.clear();
  EXPECT_EQ(store.memory_bytes(), 0U);
  EXPECT_EQ(store.tokens(), 0);
}

TEST(PruneByMagnitude, KeepsTheLargest) {
  std::vector<float> row{3, -1, 0.5F, -4, 2, -0.25F, 1.5F, 6, -5, 0.75F};
  prune_by_magnitude(row, 0.5);  // the 5th smallest magnitude is 1.5: it stays
  EXPECT_EQ(row, (std::vector<float>{3, 0, 0, -4, 2, 0, 1.5F, 6, -5, 0}));
  std::vector<float> all{3, -1, 0.5F};
  prune_by_magnitude(all, 0);
  EXPECT_EQ(all, (std::vector<float>{3, -1, 0.5F}));
  std::vector<float> ties{2, -2, 2, 1};
  prune_by_magnitude(ties, 0.75);
  EXPECT_EQ(ties, (std::vector<float>{2, -2, 2, 0}));
  std::vector<float> one{2, -3, 1};
  prune_by_magnitude(one, 1);
  EXPECT_EQ(one, (std::vector<float>{0, -3, 0}));
  std::vector<float> undefined{1, std::numeric_limits<float>::quiet_NaN(), 2, 3};
  prune_by_magnitude(undefined, 0.75);
  EXPECT_TRUE(std::isnan(undefined[1]));
}

}  // namespace
}  // namespace tessera
