#include "view/picture.h"

#include <gtest/gtest.h>
#include <png.h>

#include <array>

namespace tessera {
namespace {

std::string encode(std::string_view text) {
  return data_uri("text/plain", std::as_bytes(std::span(text.data(), text.size())));
}

TEST(Picture, DataUriIsBase64) {
  EXPECT_EQ(encode(""), "data:text/plain;base64,");
  EXPECT_EQ(encode("M"), "data:text/plain;base64,TQ==");
  EXPECT_EQ(encode("Ma"), "data:text/plain;base64,TWE=");
  EXPECT_EQ(encode("Man"), "data:text/plain;base64,TWFu");
  EXPECT_EQ(encode("\xff\xfe\xfd\xfc"), "data:text/plain;base64,//79/A==");
}

TEST(Picture, PixelsFollowTheShares) {
  Problem problem;
  problem.q_len = problem.kv_len = 4;
  problem.head_dim = problem.value_dim = 8;
  problem.causal = true;
  // Row 3 computes keys 0 and 3 only.
  std::array<std::uint8_t, 16> mask = {1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1};
  PlanMap map(4, 4, 2);
  map.add(plan_from_mask(problem, mask, 4, 4), 0, 0);
  const auto bytes = png_of(map);

  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  ASSERT_NE(png_image_begin_read_from_memory(&image, bytes.data(), bytes.size()), 0) << image.message;
  image.format = PNG_FORMAT_RGBA;
  ASSERT_EQ(image.width, 2U);
  ASSERT_EQ(image.height, 2U);
  std::array<std::uint8_t, 16> pixels{};
  ASSERT_NE(png_image_finish_read(&image, nullptr, pixels.data(), 0, nullptr), 0) << image.message;
  const auto hex = [&](std::size_t pixel) {
    std::array<char, 8> text{};
    std::snprintf(text.data(), text.size(), "#%02x%02x%02x", pixels[4 * pixel], pixels[4 * pixel + 1],
                  pixels[4 * pixel + 2]);
    return std::string(text.data());
  };
  EXPECT_EQ(hex(0), colour_of_share(1));
  EXPECT_EQ(pixels[4 * 1 + 3], 0) << "excluded by causality";
  EXPECT_EQ(pixels[4 * 2 + 3], 255);
  EXPECT_NE(hex(2), colour_of_share(1));
  EXPECT_NE(hex(2), colour_of_share(0));
}

TEST(Picture, ColoursDarkenWithTheShare) {
  const auto red = [](double share) { return std::stoi(colour_of_share(share).substr(1, 2), nullptr, 16); };
  EXPECT_GT(red(0), red(0.0001));
  EXPECT_GT(red(0.0001), red(0.1));
  EXPECT_GT(red(0.1), red(1));
}

}  // namespace
}  // namespace tessera
