#include <algorithm>
#include <cmath>
#include <memory>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "eval/archetypes.h"
#include "eval/head_features.h"
#include "eval/matrix.h"
#include "eval/sparsity_dial.h"
#include "tessera/eval.h"

namespace tessera {
namespace {

using eval::Archetype;
using eval::FeatureHead;
using eval::HeadSetting;
using eval::Random;

constexpr std::int64_t kBlockRows = 256;   // rows made at a time
constexpr std::int64_t kDialRows = 64;     // rows the sparsity dial looks at
constexpr std::int64_t kDialStream = 100;  // apart from the streams of FeatureHead
constexpr std::int64_t kMaxElements = std::int64_t{1} << 40;

void check(const HeadOptions& options) {
  const auto positive = [](std::int64_t value, const char* name) {
    require(value > 0 && value <= kMaxElements, "{} is {}; expected a positive number", name, value);
  };
  positive(options.batch, "batch");
  positive(options.tokens, "tokens");
  positive(options.q_heads, "q_heads");
  positive(options.kv_heads, "kv_heads");
  require(options.q_heads % options.kv_heads == 0, "q_heads is {}; expected a multiple of kv_heads {}", options.q_heads,
          options.kv_heads);
  require(options.head_dim >= 16 && options.head_dim <= 1024, "head_dim is {}; expected 16 to 1024", options.head_dim);
  require(options.value_dim >= 0 && options.value_dim <= 1024, "value_dim is {}; expected 0 (as head_dim) to 1024",
          options.value_dim);
  require(options.q_tokens >= 0 && options.q_tokens <= options.tokens, "q_tokens is {}; expected 0 to tokens {}",
          options.q_tokens, options.tokens);
  require(is_attention_dtype(options.dtype), "dtype is {}; expected f32, bf16 or f16", name_of(options.dtype));
  require(!options.scatter || (*options.scatter >= 0 && *options.scatter <= 1), "scatter is {}; expected 0 to 1",
          options.scatter.value_or(0));
  require(!options.coherence || *options.coherence >= 1, "coherence is {}; expected at least 1",
          options.coherence.value_or(0));
  require(!options.density || (*options.density > 0 && *options.density < 1),
          "density is {}; expected above 0, below 1", options.density.value_or(0));
  require(options.group_correlation >= 0 && options.group_correlation <= 1, "group_correlation is {}; expected 0 to 1",
          options.group_correlation);
  const double elements = static_cast<double>(options.batch) * static_cast<double>(options.tokens) *
                          static_cast<double>(options.q_heads) * static_cast<double>(options.head_dim);
  require(elements <= static_cast<double>(kMaxElements),
          "batch * q_heads * tokens * head_dim is {:.3g}; expected at most "
          "2^40",
          elements);
}

/// Frames, height and width that cover most of the tokens; the rest is text.
std::array<std::int64_t, 3> grid_of(const HeadOptions& options) {
  if (options.grid) {
    const auto [frames, height, width] = *options.grid;
    const bool sized = frames > 0 && height > 0 && width > 0 && frames <= options.tokens && height <= options.tokens &&
                       width <= options.tokens && frames * height <= options.tokens &&
                       frames * height * width <= options.tokens;
    require(sized, "grid is {}x{}x{}; expected positive sizes that fit {} tokens", frames, height, width,
            options.tokens);
    return *options.grid;
  }
  std::int64_t side = 1;
  while (4 * side * side * 16 <= options.tokens) side *= 2;
  return {options.tokens / (side * side), side, side};
}

/// Makes tensors block by block; everything it calls is a pure function of options and position.
class Generator {
 public:
  Generator(const HeadOptions& options, HeadData& data) : options_(options), data_(data) {}

  void make_features(const std::vector<const Archetype*>& kinds);
  void make_randn();

 private:
  std::int64_t group() const { return options_.q_heads / options_.kv_heads; }
  const FeatureHead& head_of(std::int64_t q_index) const { return *heads_[q_index / group()]; }
  std::int64_t first_query() const { return data_.problem.kv_len - data_.problem.q_len; }
  double dial(std::int64_t q_index) const;

