#include "eval/archetypes.h"

#include <algorithm>

#include "core/error.h"
#include "tessera/eval.h"

namespace tessera {
namespace eval {
namespace {

std::vector<Archetype> make_archetypes() {
  using enum PositionKernel;
  return {
      {.name = "sink-band", .sink = 12, .kernel = band, .position = 10, .sigma = 96},
      {.name = "power-law", .sink = 8, .kernel = power_law, .position = 16},
      {.name = "vertical", .sink = 10, .vertical = 11, .vertical_share = 0.004},
      {.name = "slash", .kernel = band, .position = 8, .sigma = 6, .slashes = {{777, 10}, {2500, 10}, {6001, 10}}},
      {.name = "vertical-slash",
       .vertical = 9,
       .vertical_share = 0.004,
       .kernel = band,
       .position = 8,
       .sigma = 24,
       .slashes = {{1500, 9}}},
      {.name = "blocks", .topic = 10},
      {.name = "blocks-scattered", .topic = 10, .scatter = 1},
      {.name = "retrieval", .retrieval = 16, .targets = 2, .anchor_share = 0.2, .coherence = 1},
      {.name = "retrieval-coherent", .retrieval = 16, .targets = 2, .anchor_share = 0.2, .coherence = 64},
      {.name = "mixed",
       .sink = 9,
       .vertical = 8,
       .vertical_share = 0.004,
       .kernel = band,
       .position = 8,
       .sigma = 96,
       .topic = 6,
       .retrieval = 12,
       .targets = 1,
       .anchor_share = 0.2,
       .coherence = 1,
       .active_share = 0.2},
      {.name = "diffuse"},
      {.name = "spatial", .kernel = grid, .position = 12, .grid_sigma = {0.6, 10, 10}, .text = 9},
      {.name = "temporal", .kernel = grid, .position = 12, .grid_sigma = {8, 1.5, 1.5}, .text = 9},
      {.name = "window-3d", .kernel = grid, .position = 12, .grid_sigma = {2, 3, 3}, .text = 9},
      // A grid without a pull towards near tokens: what counts is the topic, a smooth field over the grid.
      {.name = "semantic", .kernel = grid, .grid_sigma = {2, 3, 3}, .topic = 10, .text = 9},
  };
}

std::vector<Suite> make_suites() {
  return {
      {"heads-llm",
       {{"sink-band", 0.3},
        {"power-law", 0.2},
        {"vertical-slash", 0.2},
        {"blocks", 0.1},
        {"retrieval", 0.1},
        {"diffuse", 0.1}}},
      {"heads-retrieval", {{"retrieval", 0.5}, {"retrieval-coherent", 0.25}, {"sink-band", 0.25}}},
      {"heads-code", {{"slash", 0.5}, {"vertical-slash", 0.25}, {"sink-band", 0.25}}},
      {"heads-video", {{"temporal", 0.67}, {"spatial", 0.29}, {"window-3d", 0.02}, {"semantic", 0.02}}},
  };
}

const Archetype* find_archetype(std::string_view name) {
  const auto all = archetypes();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Archetype& a) { return a.name == name; });
  return found == all.end() ? nullptr : &*found;
}

const Archetype* part_at(const Suite& suite, double quantile) {
  for (const Suite::Part& part : suite.parts) {
    if (quantile < part.share) return find_archetype(part.archetype);
    quantile -= part.share;
  }
  return find_archetype(suite.parts.back().archetype);
}

}  // namespace

std::span<const Archetype> archetypes() {
  static const std::vector<Archetype> all = make_archetypes();
  return all;
}

std::span<const Suite> suites() {
  static const std::vector<Suite> all = make_suites();
  return all;
}

std::vector<const Archetype*> archetypes_of(std::string_view kind, std::int64_t heads) {
  if (const Archetype* one = find_archetype(kind)) return std::vector<const Archetype*>(heads, one);
  for (const Suite& suite : suites()) {
    if (suite.name != kind) continue;
    std::vector<const Archetype*> chosen;
    for (std::int64_t h = 0; h < heads; ++h) {
      chosen.push_back(part_at(suite, (static_cast<double>(h) + 0.5) / static_cast<double>(heads)));
    }
    return chosen;
  }
  const std::vector<std::string> known = head_kinds();
  std::string list;
  for (const std::string& name : known) list += (list.empty() ? "" : ", ") + name;
  fail("data kind '{}' is unknown; did you mean '{}'? known: {}", std::string(kind), nearest_name(kind, known), list);
}

}  // namespace eval

std::vector<std::string> head_kinds() {
  std::vector<std::string> names;
  for (const eval::Archetype& archetype : eval::archetypes()) names.push_back(archetype.name);
  for (const eval::Suite& suite : eval::suites()) names.push_back(suite.name);
  names.emplace_back("randn");
  return names;
}

}  // namespace tessera
