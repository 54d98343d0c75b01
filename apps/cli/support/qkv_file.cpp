#include "support/qkv_file.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "core/error.h"
#include "io/safetensors.h"
#include "methods/layer_list.h"

namespace tessera::cli {

QkvFile::QkvFile(const ModelConfig& config, std::int64_t tokens, const std::string& layers)
    : tokens_(tokens), dim_(config.head_dim) {
  if (layers.empty()) {
    layers_.resize(static_cast<std::size_t>(config.layers));
    std::iota(layers_.begin(), layers_.end(), 0);
  } else {
    layers_ = read_layer_list("--dump-layers", layers);
    require(layers_.back() < config.layers, "--dump-layers={}: the model has layers 0-{}", layers, config.layers - 1);
  }
  const auto make = [&](std::int64_t heads) {
    return Tensor{heads, std::vector<float>(layers_.size() * static_cast<std::size_t>(heads * tokens_ * dim_))};
  };
  q_ = make(config.q_heads);
  k_ = make(config.kv_heads);
  v_ = make(config.kv_heads);
}

void QkvFile::add(const ProjectedRows& rows) {
  const auto found = std::lower_bound(layers_.begin(), layers_.end(), rows.layer);
  if (found == layers_.end() || *found != rows.layer) return;
  const std::int64_t place = found - layers_.begin();
  scatter(place, rows, rows.q, q_);
  scatter(place, rows, rows.k, k_);
  scatter(place, rows, rows.v, v_);
}

/// From [rows][heads][dim] to [layers][heads][tokens][dim].
void QkvFile::scatter(std::int64_t place, const ProjectedRows& rows, std::span<const float> from, Tensor& to) const {
  for (std::int64_t row = 0; row < rows.rows; ++row) {
    for (std::int64_t head = 0; head < to.heads; ++head) {
      const std::int64_t token = (place * to.heads + head) * tokens_ + rows.position + row;
      std::copy_n(from.data() + (row * to.heads + head) * dim_, dim_, to.values.data() + token * dim_);
    }
  }
}

void QkvFile::write(const std::string& path) const {
  const auto layers = static_cast<std::int64_t>(layers_.size());
  const auto tensor = [&](const char* name, const Tensor& from) {
    return named_tensor<float>(name, DType::f32, {layers, from.heads, tokens_, dim_}, from.values);
  };
  const std::array tensors{tensor("q", q_), tensor("k", k_), tensor("v", v_)};
  write_safetensors(path, tensors, {{"layers", fmt::format("{}", fmt::join(layers_, "+"))}});
}

}  // namespace tessera::cli
