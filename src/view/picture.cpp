#include "view/picture.h"

#include <fmt/format.h>
#include <png.h>

#include <array>
#include <cmath>
#include <cstdint>

#include "core/error.h"
#include "view/packed_bytes.h"

namespace tessera {

namespace {

using Colour = std::array<double, 3>;

// Light to dark blue through one hue: readable with every kind of colour vision, and in print.
constexpr std::array<Colour, 4> kScale = {{{198, 219, 239}, {107, 174, 214}, {33, 113, 181}, {8, 48, 107}}};
constexpr Colour kSkipped = {240, 240, 240};

Colour colour_at(double shade) {
  const double place = shade * static_cast<double>(kScale.size() - 1);
  const auto lower = std::min(static_cast<std::size_t>(place), kScale.size() - 2);
  const double rest = place - static_cast<double>(lower);
  Colour colour{};
  for (std::size_t i = 0; i < 3; ++i) colour[i] = kScale[lower][i] + rest * (kScale[lower + 1][i] - kScale[lower][i]);
  return colour;
}

// Palette: 0 outside the hard mask, 1 skipped, 2 to 255 shares.
constexpr int kFirstShare = 2;
constexpr int kColours = 256;

std::uint8_t palette_index(double share) {
  if (share < 0) return 0;
  if (share == 0) return 1;
  return static_cast<std::uint8_t>(kFirstShare + std::lround(shade_of_share(share) * (kColours - 1 - kFirstShare)));
}

std::vector<std::uint8_t> palette() {
  std::vector<std::uint8_t> rgba{255, 255, 255, 0};
  const auto append = [&](const Colour& colour) {
    for (const double channel : colour) rgba.push_back(static_cast<std::uint8_t>(std::lround(channel)));
    rgba.push_back(255);
  };
  append(kSkipped);
  for (int i = kFirstShare; i < kColours; ++i) {
    append(colour_at(static_cast<double>(i - kFirstShare) / (kColours - 1 - kFirstShare)));
  }
  return rgba;
}

}  // namespace

double shade_of_share(double share) {
  return std::pow(share, 0.4);
}

std::string colour_of_share(double share) {
  const Colour colour = share > 0 ? colour_at(shade_of_share(share)) : kSkipped;
  return fmt::format("#{:02x}{:02x}{:02x}", std::lround(colour[0]), std::lround(colour[1]), std::lround(colour[2]));
}

std::vector<std::byte> png_of(const PlanMap& map) {
  std::vector<std::uint8_t> pixels;
  pixels.reserve(static_cast<std::size_t>(map.rows() * map.columns()));
  for (std::int64_t row = 0; row < map.rows(); ++row) {
    for (std::int64_t column = 0; column < map.columns(); ++column) {
      pixels.push_back(palette_index(map.share(row, column)));
    }
  }
  const std::vector<std::uint8_t> colour_map = palette();

  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(map.columns());
  image.height = static_cast<png_uint_32>(map.rows());
  image.format = PNG_FORMAT_RGBA_COLORMAP;
  image.colormap_entries = kColours;
  png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(image);
  std::vector<std::byte> bytes(size);
  if (png_image_write_to_memory(&image, bytes.data(), &size, 0, pixels.data(), 0, colour_map.data()) == 0) {
    fail("cannot write a picture of {} x {} pixels: {}", image.width, image.height, image.message);
  }
  bytes.resize(size);
  return bytes;
}

std::string data_uri(std::string_view type, std::span<const std::byte> bytes) {
  return fmt::format("data:{};base64,{}", type, base64(bytes));
}

}  // namespace tessera
