// `tessera tune moa`: an elastic span per layer and kv head: profile (span_profile.h), program and Pareto front
// (span_search.h), validation by the loss of the model at a length that was not searched.
//
// Differs from the authors' code: the 0/1 program is solved by our own branch and bound; --length sets all lengths in
// the proportions of the paper, 2K : 4K : 8K searched, 12K validated, 16K the longest at which a rule must fit.
#include <algorithm>

#include "core/error.h"
#include "methods/head_table.h"
#include "tune/prompts.h"
#include "tune/span_profile.h"
#include "tune/span_search.h"
#include "tune/tuner.h"

namespace tessera::tune {

namespace {

struct MoaTuner {
  struct Params {
    double density = 0.5;
    double least_share = 0.9;
    std::int64_t rules_per_layer = 2;
    std::int64_t intervals = 4;
    std::int64_t alpha_step = 0;
    std::int64_t samples = 2;
    std::int64_t response = 32;
    std::int64_t passkeys = 10;
    std::int64_t words = 8;
    PasskeyStyle style = PasskeyStyle::words;
    std::int64_t most_nodes = 200000;
    std::int64_t seed = 0;
    void visit(ParameterList& v) {
      v("density", density, 1e-3, 1, "bound of the mean density over heads, at every length");
      v("least_share", least_share, 0, 1, "the mean density is at least this share of the bound");
      v("rules_per_layer", rules_per_layer, 1, 64, "different spans in a layer at most");
      v("intervals", intervals, 1, 16, "cuts of the range of each length's loss on the way to the Pareto front");
      v("alpha_step", alpha_step, 0, kMostTokens,
        "step of the candidates' alpha; 0: an eighth of --length (1024 of 8K)");
      v("samples", samples, 1, 1024, "prompts per length");
      v("response", response, 1, 4096, "tokens that the dense model answers, on which the loss is taken");
      v("passkeys", passkeys, 1, 1000, "passkeys in a prompt, fewer where they do not fit; the first is asked for");
      v("words", words, 1, 1000, "words of a passkey");
      v("style", style, {"words", "digits"}, "of passkeys: spelling words, or five digits behind PK#");
      v("most_nodes", most_nodes, 1, kMostTokens,
        "nodes of one branch and bound; beyond them the best so far is taken");
      v("seed", seed, 0, kMostTokens, "of the prompts");
    }
  };
  static TunerEntry info() {
    return {
        .method = "moa",
        .summary = "elastic spans per head, by the influence of attention on the loss and a program under a density",
        .paper = "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, arXiv:2406.14909",
        .parameters = {},
        .tune = {}};
  }

  /// A question of `length` tokens with the answer that the dense model gives.
  static Prompt answered_prompt(const TuningTask& task, const Params& params, std::int64_t length, std::uint64_t seed) {
    const PasskeyOptions options{
        .length = length - params.response, .passkeys = params.passkeys, .words = params.words, .style = params.style};
    Prompt prompt = passkey_prompt(*task.model, task.text, options, seed, false);
    SessionOptions session_options;
    session_options.run = task.run;
    session_options.cancelled = task.cancelled;
    Session session(*task.model, session_options);
    GenerateOptions generate_options;
    generate_options.max_tokens = params.response;
    generate_options.stop_at_eos = false;
    const Generation answer = generate(session, prompt.tokens, generate_options);
    const std::int64_t first = std::ssize(prompt.tokens);
    prompt.tokens.insert(prompt.tokens.end(), answer.tokens.begin(), answer.tokens.end());
    prompt.answers.assign(1, {first, std::ssize(prompt.tokens)});
    return prompt;
  }

  /// Of every (layer, kv head) at one length.
  static std::vector<std::vector<double>> influence_at(const TuningTask& task, const Params& params,
                                                       model::DifferentiableDecoder& decoder, std::int64_t length,
                                                       const std::function<void()>& done) {
    const ModelConfig& config = task.model->config();
    const auto q_heads = static_cast<std::size_t>(config.q_heads);
    std::vector<std::vector<std::vector<double>>> samples(static_cast<std::size_t>(config.layers) * q_heads);
    for (std::int64_t i = 0; i < params.samples; ++i) {
      const auto seed = static_cast<std::uint64_t>(params.seed + i);
      const Prompt prompt = answered_prompt(task, params, length, seed);
      auto influence = profile_influence(decoder, config.q_heads, prompt, task.run);
      for (std::size_t head = 0; head < samples.size(); ++head) samples[head].push_back(std::move(influence[head]));
      done();
    }
    const std::size_t group = q_heads / static_cast<std::size_t>(config.kv_heads);
    std::vector<std::vector<double>> of_groups;
    for (std::size_t head = 0; head < samples.size(); head += group) {
      of_groups.push_back(influence_of_group(std::span(samples).subspan(head, group)));
    }
    return of_groups;
  }

