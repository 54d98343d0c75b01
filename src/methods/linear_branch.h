// Linear attention over the key tiles that a query tile marks, with a learned projection behind it: the second branch
// of SLA, forward and backward. recurrent/tile_states.h has the formulas.
//
// States of tiles are added up per query tile in pieces of all states that fit a core's cache, so that the sums, which
// are as large as the states themselves, cost one pass over them; the rest is products of blocks.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/workspace.h"
#include "recurrent/tile_states.h"
#include "tessera/attention.h"
#include "tessera/gradient.h"

namespace tessera {

/// 1 where a query tile of one (sequence, query head) reads a key tile.
struct MarkedTiles {
  std::int64_t key_tiles = 0;
  std::vector<std::uint8_t> marks;  ///< [query tiles][key tiles]

  bool at(std::int64_t query_tile, std::int64_t key_tile) const {
    return marks[static_cast<std::size_t>(query_tile * key_tiles + key_tile)] != 0;
  }
};

/// W [value_dim, value_dim], [in, out], and b [value_dim], each for all query heads or per head; zero where absent.
class LearnedProjection {
 public:
  /// Reads the side inputs `projection` and `bias`. Throws Error naming `method` for another shape or dtype.
  LearnedProjection(std::string_view method, const Problem& problem, const AttentionInputs& inputs);

  bool given() const { return given_; }
  recurrent::Projection of(std::int64_t head) const;

 private:
  bool given_ = false;
  std::vector<std::vector<float>> weight_;
  std::vector<std::vector<float>> transposed_;
  std::vector<std::vector<float>> bias_;
};

/// Gradients of the branch. Rows of tokens that belong to no sequence are not written.
struct LinearBranchGradients {
  /// `projection`: gradients of W and b are wanted.
  LinearBranchGradients(const Problem& problem, const AttentionInputs& inputs, bool projection, Workspace* workspace);

  MutableTensorView d_q, d_k, d_v;          ///< float, contiguous [B, H, N, D]
  std::vector<std::vector<double>> weight;  ///< [query heads] of [in][out]; empty: not wanted
  std::vector<std::vector<double>> bias;    ///< [query heads] of [out]

 private:
  kernels::BorrowedBuffer memory_;
};

struct LinearBranchOptions {
  std::int64_t block_q = 64;
  std::int64_t block_k = 64;
  FeatureMap map = FeatureMap::softmax;
  float floor = 0;  ///< added to the denominator; without it a denominator of 0 gives 0
};

class LinearBranch {
 public:
  LinearBranch(const Problem& problem, const AttentionInputs& inputs, const LinearBranchOptions& options,
               const RunOptions& run);

  /// o += O_linear W + b. `marked` has an element per (sequence, query head).
  void add_to(const MutableTensorView& o, std::span<const MarkedTiles> marked,
              const LearnedProjection& projection) const;
  /// Also adds dO . (O_linear W + b) to `shares`, laid out like an LSE.
  void backward(const TensorView& d_o, std::span<const MarkedTiles> marked, const LearnedProjection& projection,
                std::span<float> shares, LinearBranchGradients& gradients) const;

 private:
  class Worker;
  struct Keys;

  std::vector<Worker> workers() const;
  /// body(keys, states of their tiles) for every (sequence, kv head).
  template <class Body>
  void for_each_head_of_keys(std::vector<Worker>& workers, const Body& body) const;
  /// body(query head, first query tile, query tiles, marks) for the heads that read the keys, some tiles at a time.
  template <class Body>
  void for_each_group(const Keys& keys, std::span<const MarkedTiles> marked, const Body& body) const;
  void query_tile_backward(std::int64_t sequence, std::int64_t head, std::int64_t first, const TensorView& d_o,
                           const LearnedProjection& projection, float* state, float* d_weight, std::span<float> shares,
                           LinearBranchGradients& gradients, Worker& worker) const;

  const Problem& problem_;
  const AttentionInputs& inputs_;
  LinearBranchOptions options_;
  recurrent::TileStateShape shape_;
  const recurrent::TileStateKernels& kernels_;
  Workspace* workspace_;
  int threads_;
};

}  // namespace tessera
