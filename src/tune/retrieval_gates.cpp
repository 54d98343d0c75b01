#include "tune/retrieval_gates.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"
#include "io/json.h"

namespace tessera::tune {

namespace {

// Adam's usual constants.
constexpr double kFirstDecay = 0.9;
constexpr double kSecondDecay = 0.999;
constexpr double kEpsilon = 1e-8;

float* row_of(const MutableTensorView& view, std::int64_t head, std::int64_t row) {
  return reinterpret_cast<float*>(view.row(0, head, row));
}
const float* row_of(const TensorView& view, std::int64_t head, std::int64_t row) {
  return reinterpret_cast<const float*>(view.row(0, head, row));
}

}  // namespace

/// Attention of both passes: the unchanged model's, whose outputs it keeps, then the mixed model's.
class GateObjective::Mixture final : public model::DifferentiableAttention {
 public:
  Mixture(std::int64_t layers, std::int64_t sink, std::int64_t recent, const RunOptions& run_options)
      : streaming_(find_method("streaming").make(Json{{"n_init", sink}, {"n_local", recent}}.dump())),
        run_(run_options),
        layers_(static_cast<std::size_t>(layers)) {}

  /// The next passes are of the unchanged model.
  void teach() { gates_ = nullptr; }
  /// The next passes are of the model mixed by these gates; `gradient` is added to by backward().
  void mix(const Gates& gates, Gates* gradient) {
    gates_ = &gates;
    gradient_ = gradient;
  }

  void forward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs,
               const MutableTensorView& o) override {
    Layer& own = layers_[static_cast<std::size_t>(layer)];
    const std::size_t size = static_cast<std::size_t>(problem.q_heads * problem.q_len * problem.value_dim);
    if (gates_ == nullptr) {
      own.full.resize(size);
      run(dense_plan(problem), inputs, {view(own.full, problem), {}}, run_);
      for_each_row(problem, [&](std::int64_t head, std::int64_t row) {
        std::copy_n(row_of(view(own.full, problem), head, row), problem.value_dim, row_of(o, head, row));
      });
      return;
    }
    own.streamed.resize(size);
    own.lse.resize(static_cast<std::size_t>(problem.q_heads * problem.q_len));
    own.plan = streaming_->plan(problem, inputs, {.layer = 0, .layers = 1, .state = nullptr, .run = run_});
    run(own.plan, inputs, {view(own.streamed, problem), own.lse}, run_);
    for_each_row(problem, [&](std::int64_t head, std::int64_t row) {
      const auto gate = static_cast<float>(gate_of(layer, problem, head));
      const float* full = row_of(view(own.full, problem), head, row);
      const float* streamed = row_of(view(own.streamed, problem), head, row);
      float* out = row_of(o, head, row);
      for (std::int64_t d = 0; d < problem.value_dim; ++d) out[d] = gate * full[d] + (1 - gate) * streamed[d];
    });
  }

  void backward(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs, const TensorView& d_o,
                const Gradients& wanted) override {
    Layer& own = layers_[static_cast<std::size_t>(layer)];
    d_streamed_.resize(own.streamed.size());
    std::vector<double> sums(static_cast<std::size_t>(problem.q_heads));
    parallel_for(problem.q_heads, run_.threads, [&](std::int64_t head, int) {
      const double gate = gate_of(layer, problem, head);
      for (std::int64_t row = 0; row < problem.q_len; ++row) {
        const float* full = row_of(view(own.full, problem), head, row);
        const float* streamed = row_of(view(own.streamed, problem), head, row);
        const float* d_out = row_of(d_o, head, row);
        float* d_in = row_of(view(d_streamed_, problem), head, row);
        for (std::int64_t d = 0; d < problem.value_dim; ++d) {
          sums[static_cast<std::size_t>(head)] += static_cast<double>(d_out[d]) * (full[d] - streamed[d]);
          d_in[d] = static_cast<float>(1 - gate) * d_out[d];
        }
      }
    });
    auto& gradient = (*gradient_)[static_cast<std::size_t>(layer)];
    for (std::int64_t head = 0; head < problem.q_heads; ++head) {
      gradient[static_cast<std::size_t>(head / problem.group())] += sums[static_cast<std::size_t>(head)];
    }
    if (wanted.d_q.data == nullptr && wanted.d_k.data == nullptr && wanted.d_v.data == nullptr) return;
    const SavedForward saved{
        .o = view(own.streamed, problem), .lse = own.lse, .d_o = view(d_streamed_, problem), .d_lse = {}};
    run_backward(own.plan, inputs, saved, wanted, run_);
  }

 private:
  struct Layer {
    std::vector<float> full;      ///< [q_heads][N][value_dim], of the unchanged model
    std::vector<float> streamed;  ///< the same, of the mixed model
    std::vector<float> lse;
    Plan plan;
  };
  static MutableTensorView view(std::vector<float>& values, const Problem& problem) {
    return mutable_view_of(values.data(), DType::f32, {1, problem.q_heads, problem.q_len, problem.value_dim});
  }
  template <class Body>
  void for_each_row(const Problem& problem, const Body& body) const {
    parallel_for(problem.q_heads, run_.threads, [&](std::int64_t head, int) {
      for (std::int64_t row = 0; row < problem.q_len; ++row) body(head, row);
    });
  }
  double gate_of(std::int64_t layer, const Problem& problem, std::int64_t head) const {
    return (*gates_)[static_cast<std::size_t>(layer)][static_cast<std::size_t>(head / problem.group())];
  }