  static TuningResult tune(const TuningTask& task, const Params& params) {
    const ModelConfig& config = task.model->config();
    const std::int64_t length = task.length > 0 ? task.length : std::min<std::int64_t>(8192, config.max_positions);
    const std::vector<std::int64_t> lengths{length / 4, length / 2, length};
    const std::int64_t validated = std::min(length * 3 / 2, config.max_positions);
    require(lengths[0] >= 2 * kSpanBlock,
            "tune moa: length is {}; expected at least {}: a quarter must hold two blocks", length, 8 * kSpanBlock);
    std::int64_t alpha_step = params.alpha_step;
    if (alpha_step == 0) alpha_step = std::max(kSpanBlock, length / 8 / kSpanBlock * kSpanBlock);
    const std::vector<ElasticSpan> rules = candidate_rules(lengths.front(), lengths.back(), 2 * length, alpha_step);

    model::DifferentiableDecoder decoder(*task.model, task.run.threads);
    SpanProgram program;
    program.rules = std::ssize(rules);
    program.most_density = params.density;
    program.least_share = params.least_share;
    program.rules_per_layer = params.rules_per_layer;
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
      program.layer_of_head.insert(program.layer_of_head.end(), static_cast<std::size_t>(config.kv_heads), layer);
    }
    double passes = 0;
    task.step("profile", 0, 1);
    for (const std::int64_t tokens : lengths) {
      const auto done = [&] {
        task.step("profile", ++passes, static_cast<double>(params.samples * std::ssize(lengths)));
      };
      auto& loss = program.loss.emplace_back();
      for (const auto& influence : influence_at(task, params, decoder, tokens, done)) {
        for (const ElasticSpan& rule : rules) loss.push_back(loss_of_rule(rule, tokens, influence));
      }
      auto& density = program.density.emplace_back();
      for (const ElasticSpan& rule : rules) density.push_back(density_of_rule(rule, tokens));
    }
    const std::vector<SpanChoice> front = pareto_front(program, params.intervals, params.most_nodes);
    require(!front.empty(),
            "tune moa: no choice of spans has a mean density between {} and {} at {} tokens; raise density, lower "
            "least_share, or give a smaller alpha_step than {}",
            params.least_share * params.density, params.density, fmt::join(lengths, ", "), alpha_step);

    std::vector<double> losses(front.size());
    double dense_loss = 0;
    const auto dense = make_method("dense");
    for (std::int64_t i = 0; i < params.samples; ++i) {
      // Prompts that the search has not seen.
      const auto seed = static_cast<std::uint64_t>(params.seed + params.samples + i);
      const Prompt prompt = answered_prompt(task, params, validated, seed);
      const auto samples = static_cast<double>(params.samples);
      dense_loss += answer_loss(decoder, prompt, *dense, task.run) / samples;
      for (std::size_t choice = 0; choice < front.size(); ++choice) {
        const auto method = method_of(head_table_of(span_table(program, rules, front[choice])));
        losses[choice] += answer_loss(decoder, prompt, *method, task.run) / samples;
        task.step("validation",
                  static_cast<double>(i) + static_cast<double>(choice + 1) / static_cast<double>(front.size()),
                  samples);
      }
    }
    const auto best = static_cast<std::size_t>(std::min_element(losses.begin(), losses.end()) - losses.begin());
    const HeadTable table = head_table_of(span_table(program, rules, front[best]));
    const bool proven = std::all_of(front.begin(), front.end(), [](const SpanChoice& choice) { return choice.proven; });
    return {.parameters = {{"config", head_table_json(table)}},
            .report = {{"lengths", lengths},
                       {"validated_length", validated},
                       {"rules", rules.size()},
                       {"alpha_step", alpha_step},
                       {"choices", front.size()},
                       {"proven", proven},
                       {"density", front[best].density},
                       {"influence", front[best].loss},
                       {"validation_losses", losses},
                       {"validation_loss", losses[best]},
                       {"dense_loss", dense_loss}}};
  }

  static std::unique_ptr<const Method> method_of(const HeadTable& table) {
    return find_method("moa").make(Json{{"config", head_table_json(table)}}.dump());
  }
};

}  // namespace

TunerEntry moa_tuner() {
  return tuner_entry<MoaTuner>();
}

}  // namespace tessera::tune
