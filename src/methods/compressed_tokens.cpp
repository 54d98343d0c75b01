#include "methods/compressed_tokens.h"

#include <algorithm>
#include <cmath>

#include "core/convert.h"
#include "core/error.h"
#include "core/parallel.h"
#include "kernels/key_rows.h"

namespace tessera {

using score::BlockCompression;
using score::CompressionKind;
using score::CompressionWeights;

namespace {

/// Rotary embedding of one row, halves paired as in Llama; sign -1 undoes it.
void rotate(float* row, std::int64_t dim, std::int64_t position, double theta, double sign) {
  const std::int64_t half = dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const double angle =
        static_cast<double>(position) * std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
    const auto cosine = static_cast<float>(std::cos(angle));
    const auto sine = static_cast<float>(sign * std::sin(angle));
    const float a = row[i];
    const float b = row[i + half];
    row[i] = a * cosine - b * sine;
    row[i + half] = b * cosine + a * sine;
  }
}

/// Tensors of the weights beside the places where a head's copy lies.
struct NamedWeights {
  std::string name;
  std::vector<float> CompressionWeights::*member;
};
std::vector<NamedWeights> names_of_weights(const std::string& of) {
  return {{"positions_" + of, &CompressionWeights::positions},
          {"pool_" + of, &CompressionWeights::pool},
          {"linear_" + of, &CompressionWeights::linear},
          {"hidden_" + of, &CompressionWeights::hidden},
          {"output_" + of, &CompressionWeights::output}};
}

CompressionWeights weights_of(const AttentionInputs& inputs, const std::string& of, std::int64_t kv_head) {
  CompressionWeights weights;
  for (const auto& [name, member] : names_of_weights(of)) {
    const TensorView* side = inputs.find_side(name);
    if (side == nullptr) continue;
    std::vector<float>& to = weights.*member;
    to.resize(static_cast<std::size_t>(side->tokens() * side->dim()));
    for (std::int64_t i = 0; i < side->tokens(); ++i) {
      to_float(side->row(0, kv_head, i), side->dtype, side->dim(), to.data() + i * side->dim());
    }
  }
  return weights;
}

/// Rows from `first` on that are compressed, as floats [rows][dim]. `of` is "k" or "v".
std::vector<float> rows_of(const Problem& problem, const AttentionInputs& inputs, const std::string& of,
                           std::int64_t sequence, std::int64_t kv_head, std::int64_t first) {
  const TensorView* side = inputs.find_side(of + "_compress");
  const TensorView& tensor = side != nullptr ? *side : of == "k" ? inputs.k : inputs.v;
  const PageTable no_pages;
  const kernels::KeyRows rows =
      kernels::key_rows_of(problem, tensor, side != nullptr ? no_pages : inputs.pages, sequence, kv_head);
  const std::int64_t dim = of == "k" ? problem.head_dim : problem.value_dim;
  const std::int64_t keys = problem.kv_len_of(sequence);
  std::vector<float> out(static_cast<std::size_t>((keys - first) * dim));
  for (std::int64_t n = first; n < keys; ++n) to_float(rows.row(n), rows.dtype, dim, out.data() + (n - first) * dim);
  return out;
}

}  // namespace

OwnedTensor::OwnedTensor(DType dtype, const std::array<std::int64_t, 4>& shape)
    : bytes(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]) * size_of(dtype)),
      view(mutable_view_of(bytes.data(), dtype, shape)) {}

BlockCompression TokenCompression::of_blocks(const AttentionInputs& inputs, const std::string& of,
                                             std::int64_t dim) const {
  BlockCompression compression;
  compression.kind = kind;
  compression.length = length;
  compression.stride = stride;
  compression.dim = dim;
  if (kind == CompressionKind::mlp) compression.hidden = inputs.find_side("hidden_" + of)->dim();
  return compression;
}

CompressedTokens TokenCompression::forward(const Problem& problem, const AttentionInputs& inputs,
                                           const PlanContext& context) const {
  CompressedTokens tokens;
  const BlockCompression keys = of_blocks(inputs, "k", problem.head_dim);
  const BlockCompression values = of_blocks(inputs, "v", problem.value_dim);
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    tokens.counts.push_back(keys.count(problem.kv_len_of(s)));
    tokens.most = std::max(tokens.most, tokens.counts.back());
  }
  tokens.k = OwnedTensor(inputs.k.dtype, {problem.batch, problem.kv_heads, tokens.most, problem.head_dim});
  tokens.v = OwnedTensor(inputs.v.dtype, {problem.batch, problem.kv_heads, tokens.most, problem.value_dim});
  auto* state = dynamic_cast<CompressedTokenState*>(context.state);
  require(context.state == nullptr || state != nullptr, "nsa: the state belongs to another method");
  CompressedTokenState::Layer fresh;
  CompressedTokenState::Layer& known = state != nullptr ? state->layers[context.layer] : fresh;
  known.k.resize(static_cast<std::size_t>(problem.batch * problem.kv_heads));
  known.v.resize(known.k.size());
  parallel_for(problem.batch * problem.kv_heads, context.run.threads, [&](std::int64_t i, int) {
    extend(problem, inputs, keys, "k", i, tokens, known.k[static_cast<std::size_t>(i)], tokens.k);
    extend(problem, inputs, values, "v", i, tokens, known.v[static_cast<std::size_t>(i)], tokens.v);
  });
  return tokens;
}

