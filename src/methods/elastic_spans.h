// Spans that grow with the input: the rules of MoA (Mixture of Sparse Attention, arXiv:2406.14909), their sizes at a
// length, and the file that holds one per (layer, kv head).
#pragma once

#include <cstdint>
#include <vector>

#include "methods/head_table.h"
#include "methods/parameters.h"

namespace tessera {

/// A head keeps alpha + beta * N tokens of N: the first `sink` ones and the latest, sinks inside the span.
struct ElasticSpan {
  double alpha = 0;
  double beta = 1;
  friend bool operator==(const ElasticSpan&, const ElasticSpan&) = default;
};

/// Granularity of spans: the authors' block, which is also their number of sinks.
inline constexpr std::int64_t kSpanBlock = 64;

/// Blocks of a causal row that a rule keeps at length N, sink block and diagonal included: 2 at least, and at most the
/// blocks there are.
std::int64_t span_blocks(const ElasticSpan& rule, std::int64_t length);
/// Tokens of the decode cache of a head for sequences up to this length: whole blocks, the first kSpanBlock of them
/// static, the rest a ring.
std::int64_t span_cache_tokens(const ElasticSpan& rule, std::int64_t length);

/// [layer][kv head]
using SpanTable = std::vector<std::vector<ElasticSpan>>;

/// The spans of a head table (methods/head_table.h); "full" stands for alpha 0 and beta 1. Throws Error naming layer
/// and head of anything else.
SpanTable read_span_table(const Configuration& configuration);
/// The table of these spans.
HeadTable head_table_of(const SpanTable& spans);

}  // namespace tessera