  /// body(head, first row, rows, buffer) makes rows of [heads, tokens, dim], in blocks over all threads.
  template <class Body>
  void fill(std::vector<std::byte>& bytes, std::int64_t heads, std::int64_t tokens, std::int64_t dim,
            const Body& body) {
    const auto element = static_cast<std::int64_t>(size_of(options_.dtype));
    bytes.resize(heads * tokens * dim * element);
    const std::int64_t blocks = (tokens + kBlockRows - 1) / kBlockRows;
    parallel_for(heads * blocks, options_.threads, [&](std::int64_t item, int) {
      const std::int64_t head = item / blocks;
      const std::int64_t first = item % blocks * kBlockRows;
      const std::int64_t count = std::min(kBlockRows, tokens - first);
      std::vector<float> buffer(count * dim, 0.0F);
      body(head, first, count, buffer);
      from_float(buffer.data(), count * dim, options_.dtype, bytes.data() + (head * tokens + first) * dim * element);
    });
  }

  const HeadOptions& options_;
  HeadData& data_;
  std::vector<std::unique_ptr<const FeatureHead>> heads_;
};

/// Bisects the temperature of one query head on the full logits of a few rows.
double Generator::dial(std::int64_t q_index) const {
  const std::int64_t keys = data_.problem.kv_len;
  const std::int64_t dim = options_.head_dim;
  const FeatureHead& head = head_of(q_index);
  const bool causal = data_.problem.causal;
  // Short causal rows are dense by nature; leave them out unless there are no others.
  const std::int64_t first = std::max(causal ? std::min(keys / 4, std::int64_t{256}) : 0, first_query());
  const std::int64_t sampled = std::min(kDialRows, keys - first);
  Random strata(options_.seed, {kDialStream, q_index});
  std::vector<std::int64_t> positions;
  std::vector<float> queries(sampled * dim);
  for (std::int64_t r = 0; r < sampled; ++r) {
    // One random row of each stratum: even steps would fall on the same columns of a grid.
    const double place = static_cast<double>(r) + strata.uniform();
    const double step = static_cast<double>(keys - first) / static_cast<double>(sampled);
    positions.push_back(std::min(keys - 1, first + static_cast<std::int64_t>(place * step)));
    head.queries(q_index % group(), positions.back(), 1, {queries.data() + r * dim, static_cast<std::size_t>(dim)});
  }
  std::vector<std::vector<float>> logits(sampled);
  std::vector<float> block(kBlockRows * dim);
  std::vector<float> columns(kBlockRows * dim);
  std::vector<float> products(sampled * kBlockRows);
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  for (std::int64_t start = 0; start < keys; start += kBlockRows) {
    const std::int64_t count = std::min(kBlockRows, keys - start);
    head.keys(start, count, block);
    for (std::int64_t j = 0; j < count; ++j) {
      for (std::int64_t c = 0; c < dim; ++c) columns[c * count + j] = block[j * dim + c] * scale;
    }
    eval::multiply_rows(queries.data(), sampled, dim, columns.data(), count, products.data(), count);
    for (std::int64_t r = 0; r < sampled; ++r) {
      const std::int64_t visible = causal ? std::clamp<std::int64_t>(positions[r] + 1 - start, 0, count) : count;
      logits[r].insert(logits[r].end(), products.data() + r * count, products.data() + r * count + visible);
    }
  }
  for (std::vector<float>& row : logits) std::sort(row.begin(), row.end(), std::greater<>());
  return eval::temperature_for_density(logits, *options_.density);
}

void Generator::make_features(const std::vector<const Archetype*>& kinds) {
  HeadSetting setting{.seed = options_.seed,
                      .tokens = data_.problem.kv_len,
                      .head_dim = options_.head_dim,
                      .value_dim = data_.problem.value_dim,
                      .causal = data_.problem.causal,
                      .rotate = options_.rotate,
                      .group_correlation = options_.group_correlation,
                      .grid = data_.grid};
  const std::int64_t kv_count = options_.batch * options_.kv_heads;
  const std::int64_t q_count = options_.batch * options_.q_heads;
  heads_.resize(kv_count);
  parallel_for(kv_count, options_.threads, [&](std::int64_t index, int) {
    Archetype archetype = *kinds[index % options_.kv_heads];
    archetype.scatter = options_.scatter.value_or(archetype.scatter);
    archetype.coherence = options_.coherence.value_or(archetype.coherence);
    heads_[index] = std::make_unique<const FeatureHead>(archetype, setting, index);
  });
  for (std::int64_t index = 0; index < kv_count; ++index) {
    data_.archetypes.push_back(kinds[index % options_.kv_heads]->name);
  }
  data_.temperatures.assign(q_count, 1);
  if (options_.density) {
    parallel_for(q_count, options_.threads, [&](std::int64_t index, int) { data_.temperatures[index] = dial(index); });
  }
  fill(data_.k_bytes, kv_count, options_.tokens, options_.head_dim,
       [&](std::int64_t head, std::int64_t first, std::int64_t count, std::span<float> out) {
         heads_[head]->keys(first, count, out);
       });
  fill(data_.v_bytes, kv_count, options_.tokens, data_.problem.value_dim,
       [&](std::int64_t head, std::int64_t first, std::int64_t count, std::span<float> out) {
         heads_[head]->values(first, count, out);
       });
  fill(data_.q_bytes, q_count, data_.problem.q_len, options_.head_dim,
       [&](std::int64_t head, std::int64_t first, std::int64_t count, std::span<float> out) {
         head_of(head).queries(head % group(), first_query() + first, count, out);
         const auto temperature = static_cast<float>(data_.temperatures[head]);
         for (float& value : out) value *= temperature;
       });
}

void Generator::make_randn() {
  const std::int64_t kv_count = options_.batch * options_.kv_heads;
  const std::int64_t q_count = options_.batch * options_.q_heads;
  data_.archetypes.assign(kv_count, "randn");
  data_.temperatures.assign(q_count, 1);
  const auto normal_rows = [&](int tensor, std::int64_t shift, std::int64_t dim) {
    return [this, tensor, shift, dim](std::int64_t head, std::int64_t first, std::int64_t count, std::span<float> out) {
      for (std::int64_t i = 0; i < count; ++i) {
        Random(options_.seed, {tensor, head, shift + first + i}).add_normal(out.subspan(i * dim, dim), 1);
      }
    };
  };
  const std::int64_t dim = options_.head_dim;
  const std::int64_t value_dim = data_.problem.value_dim;
  fill(data_.q_bytes, q_count, data_.problem.q_len, dim, normal_rows(0, first_query(), dim));
  fill(data_.k_bytes, kv_count, options_.tokens, dim, normal_rows(1, 0, dim));
  fill(data_.v_bytes, kv_count, options_.tokens, value_dim, normal_rows(2, 0, value_dim));
}

}  // namespace

TensorView HeadData::q() const {
  return view_of(q_bytes.data(), dtype, {problem.batch, problem.q_heads, problem.q_len, problem.head_dim});
}
TensorView HeadData::k() const {
  return view_of(k_bytes.data(), dtype, {problem.batch, problem.kv_heads, problem.kv_len, problem.head_dim});
}
TensorView HeadData::v() const {
  return view_of(v_bytes.data(), dtype, {problem.batch, problem.kv_heads, problem.kv_len, problem.value_dim});
}

HeadData make_heads(const HeadOptions& options) {
  check(options);
  const bool plain = options.kind == "randn";
  const std::vector<const Archetype*> kinds =
      plain ? std::vector<const Archetype*>() : eval::archetypes_of(options.kind, options.kv_heads);
  const bool video = !plain && kinds.front()->video();
  require(!options.density || !plain, "density is set for the kind 'randn'; expected another kind");
  HeadData data;
  data.dtype = options.dtype;
  data.problem = {.batch = options.batch,
                  .q_heads = options.q_heads,
                  .kv_heads = options.kv_heads,
                  .q_len = options.q_tokens == 0 ? options.tokens : options.q_tokens,
                  .kv_len = options.tokens,
                  .head_dim = options.head_dim,
                  .value_dim = options.value_dim == 0 ? options.head_dim : options.value_dim,
                  .scale = {},
                  .causal = options.causal.value_or(!video),
                  .q_offset = {},
                  .cu_seqlens_q = {},
                  .cu_seqlens_k = {},
                  .grid = {}};
  require(!options.grid || video, "grid is set for the kind '{}'; expected a video kind", options.kind);
  if (video) {
    data.grid = grid_of(options);
    data.text_tokens = options.tokens - data.grid[0] * data.grid[1] * data.grid[2];
    data.problem.grid = TokenGrid{.extent = data.grid, .prefix = 0, .suffix = data.text_tokens};
  }
  Generator generator(options, data);
  if (plain) {
    generator.make_randn();
  } else {
    generator.make_features(kinds);
  }
  return data;
}

}  // namespace tessera
