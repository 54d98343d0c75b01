// Prefill, then token after token; and the code length of the prompt.
#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "model/parts.h"
#include "model/sampler.h"
#include "tessera/model.h"

namespace tessera {

namespace {

/// -log2 softmax(logits)[token], in float64.
double bits_of(std::span<const float> logits, std::int32_t token) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return (std::log(sum) + largest - static_cast<double>(logits[static_cast<std::size_t>(token)])) / std::log(2.0);
}

/// Sums the code length of a prompt as its logits come by.
class CodeLength {
 public:
  CodeLength(std::span<const std::int32_t> prompt, std::int64_t first_position, const Model& model)
      : prompt_(prompt), first_position_(first_position), model_(model) {}

  void add(std::int64_t position, std::span<const float> logits) {
    const auto vocab = static_cast<std::size_t>(model_.config().vocab_size);
    for (std::size_t row = 0; row < logits.size() / vocab; ++row) {
      const auto next = static_cast<std::size_t>(position - first_position_) + row + 1;
      if (next >= prompt_.size()) return;
      bits_ += bits_of(logits.subspan(row * vocab, vocab), prompt_[next]);
      bytes_ += model_.parts().tokenizer.bytes_of(prompt_[next]).size();
    }
  }
  std::optional<double> per_byte() const {
    if (bytes_ == 0) return std::nullopt;
    return bits_ / static_cast<double>(bytes_);
  }

 private:
  std::span<const std::int32_t> prompt_;
  std::int64_t first_position_;
  const Model& model_;
  double bits_ = 0;
  std::size_t bytes_ = 0;
};

}  // namespace

Generation generate(Session& session, std::span<const std::int32_t> prompt, const GenerateOptions& options) {
  require(options.max_tokens >= 0, "max_tokens is {}; expected 0 or more", options.max_tokens);
  model::Sampler sampler(options.sampling);
  const Model& model = session.model();
  const std::int64_t room = session.capacity() - session.tokens() - std::ssize(prompt);
  session.check_memory(std::ssize(prompt),
                       std::clamp<std::int64_t>(options.max_tokens, 0, std::max<std::int64_t>(room, 0)));
  CodeLength code(prompt, session.tokens(), model);
  Session::PrefillObserver observer = options.prefill;
  if (options.bits_per_byte) {
    observer.on_logits = [&](std::int64_t position, std::span<const float> logits) {
      code.add(position, logits);
      if (options.prefill.on_logits) options.prefill.on_logits(position, logits);
    };
  }

  Generation result;
  std::span<const float> logits = session.prefill(prompt, observer);
  if (options.bits_per_byte) result.bits_per_byte = code.per_byte();
  const std::vector<std::int32_t>& ends = model.config().eos_tokens;
  for (std::int64_t done = 0; done < options.max_tokens; ++done) {
    const std::int32_t token = sampler.next(logits);
    result.tokens.push_back(token);
    if (options.stop_at_eos && std::find(ends.begin(), ends.end(), token) != ends.end()) break;
    const std::string_view bytes = model.parts().tokenizer.bytes_of(token);
    result.text += bytes;
    if (options.on_text && !bytes.empty()) options.on_text(bytes);
    if (options.on_decode_progress) options.on_decode_progress(done + 1, options.max_tokens);
    if (done + 1 == options.max_tokens || session.tokens() == session.capacity()) break;
    logits = session.decode(token);
  }
  return result;
}

}  // namespace tessera
