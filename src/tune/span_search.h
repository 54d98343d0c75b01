// The offline search of MoA (Mixture of Sparse Attention, arXiv:2406.14909): which elastic span each head gets.
//
// Influence of keys on the loss -> loss of each candidate rule at each length -> a 0/1 program with bounds on density
// -> the Pareto front over lengths -> the choice that does best at a length that was not searched.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "methods/elastic_spans.h"
#include "tessera/attention.h"

namespace tessera::tune {

/// Influence of masking keys on a loss, by blocks of kSpanBlock: [blocks][blocks], key blocks of a query block up to
/// its own. First order in G = dL/dA, with the row renormalised after the masking:
/// E_ij = A_ij / (1 - A_ij) * (sum_n G_in A_in - G_ij), summed over the pairs of a block; a row of one key has
/// -G_ij A_ij. `grad_o` is dL/dO [B, Hq, Nq, Dv]. Throws Error unless the problem is causal, one sequence and square.
std::vector<double> block_influence(const Problem& problem, const AttentionInputs& inputs, const TensorView& grad_o,
                                    std::int64_t q_head);

/// Influence of a kv head from that of its query heads, [query head][sample]: the mean over samples, then its absolute
/// value, then the largest of the group.
std::vector<double> influence_of_group(std::span<const std::vector<std::vector<double>>> heads);

/// Candidate rules: alpha in steps (published: 1024) from -shortest to +longest, beta in 9 steps from 0 to 1; those
/// whose span is positive at the shortest length and no longer than the input at `longest` and `extended`.
std::vector<ElasticSpan> candidate_rules(std::int64_t shortest, std::int64_t longest, std::int64_t extended,
                                         std::int64_t alpha_step = 1024);

/// Sum of the influence of the blocks that a rule leaves out; `influence` as influence_of_group() gives it.
double loss_of_rule(const ElasticSpan& rule, std::int64_t length, std::span<const double> influence);
/// Blocks of the longest row that a rule keeps, as a share of the row.
double density_of_rule(const ElasticSpan& rule, std::int64_t length);

/// One rule per head. Heads are numbered layer by layer.
struct SpanProgram {
  std::vector<std::int64_t> layer_of_head;  ///< ascending
  std::int64_t rules = 0;
  std::vector<std::vector<double>> loss;     ///< [length][head * rules + rule]
  std::vector<std::vector<double>> density;  ///< [length][rule]
  double most_density = 0.5;                 ///< bound of the mean over heads at every length
  double least_share = 0.9;                  ///< the mean is at least this share of the bound
  std::int64_t rules_per_layer = 2;
};

struct SpanChoice {
  std::vector<std::int64_t> rule_of_head;
  std::vector<double> loss;     ///< at each length, summed over heads
  std::vector<double> density;  ///< at each length, mean over heads
  bool proven = true;           ///< false: the search stopped at its limit before it had seen every alternative
};

/// The choice with the least loss at length `primary` whose losses at the others stay within `most_loss` (empty: any).
/// Nothing when there is none. Branch and bound under a Lagrangian bound; exact unless it meets `most_nodes`.
std::optional<SpanChoice> solve(const SpanProgram& program, std::size_t primary, std::span<const double> most_loss = {},
                                std::int64_t most_nodes = 2000000);

/// The Pareto front over the lengths by the epsilon-constraint method: each objective in turn is solved with the others
/// held below every combination of `intervals` cuts of their ranges.
std::vector<SpanChoice> pareto_front(const SpanProgram& program, std::int64_t intervals = 4,
                                     std::int64_t most_nodes = 200000);

/// Index of the choice with the least loss by [head * rules + rule] losses at another length.
std::size_t best_at(std::span<const SpanChoice> choices, std::span<const double> loss, std::int64_t rules);

/// The choice as the table that the method reads.
SpanTable span_table(const SpanProgram& program, std::span<const ElasticSpan> rules, const SpanChoice& choice);

}  // namespace tessera::tune
