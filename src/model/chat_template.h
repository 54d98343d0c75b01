// Chat templates: how the turns of a conversation are marked for a model.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer.h"
#include "tessera/model.h"

namespace tessera::model {

/// Files hold templates as Jinja programs. The common ones are recognised by the marks they write, and applied by code;
/// others are refused.
class ChatTemplate {
 public:
  enum class Kind : std::uint8_t { chatml, llama2, llama3, mistral, gemma, phi3, zephyr };

  /// Throws Error that lists the templates that are known. `name` stands for the source in messages.
  static ChatTemplate recognise(std::string_view source, std::string_view name);

  Kind kind() const { return kind_; }
  /// Whether the beginning-of-sequence token comes before the first turn.
  bool begins_with_bos() const { return bos_; }
  /// What ends a turn; empty for templates that end it with the end-of-sequence token.
  std::string_view end_of_turn() const;
  /// The turns and the beginning of the answer. Roles are system (first, if at all), then user and assistant in turn,
  /// user last; throws Error for others. `bos` and `eos` are the texts of those tokens; the first turn has no `bos`.
  std::vector<TextPart> render(std::span<const ChatMessage> messages, std::string_view bos, std::string_view eos) const;

 private:
  Kind kind_ = Kind::chatml;
  bool bos_ = false;
  std::string default_system_;  ///< said by the template when the conversation has no system message
  std::string system_prefix_;   ///< what Llama 3.1 says before every system message
  bool space_inside_ = true;    ///< Mistral: "[INST] text", not "[INST]text"
  bool space_before_end_ = true;
};

/// Names of the known templates, for messages.
std::string_view chat_template_names();

}  // namespace tessera::model
