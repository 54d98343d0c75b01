#include "eval/model_evaluation.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <utility>

#include "core/error.h"
#include "io/json.h"
#include "tessera/method.h"

namespace tessera::eval {

namespace {

constexpr std::array<std::string_view, 3> kPhases{"prefill", "decode", "both"};

std::int32_t most_likely(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

/// -log2 of the token's probability.
double bits_of(std::span<const float> logits, std::int32_t token) {
  const double maximum = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - maximum);
  return (std::log(sum) + maximum - static_cast<double>(logits[static_cast<std::size_t>(token)])) / std::log(2.0);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 != 0 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

/// Feeds the gold text and counts the labelled tokens that the model would have said itself. A token counts when its
/// bytes begin inside a label.
void feed_gold(Session& session, const TaskSample& sample, std::span<const float> logits, EvaluationResult& result) {
  const Model& model = session.model();
  const std::string& gold = sample.gold.front();
  const std::vector<std::int32_t> tokens = model.encode(gold, /*with_bos=*/false);
  std::size_t at = 0;
  double right = 0;
  double bits = 0;
  double counted = 0;
  for (const std::int32_t token : tokens) {
    const bool labelled =
        sample.labels.empty() || std::any_of(sample.labels.begin(), sample.labels.end(),
                                             [&](const auto& label) { return at >= label.first && at < label.second; });
    const std::int32_t said = most_likely(logits);
    result.answer += model.decode(std::span(&said, 1));
    if (labelled) {
      right += said == token ? 1 : 0;
      bits += bits_of(logits, token);
      ++counted;
    }
    at += model.decode(std::span(&token, 1)).size();
    logits = session.decode(token);
  }
  result.score = counted > 0 ? right / counted : 0;
  result.gold_bits = counted > 0 ? bits / counted : 0;
}

/// Tokens per representative of a method's search when it decodes; 0: it does not search.
double search_block_of(const std::string& spec) {
  const std::unique_ptr<const Method> method = make_method(spec);
  const std::string& parameter = method->info().search_block;
  return parameter.empty() ? 0 : get<double>(parse_json(method->parameters(), spec), parameter, spec);
}

void note_session(const Session& session, EvaluationResult& result) {
  const SessionStatistics& statistics = session.statistics();
  result.density = statistics.density();
  result.decode_density = statistics.decode_density();
  result.prefill_ms = statistics.prefill_ms;
  result.decode_ms = statistics.decode_ms;
  result.prompt_tokens = statistics.prefill_tokens;
  result.decode_tokens = statistics.decode_tokens;
  result.kept_tokens = session.cache_tokens_kept();
  result.cache_mb = static_cast<double>(session.cache_bytes()) / 1e6;
}

}  // namespace

std::string_view name_of(EvaluationPhase phase) {
  return kPhases[static_cast<std::size_t>(phase)];
}

EvaluationPhase phase_from_name(std::string_view name) {
  const auto found = std::find(kPhases.begin(), kPhases.end(), name);
  require(found != kPhases.end(), "unknown phase '{}'; expected prefill, decode or both", name);
  return static_cast<EvaluationPhase>(found - kPhases.begin());
}

SessionOptions session_options_of(const std::string& spec, EvaluationPhase phase) {
  SessionOptions options;
  const std::shared_ptr<const Method> method = make_method(spec);
  const std::shared_ptr<const Method> dense = make_method("dense");
  options.prefill = phase == EvaluationPhase::decode ? dense : method;
  options.decode = phase == EvaluationPhase::prefill ? dense : method;
  const Phases phases = method->info().phases;
  require(phase == EvaluationPhase::decode || phases.prefill, "method '{}' does not support prefill",
          method->info().name);
  require(phase == EvaluationPhase::prefill || phases.decode, "method '{}' does not support decode",
          method->info().name);
  return options;
}

EvaluationResult ask(Session& session, const TaskInfo& task, const TaskSample& sample) {
  session.reset();
  const Model& model = session.model();
  const std::vector<std::int32_t> prompt = model.encode(sample.prompt);
  EvaluationResult result;
  if (task.scoring == Scoring::teacher_forced) {
    const std::span<const float> logits = session.prefill(prompt);
    feed_gold(session, sample, logits, result);
  } else {
    GenerateOptions options;
    options.max_tokens = task.answer_tokens;
    result.answer = generate(session, prompt, options).text;
    result.score = score_answer(task, sample, result.answer);
  }
  note_session(session, result);
  return result;
}

std::int64_t decoded_tokens(EvaluationPhase phase, std::int64_t tokens) {
  constexpr std::int64_t most = 256;
  return phase == EvaluationPhase::prefill ? 0 : std::clamp<std::int64_t>(tokens / 4, 1, most);
}

EvaluationResult measure_perplexity(Session& session, std::string_view text, std::int64_t tokens, std::int64_t decoded,
                                    std::int64_t sample) {
  session.reset();
  const Model& model = session.model();
  const std::vector<std::int32_t> all = model.encode(text);
  const std::int64_t first = sample * tokens;
  require(first + tokens <= std::ssize(all), "the text has {} tokens; sample {} of {} tokens needs {}", all.size(),
          sample, tokens, first + tokens);
  require(decoded >= 0 && decoded < tokens, "{} of {} tokens are to be decoded; expected fewer than all", decoded,
          tokens);
  const auto stretch = std::span(all).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(tokens));
  EvaluationResult result;
  if (decoded == 0) {
    GenerateOptions options;
    options.max_tokens = 0;
    options.bits_per_byte = true;
    result.score = generate(session, stretch, options).bits_per_byte.value_or(0);
  } else {
    double bits = 0;
    std::size_t bytes = 0;
    std::span<const float> logits = session.prefill(stretch.first(static_cast<std::size_t>(tokens - decoded)));
    for (const std::int32_t token : stretch.last(static_cast<std::size_t>(decoded))) {
      bits += bits_of(logits, token);
      bytes += model.decode(std::span(&token, 1)).size();
      logits = session.decode(token);
    }
    result.score = bytes > 0 ? bits / static_cast<double>(bytes) : 0;
  }
  note_session(session, result);
  return result;
}

std::optional<PredictedTimes> predicted_times(const EvaluationSummary& summary, const ModelConfig& config,
                                              const EvaluationCosts& costs, EvaluationPhase phase) {
  if (summary.kept_tokens <= 0) return {};
  const Decoding decoding{.context = summary.prompt_tokens,
                          .generated = summary.decode_tokens,
                          .bytes_per_element = costs.bytes_per_element,
                          .weight_bytes = costs.weight_bytes};
  // Caches that evict, and recurrences, are known by what they hold at the end.
  const double selected = summary.decode_density > 0 ? summary.decode_density * dense_tokens(decoding)
                                                     : top_k_tokens(decoding, summary.kept_tokens);
  const double block = phase == EvaluationPhase::prefill ? 0 : search_block_of(summary.method);
  const Cost prefill = prefill_cost(config, summary.prompt_tokens, summary.density, costs.bytes_per_element);
  return PredictedTimes{prefill.milliseconds(costs.rates),
                        decode_cost_selected(config, decoding, selected, block).milliseconds(costs.rates)};
}

std::vector<EvaluationSummary> summarise(const std::vector<EvaluationResult>& results) {
  std::vector<EvaluationSummary> summaries;
  const auto same = [](const EvaluationSummary& summary, const EvaluationPoint& point) {
    return summary.task == point.task && summary.length == point.length && summary.method == point.method;
  };
  for (const EvaluationResult& result : results) {
    const bool known = std::any_of(summaries.begin(), summaries.end(),
                                   [&](const EvaluationSummary& summary) { return same(summary, result.point); });
    if (!known)
      summaries.push_back({.task = result.point.task, .length = result.point.length, .method = result.point.method});
  }
  for (EvaluationSummary& summary : summaries) {
    std::vector<double> scores;
    std::vector<double> differences;
    std::vector<double> prefill;
    std::vector<double> decode;
    double bits = 0;
    double with_bits = 0;
    for (const EvaluationResult& result : results) {
      if (!same(summary, result.point)) continue;
      scores.push_back(result.score);
      prefill.push_back(result.prefill_ms);
      decode.push_back(result.decode_ms);
      summary.density += result.density;
      summary.decode_density += result.decode_density;
      summary.prompt_tokens += static_cast<double>(result.prompt_tokens);
      summary.decode_tokens += static_cast<double>(result.decode_tokens);
      summary.kept_tokens += result.kept_tokens;
      summary.cache_mb = std::max(summary.cache_mb, result.cache_mb);
      bits += result.gold_bits.value_or(0);
      with_bits += result.gold_bits ? 1 : 0;
      EvaluationPoint dense = result.point;
      dense.method = "dense";
      const auto pair = std::find_if(results.begin(), results.end(),
                                     [&](const EvaluationResult& other) { return other.point == dense; });
      if (pair != results.end()) differences.push_back(result.score - pair->score);
    }
    summary.samples = static_cast<std::int64_t>(scores.size());
    summary.score = bootstrap_mean(scores);
    if (!differences.empty()) summary.difference = bootstrap_mean(differences);
    if (with_bits > 0) summary.gold_bits = bits / with_bits;
    const auto count = static_cast<double>(scores.size());
    for (double* sum : {&summary.density, &summary.decode_density, &summary.prompt_tokens, &summary.decode_tokens,
                        &summary.kept_tokens})
      *sum /= count;
    summary.prefill_ms = median(prefill);
    summary.decode_ms = median(decode);
  }
  return summaries;
}

}  // namespace tessera::eval
