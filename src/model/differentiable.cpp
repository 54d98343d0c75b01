#include "model/differentiable.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"
#include "model/layers/elementwise.h"
#include "model/parts.h"
#include "model/rope.h"

namespace tessera::model {

namespace {

/// Rows that go through the feed-forward part together: bounds its scratch.
constexpr std::int64_t kGroupRows = 1024;
/// Rows of logits held at once.
constexpr std::int64_t kLogitRows = 64;

}  // namespace

class DifferentiableDecoder::Implementation {
 public:
  Implementation(const Model& model, int threads)
      : config_(model.config()),
        weights_(model.parts().weights),
        rope_(config_.rope, config_.head_dim),
        threads_(threads),
        q_width_(config_.q_heads * config_.head_dim),
        kv_width_(config_.kv_heads * config_.head_dim) {
    const bool plain = config_.layer_kinds == std::vector<LayerConfig>(config_.layer_kinds.size()) &&
                       !config_.qk_norm && !config_.post_norms && !config_.qkv_bias && !config_.output_bias &&
                       !config_.mlp_bias && config_.activation == Activation::silu && config_.embedding_scale == 1 &&
                       config_.attention_scale == 0 && config_.attention_softcap == 0 && config_.final_softcap == 0;
    require(plain, "searches by gradient support models of plain Llama layers; this one is {}", config_.architecture);
  }

  const ModelConfig& config() const { return config_; }

  std::span<const float> forward(std::span<const std::int32_t> tokens, DifferentiableAttention& attention) {
    require(!tokens.empty(), "no tokens given; expected at least one");
    for (const std::int32_t token : tokens) {
      require(token >= 0 && token < config_.vocab_size, "token {} is outside the vocabulary of {}", token,
              config_.vocab_size);
    }
    tokens_.assign(tokens.begin(), tokens.end());
    rows_ = std::ssize(tokens);
    const std::int64_t hidden = config_.hidden_size;
    inputs_.resize(static_cast<std::size_t>(config_.layers) + 1);
    attended_.resize(static_cast<std::size_t>(config_.layers));
    for (auto& input : inputs_) input.resize(static_cast<std::size_t>(rows_ * hidden));
    for (auto& attended : attended_) attended.resize(static_cast<std::size_t>(rows_ * q_width_));
    rope_.tables(0, rows_, rows_, rotations_);
    for (std::int64_t row = 0; row < rows_; ++row) {
      weights_.embedding->row(tokens_[static_cast<std::size_t>(row)], inputs_[0].data() + row * hidden);
    }
    for (std::int64_t i = 0; i < config_.layers; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const LayerWeights& layer = weights_.layers[at];
      project(layer, inputs_[at]);
      attention.forward(i, problem(), attention_inputs(), output_view(attended_[at]));
      inputs_[at + 1] = inputs_[at];
      float* out = inputs_[at + 1].data();
      for (std::int64_t first = 0; first < rows_; first += kGroupRows) {
        const std::int64_t rows = std::min(kGroupRows, rows_ - first);
        add_attention(layer, attended_[at], first, rows, out + first * hidden);
        feed(layer, out + first * hidden, rows);
        gated_product(Activation::silu, gate_.data(), up_.data(), rows, config_.intermediate_size, products());
        layer.mlp.down->multiply(gate_.data(), rows, joined_.data(), products());
        add(out + first * hidden, joined_.data(), rows, hidden, threads_);
      }
    }
    result_.resize(static_cast<std::size_t>(rows_ * hidden));
    rms_norm(inputs_.back().data(), rows_, weights_.norm, config_.norm_epsilon, result_.data(), threads_);
    return result_;
  }

  void backward(std::span<const float> d_hidden, DifferentiableAttention& attention) {
    require(rows_ > 0 && d_hidden.size() == result_.size(), "d_hidden has {} numbers; the last pass has {}",
            d_hidden.size(), result_.size());
    const std::int64_t hidden = config_.hidden_size;
    std::vector<float> d_x(result_.size());
    rms_norm_backward(inputs_.back().data(), rows_, weights_.norm, config_.norm_epsilon, d_hidden.data(), d_x.data(),
                      threads_);
    std::vector<float> d_attended(static_cast<std::size_t>(rows_ * q_width_));
    for (std::int64_t i = config_.layers - 1; i >= 0; --i) {
      const auto at = static_cast<std::size_t>(i);
      const LayerWeights& layer = weights_.layers[at];
      for (std::int64_t first = 0; first < rows_; first += kGroupRows) {
        const std::int64_t rows = std::min(kGroupRows, rows_ - first);
        feed_backward(layer, at, first, rows, d_x.data() + first * hidden);
        layer.o->multiply_back(d_x.data() + first * hidden, rows, d_attended.data() + first * q_width_, threads_);
      }
      project(layer, inputs_[at]);
      Gradients wanted;
      if (i > 0) {
        d_q_.resize(queries_.size());
        d_k_.resize(keys_.size());
        d_v_.resize(values_.size());
        wanted.d_q = output_view(d_q_);
        wanted.d_k = key_view(d_k_);
        wanted.d_v = key_view(d_v_);
      }
      attention.backward(i, problem(), attention_inputs(), output_view(d_attended), wanted);
      if (i > 0) project_backward(layer, inputs_[at], d_x);
    }
  }