/// Completes the known tokens of one (sequence, kv head) and copies them to the tensor of all.
void TokenCompression::extend(const Problem& problem, const AttentionInputs& inputs,
                              const BlockCompression& compression, const std::string& of, std::int64_t pair,
                              const CompressedTokens& tokens, std::vector<float>& known, const OwnedTensor& to) const {
  const std::int64_t s = pair / problem.kv_heads;
  const std::int64_t h = pair % problem.kv_heads;
  const std::int64_t dim = compression.dim;
  const std::int64_t count = tokens.counts[static_cast<std::size_t>(s)];
  // Keys of this call are new, whatever an earlier one held in their places: that pass may have failed.
  const std::int64_t settled = compression.count(std::max<std::int64_t>(0, problem.kv_len_of(s) - problem.q_len_of(s)));
  const std::int64_t first = std::min(static_cast<std::int64_t>(known.size()) / dim, settled);
  known.resize(static_cast<std::size_t>(count * dim));
  if (first < count) {
    const std::vector<float> rows = rows_of(problem, inputs, of, s, h, first * stride);
    compression.forward(rows.data(), problem.kv_len_of(s) - first * stride, weights_of(inputs, of, h),
                        known.data() + first * dim);
  }
  const bool turn = of == "k" && inputs.find_side("k_compress") != nullptr;
  for (std::int64_t t = 0; t < count; ++t) {
    float* row = known.data() + t * dim;
    if (turn && t >= first) rotate(row, dim, t * stride, rope_theta, 1);
    from_float(row, dim, to.view.dtype, to.view.row(s, h, t));
  }
}

void TokenCompression::backward(const Problem& problem, const AttentionInputs& inputs, const Gradients& gradients,
                                const CompressedTokens& tokens, const MutableTensorView& d_tokens,
                                const std::string& of, std::int64_t kv_head, const MutableTensorView& d_rows) const {
  const std::int64_t dim = of == "k" ? problem.head_dim : problem.value_dim;
  const BlockCompression compression = of_blocks(inputs, of, dim);
  const bool turn = of == "k" && inputs.find_side("k_compress") != nullptr;
  const CompressionWeights weights = weights_of(inputs, of, kv_head);
  CompressionWeights d_weights = weights;
  for (const auto& [name, member] : names_of_weights(of))
    std::fill((d_weights.*member).begin(), (d_weights.*member).end(), 0.0F);
  for (std::int64_t s = 0; s < problem.batch; ++s) {
    const std::int64_t keys = problem.kv_len_of(s);
    if (keys == 0) continue;
    auto* own = reinterpret_cast<float*>(d_rows.row(problem.tensor_batch_of(s), kv_head, problem.kv_begin_of(s)));
    std::fill_n(own, keys * dim, 0.0F);
    const std::int64_t count = tokens.counts[static_cast<std::size_t>(s)];
    if (count == 0) continue;
    auto* d_out = reinterpret_cast<float*>(d_tokens.row(s, kv_head, 0));
    for (std::int64_t t = 0; turn && t < count; ++t) {
      rotate(d_out + t * dim, dim, t * stride, rope_theta, -1);
    }
    // The derivative of a mean reads no rows.
    const std::vector<float> rows =
        kind == CompressionKind::mean ? std::vector<float>() : rows_of(problem, inputs, of, s, kv_head, 0);
    compression.backward(rows.data(), keys, weights, d_out, own, d_weights);
  }
  for (const auto& [name, member] : names_of_weights(of)) {
    const MutableTensorView* to = gradients.find_side(name);
    if (to == nullptr || to->data == nullptr) continue;
    for (std::int64_t i = 0; i < to->shape[2]; ++i) {
      if ((d_weights.*member).empty()) break;
      from_float((d_weights.*member).data() + i * to->shape[3], to->shape[3], to->dtype, to->row(0, kv_head, i));
    }
  }
}

}  // namespace tessera
