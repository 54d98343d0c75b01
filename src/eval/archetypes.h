// Head archetypes: which features a head's logits are the sum of, and how strong they are.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tessera::eval {

/// How logits depend on the distance of query and key.
enum class PositionKernel : std::uint8_t {
  none,
  band,       ///< near exp(-distance^2 / (2 sigma^2))
  power_law,  ///< exp(logit) falls as distance^(-amplitude / ln N)
  grid        ///< near a 3-D Gaussian of the distance in (frame, row, column)
};

struct Slash {
  std::int64_t distance = 0;  ///< at 16384 tokens; shorter sequences scale it down
  double amplitude = 0;
};

/// Amplitudes are what a feature adds to a logit. 0 turns a feature off.
struct Archetype {
  std::string name;
  double sink = 0;      ///< first four keys
  double vertical = 0;  ///< 0.8 to 1 times this on a random share of the columns
  double vertical_share = 0;
  PositionKernel kernel = PositionKernel::none;
  double position = 0;                 ///< at distance 0
  double sigma = 0;                    ///< tokens, of the band and of each slash
  std::array<double, 3> grid_sigma{};  ///< frames, rows, columns
  std::vector<Slash> slashes{};
  double topic = 0;            ///< key of the query's topic
  double scatter = 0;          ///< share of topic labels exchanged at random
  double retrieval = 0;        ///< target of the query
  std::int64_t targets = 0;    ///< runs of 8 anchor tokens that a query looks for
  double anchor_share = 0;     ///< of all tokens
  std::int64_t coherence = 1;  ///< neighbouring queries with the same targets
  double active_share = 1;     ///< queries that look for targets at all
  double text = 0;             ///< text keys beside a grid

  bool video() const { return kernel == PositionKernel::grid; }
};

/// All archetypes, in the order of docs/data.md.
std::span<const Archetype> archetypes();

/// A mixture of archetypes over the kv heads.
struct Suite {
  std::string name;
  struct Part {
    std::string archetype;
    double share;
  };
  std::vector<Part> parts;
};
std::span<const Suite> suites();

/// Archetype of each kv head: of the one named, or the parts of the suite in proportion (head h takes the part that
/// holds the quantile (h + 1/2) / heads). Throws Error with the nearest name.
std::vector<const Archetype*> archetypes_of(std::string_view kind, std::int64_t heads);

}  // namespace tessera::eval