  double cross_entropy(std::int64_t first, std::int64_t end, std::span<float> d_hidden) {
    require(first >= 1 && first < end && end <= rows_, "tokens [{}, {}) of {}; expected some of them, not the first",
            first, end, rows_);
    require(d_hidden.empty() || d_hidden.size() == result_.size(), "d_hidden has {} numbers; the last pass has {}",
            d_hidden.size(), result_.size());
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t vocab = config_.vocab_size;
    const Matrix& head = weights_.output_head();
    std::vector<float> logits(static_cast<std::size_t>(kLogitRows * vocab));
    std::vector<float> d_rows(static_cast<std::size_t>(kLogitRows * hidden));
    const auto count = static_cast<double>(end - first);
    double loss = 0;
    for (std::int64_t begin = first - 1; begin < end - 1; begin += kLogitRows) {
      const std::int64_t rows = std::min(kLogitRows, end - 1 - begin);
      head.multiply(result_.data() + begin * hidden, rows, logits.data(), products());
      for (std::int64_t row = 0; row < rows; ++row) {
        float* of_row = logits.data() + row * vocab;
        const std::int32_t target = tokens_[static_cast<std::size_t>(begin + row + 1)];
        const double most = *std::max_element(of_row, of_row + vocab);
        double sum = 0;
        for (std::int64_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(of_row[i]) - most);
        loss -= (static_cast<double>(of_row[target]) - most - std::log(sum)) / count;
        for (std::int64_t i = 0; i < vocab; ++i) {
          const double probability = std::exp(static_cast<double>(of_row[i]) - most) / sum;
          of_row[i] = static_cast<float>((probability - (i == target ? 1 : 0)) / count);
        }
      }
      if (d_hidden.empty()) continue;
      head.multiply_back(logits.data(), rows, d_rows.data(), threads_);
      add(d_hidden.data() + begin * hidden, d_rows.data(), rows, hidden, threads_);
    }
    return loss;
  }

 private:
  /// Gradients are of the exact products.
  ProductOptions products() const { return {.threads = threads_, .exact = true}; }
  Problem problem() const {
    Problem problem;
    problem.q_heads = config_.q_heads;
    problem.kv_heads = config_.kv_heads;
    problem.q_len = problem.kv_len = rows_;
    problem.head_dim = problem.value_dim = config_.head_dim;
    problem.causal = true;
    return problem;
  }
  MutableTensorView output_view(std::vector<float>& rows) const {
    return mutable_view_of(rows.data(), DType::f32, {1, config_.q_heads, rows_, config_.head_dim}, Layout::bnhd);
  }
  MutableTensorView key_view(std::vector<float>& rows) const {
    return mutable_view_of(rows.data(), DType::f32, {1, config_.kv_heads, rows_, config_.head_dim}, Layout::bnhd);
  }
  AttentionInputs attention_inputs() {
    AttentionInputs inputs;
    inputs.q = output_view(queries_);
    inputs.k = key_view(keys_);
    inputs.v = key_view(values_);
    return inputs;
  }

  template <class Rotate>
  void rotate_rows(std::vector<float>& queries, std::vector<float>& keys, const Rotate& rotate) const {
    constexpr std::int64_t rows_per_item = 32;
    parallel_for((rows_ + rows_per_item - 1) / rows_per_item, threads_, [&](std::int64_t item, int) {
      const std::int64_t end = std::min(rows_, (item + 1) * rows_per_item);
      for (std::int64_t row = item * rows_per_item; row < end; ++row) {
        const float* table = rotations_.data() + row * rope_.dims();
        rotate(queries.data() + row * q_width_, config_.q_heads, table);
        rotate(keys.data() + row * kv_width_, config_.kv_heads, table);
      }
    });
  }

  /// Queries, keys and values of all rows.
  void project(const LayerWeights& layer, const std::vector<float>& x) {
    const std::int64_t hidden = config_.hidden_size;
    normed_.resize(static_cast<std::size_t>(rows_ * hidden));
    queries_.resize(static_cast<std::size_t>(rows_ * q_width_));
    keys_.resize(static_cast<std::size_t>(rows_ * kv_width_));
    values_.resize(keys_.size());
    rms_norm(x.data(), rows_, layer.attention_norm, config_.norm_epsilon, normed_.data(), threads_);
    layer.q->multiply(normed_.data(), rows_, queries_.data(), products());
    layer.k->multiply(normed_.data(), rows_, keys_.data(), products());
    layer.v->multiply(normed_.data(), rows_, values_.data(), products());
    rotate_rows(queries_, keys_,
                [this](float* rows, std::int64_t heads, const float* table) { rope_.rotate(rows, heads, table); });
  }

