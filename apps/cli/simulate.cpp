// `tessera simulate`: what windows on a grid (method gna) cost once they are cut into tiles, by arithmetic alone.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>

#include "command.h"
#include "core/error.h"
#include "methods/axis_values.h"
#include "score/neighborhood_simulator.h"

namespace tessera::cli {

namespace {

using OrderedJson = nlohmann::ordered_json;

/// Rows and columns of a kernel's tile, which shapes are chosen for.
constexpr std::int64_t kMostTileTokens = 128;
constexpr std::int64_t kLongestAxis = 1 << 16;
constexpr std::array<const char*, 3> kAxes{"frames", "rows", "columns"};

struct Options {
  std::string grid = "30x48x80";
  std::string window = "18x24x24";
  std::string stride = "16x8x8";
  std::string dilation = "1";
  std::string causal = "0";
  std::string tile_q = "0";
  std::string tile_k = "0";
  std::string tiling = "fixed";
  double attention_share = 0;
  bool strides = false;
  bool json = false;
};

std::string text_of(const score::Extent& extent) {
  return fmt::format("{}", fmt::join(extent, "x"));
}

score::Extent tile_of(std::string_view name, const std::string& text, const score::Extent& chosen) {
  if (text == "0") return chosen;
  const score::Extent shape = axis_values("simulate", name, text, 1, 1);
  std::int64_t tokens = 1;
  for (const std::int64_t size : shape) {
    require(size <= kMostTileTokens && tokens * size <= kMostTileTokens,
            "simulate: {} is '{}'; expected at most {} tokens", name, text, kMostTileTokens);
    tokens *= size;
  }
  return shape;
}

/// As method gna reads them.
score::Neighborhood axes_of(const Options& options) {
  const score::Extent extent = axis_values("simulate", "grid", options.grid, 1, 1);
  const score::Extent window = axis_values("simulate", "window", options.window, 0, 0);
  const score::Extent stride = axis_values("simulate", "stride", options.stride, 1, 1);
  const score::Extent dilation = axis_values("simulate", "dilation", options.dilation, 1, 1);
  const score::Extent causal = axis_values("simulate", "causal", options.causal, 0, 0);
  score::Neighborhood axes{};
  for (std::size_t a = 0; a < 3; ++a) {
    require(extent[a] <= kLongestAxis, "simulate: grid is '{}'; expected at most {} on an axis", options.grid,
            kLongestAxis);
    require(causal[a] <= 1, "simulate: causal is '{}'; expected 0 or 1 for each axis", options.causal);
    require(window[a] == 0 || stride[a] <= window[a], "simulate: stride is '{}'; expected at most the window '{}'",
            options.stride, options.window);
    const std::int64_t whole = window[a] == 0 ? extent[a] : std::min(window[a], extent[a]);
    axes[a] = {.length = extent[a],
               .window = whole,
               .stride = std::min(stride[a], whole),
               .dilation = dilation[a],
               .causal = causal[a] == 1};
  }
  return axes;
}

void run_simulate(const Options& options) {
  require(options.attention_share >= 0 && options.attention_share <= 1,
          "--attention-share is {}; expected a number from 0 to 1", options.attention_share);
  const score::Neighborhood axes = axes_of(options);
  const score::TileShapes chosen = score::choose_tiles(axes, kMostTileTokens, kMostTileTokens);
  const score::TileShapes tiles{tile_of("tile_q", options.tile_q, chosen.q),
                                tile_of("tile_k", options.tile_k, chosen.k)};
  const score::Tiling tiling = options.tiling == "dynamic" ? score::Tiling::dynamic : score::Tiling::fixed;
  const score::NeighborhoodCost cost = score::simulate(axes, tiles, tiling);
  OrderedJson document{{"tile_q", tiles.q},
                       {"tile_k", tiles.k},
                       {"tiling", options.tiling},
                       {"dense_tiles", cost.dense_tiles},
                       {"most_visited", cost.most_visited},
                       {"mean_visited", cost.mean_visited},
                       {"speedup", cost.speedup()},
                       {"mean_speedup", cost.mean_speedup()},
                       {"flop_speedup", cost.flop_speedup},
                       {"block_sparse", cost.block_sparse}};
  if (options.attention_share > 0) {
    document["end_to_end_speedup"] = score::end_to_end_speedup(options.attention_share, cost.speedup());
  }
  if (options.strides) {
    OrderedJson& list = document["strides"] = OrderedJson::array();
    for (std::size_t a = 0; a < 3; ++a) {
      OrderedJson axis = OrderedJson::array();
      for (const score::StrideOption& option : score::stride_options(axes[a], tiles.q[a], tiles.k[a], tiling)) {
        axis.push_back({{"stride", option.stride}, {"most_visited", option.most_visited}});
      }
      list.push_back(std::move(axis));
    }
  }
  if (options.json) {
    print_json(document);
    return;
  }
  fmt::print("query tiles {}, key tiles {}{}\n", text_of(tiles.q), text_of(tiles.k),
             cost.block_sparse ? "; no tile needs a mask" : "");
  fmt::print("key tiles visited of {}: {} by the worst query tile, {:.1f} on average\n", cost.dense_tiles,
             cost.most_visited, cost.mean_visited);
  fmt::print("speed-up of attention: {:.2f} by the worst tile, {:.2f} by the mean tile, {:.2f} by arithmetic alone\n",
             cost.speedup(), cost.mean_speedup(), cost.flop_speedup);
  if (options.attention_share > 0) {
    fmt::print("speed-up of the run: {:.2f}\n", document["end_to_end_speedup"].get<double>());
  }
  for (std::size_t a = 0; options.strides && a < 3; ++a) {
    fmt::print("strides over {} worth taking (key tiles of the worst query tile):", kAxes[a]);
    for (const OrderedJson& option : document["strides"][a]) {
      fmt::print(" {} ({})", option["stride"].get<std::int64_t>(), option["most_visited"].get<std::int64_t>());
    }
    fmt::print("\n");
  }
}

}  // namespace

void add_simulate(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, "simulate", "What windows on a grid of tokens (method gna) cost, by arithmetic",
                                  "tessera simulate --grid 30x48x80 --window 18x24x24 --stride 16x8x8 --strides");
  command->add_option("--grid", options->grid, "Frames x rows x columns of tokens")->capture_default_str();
  command->add_option("--window", options->window, "Keys that a query sees on each axis; 0: all")
      ->capture_default_str();
  command->add_option("--stride", options->stride, "Queries in a row that share a window, per axis")
      ->capture_default_str();
  command->add_option("--dilation", options->dilation, "Distance of the keys of a window, per axis")
      ->capture_default_str();
  command->add_option("--causal", options->causal, "1 where the window ends at the query, per axis")
      ->capture_default_str();
  command->add_option("--tile-q", options->tile_q, "Shape of the query tiles; 0: the cheapest")->capture_default_str();
  command->add_option("--tile-k", options->tile_k, "Shape of the key tiles; 0: the cheapest")->capture_default_str();
  command
      ->add_option("--tiling", options->tiling, "Where key tiles begin: at multiples of their size, or at the window")
      ->check(CLI::IsMember({"fixed", "dynamic"}))
      ->capture_default_str();
  command->add_option("--attention-share", options->attention_share,
                      "Attention's share of the run time, times that of the steps that use the pattern");
  command->add_flag("--strides", options->strides, "Strides of each axis with which fewer tiles are visited");
  add_json_option(*command, options->json);
  command->callback([options] { run_simulate(*options); });
}

}  // namespace tessera::cli
