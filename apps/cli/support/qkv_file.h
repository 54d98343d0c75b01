// Queries, keys and values of a prompt as a file that `tessera attend --qkv` reads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tessera/model.h"

namespace tessera::cli {

/// Collects what the chosen layers of a model attend to. The layers lie along the batch axis, ascending.
class QkvFile {
 public:
  /// `layers` names them as "0-2+14", empty: all. Throws Error for layers that the model lacks.
  QkvFile(const ModelConfig& config, std::int64_t tokens, const std::string& layers);

  void add(const ProjectedRows& rows);
  /// Tensors q [layers, q_heads, tokens, head_dim], k and v [layers, kv_heads, tokens, head_dim], f32; the numbers of
  /// the layers are the metadata "layers".
  void write(const std::string& path) const;

 private:
  struct Tensor {
    std::int64_t heads = 0;
    std::vector<float> values;
  };
  void scatter(std::int64_t place, const ProjectedRows& rows, std::span<const float> from, Tensor& to) const;

  std::int64_t tokens_;
  std::int64_t dim_;
  std::vector<std::int64_t> layers_;
  Tensor q_, k_, v_;
};

}  // namespace tessera::cli