  /// Adds to d_x what comes back through the projections.
  void project_backward(const LayerWeights& layer, const std::vector<float>& x, std::vector<float>& d_x) {
    const std::int64_t hidden = config_.hidden_size;
    rotate_rows(d_q_, d_k_,
                [this](float* rows, std::int64_t heads, const float* table) { rope_.rotate_back(rows, heads, table); });
    std::vector<float>& d_normed = normed_;
    std::vector<float> part(d_normed.size());
    layer.q->multiply_back(d_q_.data(), rows_, d_normed.data(), threads_);
    layer.k->multiply_back(d_k_.data(), rows_, part.data(), threads_);
    add(d_normed.data(), part.data(), rows_, hidden, threads_);
    layer.v->multiply_back(d_v_.data(), rows_, part.data(), threads_);
    add(d_normed.data(), part.data(), rows_, hidden, threads_);
    rms_norm_backward(x.data(), rows_, layer.attention_norm, config_.norm_epsilon, d_normed.data(), d_x.data(),
                      threads_);
  }

  /// x += Wo * attended for a group of rows.
  void add_attention(const LayerWeights& layer, const std::vector<float>& attended, std::int64_t first,
                     std::int64_t rows, float* x) {
    const std::int64_t hidden = config_.hidden_size;
    joined_.resize(static_cast<std::size_t>(kGroupRows * hidden));
    layer.o->multiply(attended.data() + first * q_width_, rows, joined_.data(), products());
    add(x, joined_.data(), rows, hidden, threads_);
  }

  /// The two inner projections of a group of rows whose residual stream is x.
  void feed(const LayerWeights& layer, const float* x, std::int64_t rows) {
    const std::int64_t hidden = config_.hidden_size;
    const auto inner = static_cast<std::size_t>(kGroupRows * config_.intermediate_size);
    group_.resize(static_cast<std::size_t>(kGroupRows * hidden));
    gate_.resize(inner);
    up_.resize(inner);
    rms_norm(x, rows, layer.mlp_norm, config_.norm_epsilon, group_.data(), threads_);
    layer.mlp.gate->multiply(group_.data(), rows, gate_.data(), products());
    layer.mlp.up->multiply(group_.data(), rows, up_.data(), products());
  }

  /// Turns the gradient of a layer's output into that of its residual stream behind attention.
  void feed_backward(const LayerWeights& layer, std::size_t at, std::int64_t first, std::int64_t rows, float* d_x) {
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t inner = config_.intermediate_size;
    std::vector<float> middle(inputs_[at].begin() + first * hidden, inputs_[at].begin() + (first + rows) * hidden);
    add_attention(layer, attended_[at], first, rows, middle.data());
    feed(layer, middle.data(), rows);
    std::vector<float> d_gate(static_cast<std::size_t>(rows * inner));
    layer.mlp.down->multiply_back(d_x, rows, d_gate.data(), threads_);
    silu_product_backward(gate_.data(), up_.data(), d_gate.data(), rows, inner, threads_);
    layer.mlp.gate->multiply_back(d_gate.data(), rows, group_.data(), threads_);
    layer.mlp.up->multiply_back(up_.data(), rows, joined_.data(), threads_);
    add(group_.data(), joined_.data(), rows, hidden, threads_);
    rms_norm_backward(middle.data(), rows, layer.mlp_norm, config_.norm_epsilon, group_.data(), d_x, threads_);
  }

  const ModelConfig& config_;
  const Weights& weights_;
  Rope rope_;
  int threads_;
  std::int64_t q_width_;
  std::int64_t kv_width_;
  // Of the last pass.
  std::int64_t rows_ = 0;
  std::vector<std::int32_t> tokens_;
  std::vector<std::vector<float>> inputs_;    ///< [layers + 1][rows][hidden]: of each layer, and of the final norm
  std::vector<std::vector<float>> attended_;  ///< [layers][rows][q_heads * head_dim]
  std::vector<float> result_;                 ///< [rows][hidden]
  std::vector<float> rotations_;
  // Of a layer, all rows.
  std::vector<float> normed_, queries_, keys_, values_, d_q_, d_k_, d_v_;
  // Of a group of rows.
  std::vector<float> group_, joined_, gate_, up_;
};

DifferentiableDecoder::DifferentiableDecoder(const Model& model, int threads)
    : implementation_(std::make_unique<Implementation>(model, threads)) {}
DifferentiableDecoder::~DifferentiableDecoder() = default;

std::int64_t DifferentiableDecoder::layers() const {
  return implementation_->config().layers;
}

std::int64_t DifferentiableDecoder::kv_heads() const {
  return implementation_->config().kv_heads;
}

std::span<const float> DifferentiableDecoder::forward(std::span<const std::int32_t> tokens,
                                                      DifferentiableAttention& attention) {
  return implementation_->forward(tokens, attention);
}

void DifferentiableDecoder::backward(std::span<const float> d_hidden, DifferentiableAttention& attention) {
  implementation_->backward(d_hidden, attention);
}

double DifferentiableDecoder::cross_entropy(std::int64_t first, std::int64_t end, std::span<float> d_hidden) {
  return implementation_->cross_entropy(first, end, d_hidden);
}

}  // namespace tessera::model
