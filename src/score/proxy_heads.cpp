#include "score/proxy_heads.h"

#include <algorithm>
#include <map>

#include "core/parallel.h"
#include "score/row_access.h"

namespace tessera::score {

namespace {

constexpr std::int64_t kRowsAtOnce = 256;

/// Share of each head (query head or kv head) in the mean.
using Shares = std::map<std::int64_t, float>;

/// out[first..) of every sequence = sum of shares * rows; load(sequence, head, first, count, to).
template <class Load>
void average(std::int64_t rows, const Shares& shares, std::int64_t dim, int threads, float* out, const Load& load) {
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](std::int64_t chunk, int) {
    const std::int64_t first = chunk * kRowsAtOnce;
    const std::int64_t count = std::min(kRowsAtOnce, rows - first);
    std::vector<float> buffer(static_cast<std::size_t>(count * dim));
    float* to = out + first * dim;
    for (const auto& [head, share] : shares) {
      load(head, first, count, buffer.data());
      for (std::int64_t i = 0; i < count * dim; ++i) to[i] += share * buffer[static_cast<std::size_t>(i)];
    }
  });
}

}  // namespace

ProxyHeads::ProxyHeads(const Problem& problem, const AttentionInputs& inputs, std::int64_t proxies, int threads)
    : problem_(problem) {
  const std::int64_t dim = problem.head_dim;
  const std::int64_t heads = problem.q_heads / proxies;
  problem_.q_heads = problem_.kv_heads = proxies;
  problem_.scale = problem.softmax_scale();
  const std::int64_t tensor_batch = problem.variable_length() ? 1 : problem.batch;
  queries_.assign(static_cast<std::size_t>(tensor_batch * proxies * problem.q_len * dim), 0.0F);
  keys_.assign(static_cast<std::size_t>(tensor_batch * proxies * problem.kv_len * dim), 0.0F);
  for (std::int64_t proxy = 0; proxy < proxies; ++proxy) {
    Shares of_queries;
    Shares of_keys;
    for (std::int64_t h = proxy * heads; h < (proxy + 1) * heads; ++h) {
      of_queries[h] += 1.0F / static_cast<float>(heads);
      of_keys[h / problem.group()] += 1.0F / static_cast<float>(heads);
    }
    for (std::int64_t s = 0; s < problem.batch; ++s) {
      const std::int64_t block = problem.tensor_batch_of(s) * proxies + proxy;
      average(problem.q_len_of(s), of_queries, dim, threads,
              queries_.data() + (block * problem.q_len + problem.q_begin_of(s)) * dim,
              [&](std::int64_t head, std::int64_t first, std::int64_t count, float* to) {
                load_queries(problem, inputs, s, head, first, count, to);
              });
      average(problem.kv_len_of(s), of_keys, dim, threads,
              keys_.data() + (block * problem.kv_len + problem.kv_begin_of(s)) * dim,
              [&](std::int64_t head, std::int64_t first, std::int64_t count, float* to) {
                load_keys(problem, inputs, s, head, first, count, to);
              });
    }
  }
  inputs_.q = view_of(queries_.data(), DType::f32, {tensor_batch, proxies, problem.q_len, dim}, Layout::bhnd);
  inputs_.k = view_of(keys_.data(), DType::f32, {tensor_batch, proxies, problem.kv_len, dim}, Layout::bhnd);
}

}  // namespace tessera::score
