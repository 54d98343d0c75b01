// A model's answers to generated tasks, and its perplexity on a text, with methods in prefill, in decoding or in both.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "eval/bootstrap.h"
#include "eval/cost_model.h"
#include "eval/tasks/task.h"
#include "tessera/model.h"

namespace tessera::eval {

/// Where a method replaces dense attention.
enum class EvaluationPhase : std::uint8_t { prefill, decode, both };
std::string_view name_of(EvaluationPhase phase);
/// Throws Error that lists the names.
EvaluationPhase phase_from_name(std::string_view name);

/// Options of a session that runs the method in that phase and dense attention in the other. Throws Error for a method
/// that does not support it.
SessionOptions session_options_of(const std::string& spec, EvaluationPhase phase);

/// What is being measured: a task at a length, or a text (task "perplexity").
struct EvaluationPoint {
  std::string task;
  std::int64_t length = 0;
  std::string method;  ///< SPEC
  std::int64_t sample = 0;
  friend bool operator==(const EvaluationPoint&, const EvaluationPoint&) = default;
};

/// One answer.
struct EvaluationResult {
  EvaluationPoint point;
  double score = 0;                 ///< 0 to 1; of perplexity: bits per byte
  std::optional<double> gold_bits;  ///< mean bits per token of the gold text, where it was fed
  double density = 0;               ///< of prefill
  double decode_density = 0;        ///< of decoding, if the session counts it
  double prefill_ms = 0;
  double decode_ms = 0;
  std::int64_t prompt_tokens = 0;
  std::int64_t decode_tokens = 0;
  double kept_tokens = 0;  ///< in the cache at the end, mean over layers and heads
  double cache_mb = 0;
  std::string answer;
};

/// Asks one question. The session is reset before it. Throws Error when the prompt exceeds the session.
EvaluationResult ask(Session& session, const TaskInfo& task, const TaskSample& sample);

/// Bits per byte of the first `tokens` tokens of the text (sample 0), or of the following stretches of that length;
/// with `decoded` > 0 of the last so many of them, which are decoded one by one behind a prompt of the others. Throws
/// Error when the text ends before.
EvaluationResult measure_perplexity(Session& session, std::string_view text, std::int64_t tokens, std::int64_t decoded,
                                    std::int64_t sample);
/// How many tokens of a stretch are decoded: none where the method works in prefill only, else a quarter, at most 256.
std::int64_t decoded_tokens(EvaluationPhase phase, std::int64_t tokens);

/// All samples of a (task, length, method) together.
struct EvaluationSummary {
  std::string task;
  std::int64_t length = 0;
  std::string method;
  std::int64_t samples = 0;
  Estimate score = {};
  /// Score minus that of dense attention on the same samples; absent without them.
  std::optional<Estimate> difference = {};
  std::optional<double> gold_bits = {};
  double density = 0;
  double decode_density = 0;
  double prefill_ms = 0;  ///< medians
  double decode_ms = 0;
  double cache_mb = 0;
  double prompt_tokens = 0;  ///< means
  double decode_tokens = 0;
  double kept_tokens = 0;
};

/// What the cost models say that the times of a summary are.
struct PredictedTimes {
  double prefill_ms = 0;  ///< prefill at the measured density
  double decode_ms = 0;  ///< every step reads the weights and the measured share of the tokens, or what is kept of them
};
/// What the predictions need beside a summary.
struct EvaluationCosts {
  double bytes_per_element = 4;  ///< of the cache
  double weight_bytes = 0;       ///< that a decoded token reads (Model::decoded_weight_bytes)
  MachineRates rates;
};
/// The method of the summary may search blocks (MethodInfo::search_block) when it decodes. Nothing for results of a log
/// without counts of tokens.
std::optional<PredictedTimes> predicted_times(const EvaluationSummary& summary, const ModelConfig& config,
                                              const EvaluationCosts& costs, EvaluationPhase phase);

/// In the order in which tasks, lengths and methods first appear.
std::vector<EvaluationSummary> summarise(const std::vector<EvaluationResult>& results);

}  // namespace tessera::eval