  std::unique_ptr<const Method> streaming_;
  RunOptions run_;
  const Gates* gates_ = nullptr;
  Gates* gradient_ = nullptr;
  std::vector<Layer> layers_;
  std::vector<float> d_streamed_;
};

GateObjective::GateObjective(model::DifferentiableModel& model, std::int64_t sink, std::int64_t recent,
                             const RunOptions& run)
    : model_(model), mixture_(std::make_unique<Mixture>(model.layers(), sink, recent, run)) {}
GateObjective::~GateObjective() = default;

double GateObjective::evaluate(const Prompt& prompt, const Gates& gates, Gates* gradient) {
  require(std::ssize(gates) == model_.layers(), "gates has {} layers; the model has {}", gates.size(), model_.layers());
  for (const auto& layer : gates) {
    require(std::ssize(layer) == model_.kv_heads(), "gates has {} heads in a layer; the model has {}", layer.size(),
            model_.kv_heads());
  }
  std::int64_t answered = 0;
  for (const auto& [first, end] : prompt.answers) {
    require(first >= 0 && first < end && end <= std::ssize(prompt.tokens), "answer [{}, {}) of {} tokens", first, end,
            prompt.tokens.size());
    answered += end - first;
  }
  require(answered > 0, "the prompt has no answers; expected some to compare");
  mixture_->teach();
  std::span<const float> hidden = model_.forward(prompt.tokens, *mixture_);
  const std::size_t width = hidden.size() / prompt.tokens.size();
  std::vector<float> wanted;
  for (const auto& [first, end] : prompt.answers) {
    const auto begin = hidden.begin() + first * static_cast<std::ptrdiff_t>(width);
    wanted.insert(wanted.end(), begin, begin + (end - first) * static_cast<std::ptrdiff_t>(width));
  }
  mixture_->mix(gates, gradient);
  hidden = model_.forward(prompt.tokens, *mixture_);
  std::vector<float> d_hidden(gradient == nullptr ? 0 : hidden.size());
  const double elements = static_cast<double>(answered) * static_cast<double>(width);
  double loss = 0;
  auto expected = wanted.begin();
  for (const auto& [first, end] : prompt.answers) {
    for (std::size_t i = static_cast<std::size_t>(first) * width; i < static_cast<std::size_t>(end) * width; ++i) {
      const double difference = static_cast<double>(hidden[i]) - *expected++;
      loss += difference * difference / elements;
      if (gradient != nullptr) d_hidden[i] = static_cast<float>(2 * difference / elements);
    }
  }
  if (gradient != nullptr) {
    gradient->assign(gates.size(), std::vector<double>(gates[0].size(), 0.0));
    model_.backward(d_hidden, *mixture_);
  }
  return loss;
}

double learning_rate_share(const GateSearch& search, std::int64_t step) {
  const double ramp = std::max(1.0, std::floor(search.warm_up * static_cast<double>(search.steps)));
  const double rise = std::max(static_cast<double>(step + 1) / ramp, search.floor);
  const double fall = std::max(static_cast<double>(search.steps - step) / ramp, search.floor);
  return std::min({1.0, rise, fall});
}

LearnedGates learn_gates(model::DifferentiableModel& model, const GateSearch& search,
                         const std::function<Prompt(std::int64_t)>& prompt_of,
                         const std::function<void(std::int64_t)>& on_step, const RunOptions& run) {
  const auto layers = static_cast<std::size_t>(model.layers());
  const auto heads = static_cast<std::size_t>(model.kv_heads());
  GateObjective objective(model, search.sink, search.recent, run);
  LearnedGates learned{Gates(layers, std::vector<double>(heads, search.initial)), {}};
  Gates gradient;
  Gates mean(layers, std::vector<double>(heads));
  Gates square = mean;
  const auto clamp = [&] {
    for (auto& layer : learned.gates) {
      for (double& gate : layer) gate = std::clamp(gate, 0.0, 1.0);
    }
  };
  for (std::int64_t step = 0; step < search.steps; ++step) {
    clamp();
    learned.deviations.push_back(objective.evaluate(prompt_of(step), learned.gates, &gradient));
    const double rate = search.learning_rate * learning_rate_share(search, step);
    const double first_bias = 1 - std::pow(kFirstDecay, static_cast<double>(step + 1));
    const double second_bias = 1 - std::pow(kSecondDecay, static_cast<double>(step + 1));
    for (std::size_t layer = 0; layer < layers; ++layer) {
      for (std::size_t head = 0; head < heads; ++head) {
        double& gate = learned.gates[layer][head];
        const double slope = gate > 0 ? search.penalty / static_cast<double>(layers * heads) : 0;  // of |gate|
        const double g = gradient[layer][head] + slope;
        double& m = mean[layer][head];
        double& v = square[layer][head];
        m = kFirstDecay * m + (1 - kFirstDecay) * g;
        v = kSecondDecay * v + (1 - kSecondDecay) * g * g;
        gate -= rate * (m / first_bias) / (std::sqrt(v / second_bias) + kEpsilon);
      }
    }
    on_step(step);
  }
  clamp();
  return learned;
}

}  // namespace tessera::tune
