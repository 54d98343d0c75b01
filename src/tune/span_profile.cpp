#include "tune/span_profile.h"

#include "core/error.h"
#include "core/parallel.h"
#include "tune/span_search.h"

namespace tessera::tune {

namespace {

std::pair<std::int64_t, std::int64_t> answer_of(const Prompt& prompt) {
  require(!prompt.answers.empty(), "the prompt has no answer; expected one");
  return prompt.answers.front();
}

/// Dense attention that notes the influence of its blocks on the way back.
class ProfiledAttention final : public model::DifferentiableAttention {
 public:
  ProfiledAttention(std::int64_t layers, std::int64_t q_heads, const RunOptions& run_options)
      : influence(static_cast<std::size_t>(layers * q_heads)),
        run_(run_options),
        layers_(static_cast<std::size_t>(layers)) {}

  void forward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs,
               const MutableTensorView& o) override {
    Layer& own = layers_[static_cast<std::size_t>(layer)];
    own.lse.resize(static_cast<std::size_t>(problem.q_heads * problem.q_len));
    own.o = o;  // the model keeps the outputs of a pass
    run(dense_plan(problem), inputs, {o, own.lse}, run_);
  }

  void backward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs, const TensorView& d_o,
                const Gradients& wanted) override {
    parallel_for(problem.q_heads, run_.threads, [&](std::int64_t head, int) {
      influence[static_cast<std::size_t>(layer * problem.q_heads + head)] = block_influence(problem, inputs, d_o, head);
    });
    if (wanted.d_q.data == nullptr && wanted.d_k.data == nullptr && wanted.d_v.data == nullptr) return;
    const Layer& own = layers_[static_cast<std::size_t>(layer)];
    run_backward(dense_plan(problem), inputs, {.o = own.o, .lse = own.lse, .d_o = d_o, .d_lse = {}}, wanted, run_);
  }

  std::vector<std::vector<double>> influence;

 private:
  struct Layer {
    MutableTensorView o;
    std::vector<float> lse;
  };
  RunOptions run_;
  std::vector<Layer> layers_;
};

/// Forward only.
class MethodAttention final : public model::DifferentiableAttention {
 public:
  MethodAttention(std::int64_t layers, const Method& method, const RunOptions& run_options)
      : layers_(layers), method_(method), run_(run_options) {}
  void forward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs,
               const MutableTensorView& o) override {
    method_.attend(problem, inputs, {o, {}}, {.layer = layer, .layers = layers_, .state = nullptr, .run = run_});
  }
  void backward(std::int64_t, const Problem&, const AttentionInputs&, const TensorView&, const Gradients&) override {
    fail("a pass by a method has no gradient here");
  }

 private:
  std::int64_t layers_;
  const Method& method_;
  RunOptions run_;
};

}  // namespace

std::vector<std::vector<double>> profile_influence(model::DifferentiableDecoder& decoder, std::int64_t q_heads,
                                                   const Prompt& prompt, const RunOptions& run) {
  const auto [first, end] = answer_of(prompt);
  ProfiledAttention attention(decoder.layers(), q_heads, run);
  std::vector<float> d_hidden(decoder.forward(prompt.tokens, attention).size());
  decoder.cross_entropy(first, end, d_hidden);
  decoder.backward(d_hidden, attention);
  return std::move(attention.influence);
}

double answer_loss(model::DifferentiableDecoder& decoder, const Prompt& prompt, const Method& method,
                   const RunOptions& run) {
  const auto [first, end] = answer_of(prompt);
  MethodAttention attention(decoder.layers(), method, run);
  decoder.forward(prompt.tokens, attention);
  return decoder.cross_entropy(first, end, {});
}

}  // namespace tessera::tune
