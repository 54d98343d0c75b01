#include "kernels/cpu/packed_sources.h"

#include <algorithm>
#include <atomic>

#include "core/parallel.h"

namespace tessera::kernels {

namespace {

std::int64_t groups_of(std::int64_t keys) {
  return (keys + kGroupKeys - 1) / kGroupKeys;
}

std::size_t panel_words(const TileShape& shape, std::int64_t keys, PackedSources::Wish wish) {
  std::int64_t words = 0;
  if (wish.keys) words += shape.k_storage_panel;
  if (wish.values) words += shape.v_panel;
  return static_cast<std::size_t>(words * groups_of(keys));
}

}  // namespace

std::size_t PackedSources::bytes_of(const Call& call, const TileShape& shape, std::int64_t sequence, Wish wish) {
  return panel_words(shape, call.problem().kv_len_of(sequence), wish) * sizeof(std::uint32_t);
}

void PackedSources::describe(const Call& call, const Pair& pair, std::size_t index) {
  const Problem& problem = call.problem();
  PackedSource* source = sources_.data() + index * sources_per_pair_;
  source->k = key_rows_of(problem, call.inputs.k, call.inputs.pages, pair.sequence, pair.kv_head);
  source->v = key_rows_of(problem, call.inputs.v, call.inputs.pages, pair.sequence, pair.kv_head);
  source->keys = problem.kv_len_of(pair.sequence);
  for (const KeySource& derived : call.inputs.sources) {
    ++source;
    source->k = key_rows_of(derived.k, pair.sequence, pair.kv_head);
    source->v = key_rows_of(derived.v, pair.sequence, pair.kv_head);
    source->keys = derived.k.tokens();
    if (!derived.log_weight.empty()) {
      source->log_weight =
          derived.log_weight.data() + (pair.sequence * problem.kv_heads + pair.kv_head) * derived.k.tokens();
    }
  }
}

PackedSources::PackedSources(const Call& call, const TileShape& shape, const LevelKernels& level,
                             std::vector<Pair> pairs, Wish wish)
    : sources_(pairs.size() * (call.inputs.sources.size() + 1)), sources_per_pair_(call.inputs.sources.size() + 1) {
  constexpr std::int64_t chunk_groups = 64;
  struct Chunk {
    std::size_t source;
    std::int64_t first_group;
    bool raw;
  };
  for (std::size_t i = 0; i < pairs.size(); ++i) describe(call, pairs[i], i);
  if (!wish.keys && !wish.values && !wish.scan) return;
  std::vector<Chunk> chunks;
  std::size_t words = 0;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    words += panel_words(shape, sources_[i * sources_per_pair_].keys, wish);
    for (std::size_t s = i * sources_per_pair_; s < (i + 1) * sources_per_pair_; ++s) {
      for (std::int64_t g = 0; g < groups_of(sources_[s].keys); g += chunk_groups) {
        chunks.push_back({s, g, s % sources_per_pair_ == 0});
      }
    }
  }
  bytes_ = words * sizeof(std::uint32_t);
  panels_ = BorrowedBuffer(call.workspace, bytes_);
  nonfinite_.resize(sources_.size());

  // Hand out the panels, then fill them in parallel.
  std::vector<std::uint32_t*> k_panels(sources_.size(), nullptr);
  std::vector<std::uint32_t*> v_panels(sources_.size(), nullptr);
  auto* next = reinterpret_cast<std::uint32_t*>(panels_.data());
  for (std::size_t s = 0; s < sources_.size(); ++s) {
    if (wish.scan) nonfinite_[s].resize(static_cast<std::size_t>(sources_[s].keys));
    if (s % sources_per_pair_ != 0) continue;
    const std::int64_t groups = groups_of(sources_[s].keys);
    if (wish.keys) {
      k_panels[s] = next;
      next += groups * shape.k_storage_panel;
    }
    if (wish.values) {
      v_panels[s] = next;
      next += groups * shape.v_panel;
    }
  }
  std::vector<std::atomic<bool>> found(sources_.size());
  parallel_for(static_cast<std::int64_t>(chunks.size()), call.threads, [&](std::int64_t c, int) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(c)];
    const PackedSource& source = sources_[chunk.source];
    const std::int64_t last_group = std::min(chunk.first_group + chunk_groups, groups_of(source.keys));
    if (chunk.raw && (wish.keys || wish.values)) {
      level.pack(shape, source, chunk.first_group, last_group, k_panels[chunk.source], v_panels[chunk.source]);
    }
    if (wish.scan &&
        level.find_nonfinite(shape, source, chunk.first_group * kGroupKeys,
                             std::min(last_group * kGroupKeys, source.keys), nonfinite_[chunk.source].data())) {
      found[chunk.source] = true;
    }
  });
  for (std::size_t s = 0; s < sources_.size(); ++s) {
    sources_[s].k_panels = k_panels[s];
    sources_[s].v_panels = v_panels[s];
    if (found[s]) sources_[s].value_nonfinite = nonfinite_[s].data();
  }
}

}  // namespace tessera::kernels
