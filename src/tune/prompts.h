// Calibration prompts: long text with passkeys to be found again, and repeated random tokens.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tessera/model.h"

namespace tessera::tune {

/// How passkeys look. `words`: words of the 26-word spelling alphabet, announced by ordinal, as DuoAttention
/// (arXiv:2410.10819) plants them; `digits`: five digits behind the mark PK#.
enum class PasskeyStyle : std::uint8_t { words, digits };

struct PasskeyOptions {
  std::int64_t length = 0;     ///< tokens of the prompt, answers included
  std::int64_t passkeys = 10;  ///< fewer where they would take more than three quarters of the prompt
  std::int64_t words = 32;     ///< of a passkey in style `words`
  PasskeyStyle style = PasskeyStyle::words;
  double least_depth = 0.05;  ///< where passkeys may lie, as shares of the text
  double most_depth = 0.95;
  std::int64_t depths = 1000;  ///< places between them; passkeys take different ones
};

/// Tokens, and the ranges [first, end) of those that answer a question.
struct Prompt {
  std::vector<std::int32_t> tokens;
  std::vector<std::pair<std::int64_t, std::int64_t>> answers;
};

/// Exactly options.length tokens: the model's first token, text with passkeys planted, then each asked for and answered
/// in the order of their ordinals. `text` is read from a place that the seed chooses, round its end; empty: generated
/// sentences. With `answered` false the prompt ends with the first question. Throws Error when one passkey does not
/// fit.
Prompt passkey_prompt(const Model& model, std::string_view text, const PasskeyOptions& options, std::uint64_t seed,
                      bool answered = true);

/// Exactly `length` tokens of the text from the place that the seed chooses, begun with the model's first token; a text
/// that is shorter is repeated.
std::vector<std::int32_t> text_prompt(const Model& model, std::string_view text, std::int64_t length,
                                      std::uint64_t seed);

/// `prompts` prompts of a task for searches that look at attention only: the text as it is, or without text generated
/// ones with passkeys.
std::vector<std::vector<std::int32_t>> calibration_prompts(const Model& model, std::string_view text,
                                                           std::int64_t length, std::int64_t prompts,
                                                           std::uint64_t seed);

/// `period` random tokens that stand for some bytes, drawn uniformly, `repeats` times over; no special tokens.
std::vector<std::int32_t> repeated_tokens(const Model& model, std::int64_t period, std::int64_t repeats,
                                          std::uint64_t seed);

/// About `bytes` bytes of English-looking sentences.
std::string generated_text(std::int64_t bytes, std::uint64_t seed);

}  // namespace tessera::tune
