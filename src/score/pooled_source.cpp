#include "score/pooled_source.h"

#include <cmath>

#include "core/parallel.h"

namespace tessera::score {

namespace {

/// Mean of `count` rows, in `dtype`.
void store_mean(std::span<const float> rows, std::int64_t count, std::int64_t dim, DType dtype, std::byte* out) {
  for (std::int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (std::int64_t r = 0; r < count; ++r) sum += rows[r * dim + d];
    store_from_float(out, dtype, d, static_cast<float>(sum / static_cast<double>(count)));
  }
}

}  // namespace

std::int64_t PooledSource::entries(const Problem& problem, std::int64_t members) {
  std::int64_t most = 0;
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    most = std::max(most, (problem.kv_len_of(s) + members - 1) / members);
  }
  return most;
}

PooledSource::PooledSource(const Problem& problem, const AttentionInputs& inputs,
                           std::span<const OrderedTiles> sequences, std::int64_t members, int threads)
    : k_shape_{problem.batch, problem.kv_heads, entries(problem, members), problem.head_dim},
      v_shape_{problem.batch, problem.kv_heads, entries(problem, members), problem.value_dim},
      dtype_(inputs.k.dtype) {
  const std::int64_t per_head = k_shape_[2];
  const std::int64_t rows = problem.batch * problem.kv_heads * per_head;
  const auto element = static_cast<std::int64_t>(size_of(dtype_));
  k_.resize(static_cast<std::size_t>(rows * problem.head_dim * element));
  v_.resize(static_cast<std::size_t>(rows * problem.value_dim * element));
  log_weight_.resize(static_cast<std::size_t>(rows));
  constexpr std::int64_t entries_at_once = 64;
  const std::int64_t chunks = (per_head + entries_at_once - 1) / entries_at_once;
  parallel_for(problem.batch * problem.kv_heads * chunks, threads, [&](std::int64_t i, int) {
    const std::int64_t pair = i / chunks;
    const OrderedTiles& tokens = sequences[pair / problem.kv_heads];
    std::vector<float> buffer(static_cast<std::size_t>(members * std::max(problem.head_dim, problem.value_dim)));
    for (std::int64_t e = i % chunks * entries_at_once; e < std::min((i % chunks + 1) * entries_at_once, per_head);
         ++e) {
      const std::int64_t count = std::min(members, tokens.keys() - e * members);
      if (count <= 0) return;
      const std::int64_t row = pair * per_head + e;
      tokens.load_keys(problem, inputs, pair % problem.kv_heads, e * members, count, buffer.data());
      store_mean(buffer, count, problem.head_dim, dtype_, k_.data() + row * problem.head_dim * element);
      tokens.load_values(problem, inputs, pair % problem.kv_heads, e * members, count, buffer.data());
      store_mean(buffer, count, problem.value_dim, dtype_, v_.data() + row * problem.value_dim * element);
      log_weight_[row] = std::log(static_cast<float>(count));
    }
  });
}

void spread_gradients(const Problem& problem, std::span<const OrderedTiles> sequences, std::int64_t members,
                      const TensorView& d_pooled, const MutableTensorView& d_rows, int threads) {
  parallel_for(problem.batch * problem.kv_heads, threads, [&](std::int64_t pair, int) {
    const std::int64_t s = pair / problem.kv_heads;
    const std::int64_t head = pair % problem.kv_heads;
    const std::vector<std::int32_t>& order = sequences[s].key_order();
    const auto keys = static_cast<std::int64_t>(order.size());
    for (std::int64_t place = 0; place < keys; ++place) {
      const std::int64_t entry = place / members;
      const auto share = 1.0F / static_cast<float>(std::min(members, keys - entry * members));
      const auto* from = reinterpret_cast<const float*>(d_pooled.row(s, head, entry));
      auto* to =
          reinterpret_cast<float*>(d_rows.row(problem.tensor_batch_of(s), head, problem.kv_begin_of(s) + order[place]));
      for (std::int64_t d = 0; d < d_rows.shape[3]; ++d) to[d] += share * from[d];
    }
  });
}

KeySource PooledSource::view() const {
  return {view_of(k_.data(), dtype_, k_shape_), view_of(v_.data(), dtype_, v_shape_), log_weight_};
}

}  // namespace tessera::score
