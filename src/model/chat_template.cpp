#include "model/chat_template.h"

#include "core/error.h"

namespace tessera::model {

namespace {

bool holds(std::string_view source, std::string_view mark) {
  return source.find(mark) != std::string_view::npos;
}

std::string trimmed(std::string_view text) {
  constexpr std::string_view white = " \t\n\r\f\v";
  const std::size_t begin = text.find_first_not_of(white);
  if (begin == std::string_view::npos) return {};
  return std::string(text.substr(begin, text.find_last_not_of(white) - begin + 1));
}

/// The system message that a ChatML template writes by itself: plain text between the marks.
std::string chatml_default(std::string_view source) {
  for (const std::string_view newline : {"\\n", "\n"}) {
    const std::string begin = fmt::format("<|im_start|>system{}", newline);
    for (std::size_t at = source.find(begin); at != std::string_view::npos; at = source.find(begin, at + 1)) {
      const std::string_view rest = source.substr(at + begin.size());
      const std::string_view text = rest.substr(0, rest.find("<|im_end|>"));
      if (text.size() < rest.size() && !text.empty() && text.find_first_of("'\"{}+\\") == std::string_view::npos) {
        return std::string(text);
      }
    }
  }
  return {};
}

/// Collects the parts of a prompt.
class Turns {
 public:
  void mark(std::string_view text) { parts_.push_back({std::string(text), true}); }
  void say(std::string_view text) { parts_.push_back({std::string(text), false}); }
  std::vector<TextPart> take() { return std::move(parts_); }

 private:
  std::vector<TextPart> parts_;
};

void check_roles(std::span<const ChatMessage> messages) {
  require(!messages.empty(), "the conversation has no messages; expected at least one of the user");
  const std::size_t first = messages[0].role == "system" ? 1 : 0;
  for (std::size_t i = first; i < messages.size(); ++i) {
    const std::string_view expected = (i - first) % 2 == 0 ? "user" : "assistant";
    require(messages[i].role == expected, "message {} has the role '{}'; expected {}", i,
            messages[i].role.substr(0, 60), expected);
  }
  require(messages.back().role == "user", "the last message has the role '{}'; expected user",
          messages.back().role.substr(0, 60));
}

}  // namespace

std::string_view chat_template_names() {
  return "chatml, llama-2, llama-3, mistral, gemma, phi-3, zephyr";
}

ChatTemplate ChatTemplate::recognise(std::string_view source, std::string_view name) {
  ChatTemplate result;
  result.bos_ = holds(source, "bos_token");
  if (holds(source, "<|im_start|>")) {
    result.kind_ = Kind::chatml;
    result.default_system_ = chatml_default(source);
  } else if (holds(source, "<|start_header_id|>") && holds(source, "<|eot_id|>")) {
    result.kind_ = Kind::llama3;
    if (holds(source, "Cutting Knowledge Date: December 2023")) {
      // The date that the template falls back to: prompts must not depend on the day.
      result.system_prefix_ = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
    }
  } else if (holds(source, "<<SYS>>") && holds(source, "[INST]")) {
    result.kind_ = Kind::llama2;
  } else if (holds(source, "[INST]")) {
    result.kind_ = Kind::mistral;
    result.space_inside_ = holds(source, "[INST] ");
    result.space_before_end_ = holds(source, " [/INST]");
  } else if (holds(source, "<start_of_turn>")) {
    result.kind_ = Kind::gemma;
  } else if (holds(source, "<|user|>") && holds(source, "<|end|>")) {
    result.kind_ = Kind::phi3;
  } else if (holds(source, "<|user|>") && holds(source, "<|assistant|>") && holds(source, "eos_token")) {
    result.kind_ = Kind::zephyr;
  } else {
    fail("{}: the chat template is none of those that are known: {}", name, chat_template_names());
  }
  return result;
}

std::string_view ChatTemplate::end_of_turn() const {
  switch (kind_) {
    case Kind::chatml:
      return "<|im_end|>";
    case Kind::llama3:
      return "<|eot_id|>";
    case Kind::gemma:
      return "<end_of_turn>";
    case Kind::phi3:
      return "<|end|>";
    default:
      return {};
  }
}

std::vector<TextPart> ChatTemplate::render(std::span<const ChatMessage> messages, std::string_view bos,
                                           std::string_view eos) const {
  check_roles(messages);
  Turns turns;
  std::string system = messages[0].role == "system" ? messages[0].content : default_system_;
  if (messages[0].role == "system") messages = messages.subspan(1);
  const bool llama3 = kind_ == Kind::llama3;
  const auto framed = [&](std::string_view role, std::string_view content) {
    switch (kind_) {
      case Kind::chatml:
        turns.mark(fmt::format("<|im_start|>{}\n", role));
        turns.say(content);
        turns.mark("<|im_end|>\n");
        break;
      case Kind::llama3:
        turns.mark(fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n", role));
        turns.say(content);
        turns.mark("<|eot_id|>");
        break;
      case Kind::gemma:
        turns.mark(fmt::format("<start_of_turn>{}\n", role == "assistant" ? "model" : role));
        turns.say(content);
        turns.mark("<end_of_turn>\n");
        break;
      case Kind::phi3:
        turns.mark(fmt::format("<|{}|>\n", role));
        turns.say(content);
        turns.mark("<|end|>\n");
        break;
      default:
        turns.mark(fmt::format("<|{}|>\n", role));
        turns.say(content);
        turns.mark(fmt::format("{}\n", eos));
        break;
    }
  };
  const bool instructs = kind_ == Kind::llama2 || kind_ == Kind::mistral;
  const bool system_in_user = instructs || kind_ == Kind::gemma;
  if (!system_in_user && (!system.empty() || !system_prefix_.empty())) {
    framed("system", system_prefix_ + (llama3 ? trimmed(system) : system));
  }
  bool first = true;
  for (const ChatMessage& message : messages) {
    // Jinja's trim, where the templates say so.
    const bool trims = llama3 || kind_ == Kind::llama2 || kind_ == Kind::gemma;
    const std::string content = trims ? trimmed(message.content) : message.content;
    if (!instructs) {
      const bool with_system = system_in_user && first && !system.empty();
      framed(message.role, with_system ? fmt::format("{}\n\n{}", system, content) : content);
    } else if (message.role == "assistant") {
      turns.say(kind_ == Kind::llama2 ? fmt::format(" {} ", content) : fmt::format(" {}", content));
      turns.mark(eos);
    } else if (kind_ == Kind::llama2) {
      if (!first) turns.mark(bos);
      turns.mark("[INST] ");
      if (first && !system.empty()) {
        turns.say(trimmed(fmt::format("<<SYS>>\n{}\n<</SYS>>\n\n{}", system, message.content)));
      } else {
        turns.say(content);
      }
      turns.mark(" [/INST]");
    } else {
      turns.mark(space_inside_ ? "[INST] " : "[INST]");
      const bool last = &message == &messages.back();
      turns.say(last && !system.empty() ? fmt::format("{}\n\n{}", system, content) : content);
      turns.mark(space_before_end_ ? " [/INST]" : "[/INST]");
    }
    first = false;
  }
  switch (kind_) {
    case Kind::chatml:
      turns.mark("<|im_start|>assistant\n");
      break;
    case Kind::llama3:
      turns.mark("<|start_header_id|>assistant<|end_header_id|>\n\n");
      break;
    case Kind::gemma:
      turns.mark("<start_of_turn>model\n");
      break;
    case Kind::phi3:
    case Kind::zephyr:
      turns.mark("<|assistant|>\n");
      break;
    default:
      break;
  }
  return turns.take();
}

}  // namespace tessera::model
