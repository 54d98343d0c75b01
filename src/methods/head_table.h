// A table with one entry per (layer, kv head): the one artefact of the searches of DuoAttention, RazorAttention and
// MoA, which say of each head whether it sees everything or how far back it sees.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "io/json.h"

namespace tessera {

/// What a search decided about one head.
struct HeadEntry {
  bool whole = true;           ///< class "full": sees every key; else "span"
  std::optional<double> gate;  ///< how much it is a retrieval head, in [0, 1], where the search says so
  std::int64_t sink = -1;      ///< first tokens that a span keeps, counted inside it; -1: not given
  double alpha = 0;            ///< a span is alpha + beta * N tokens of N
  double beta = 1;
};

/// [layer][kv head]; all layers have as many heads.
using HeadTable = std::vector<std::vector<HeadEntry>>;

/// Of {"heads": [[{"class": "span", "alpha": 384, "beta": 0, "sink": 128, "gate": 0.1}, {"class": "full"}], ...]}:
/// layers of heads. `class` may be missing (a span), `sink` and `gate` too. Throws Error beginning with `where` and
/// naming layer and head of anything else.
HeadTable head_table_of(const Json& document, std::string_view where);
/// The document of a table.
Json head_table_json(const HeadTable& table);

}  // namespace tessera
