#include "tune/span_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/error.h"
#include "score/row_access.h"

namespace tessera::tune {

namespace {

constexpr std::int64_t kBetaSteps = 8;
/// Comparisons of sums that differ by rounding only.
constexpr double kSlack = 1e-9;

/// A bound on a sum over heads: sum of weight(head, rule) <= limit.
struct Constraint {
  std::vector<double> weight;  // [head * rules + rule]
  double limit = 0;
};

/// Depth-first branch and bound over heads; children in the order of their cost under the Lagrangian.
class Solver {
 public:
  Solver(const SpanProgram& program, std::size_t primary, std::span<const double> most_loss, std::int64_t most_nodes)
      : program_(program), heads_(program.layer_of_head.size()), cost_(program.loss[primary]), most_nodes_(most_nodes) {
    const auto rules = static_cast<std::size_t>(program.rules);
    const auto count = static_cast<double>(heads_);
    for (const std::vector<double>& density : program.density) {
      Constraint upper{{}, program.most_density * count + kSlack};
      Constraint lower{{}, -program.least_share * program.most_density * count + kSlack};
      for (std::size_t i = 0; i < heads_ * rules; ++i) {
        upper.weight.push_back(density[i % rules]);
        lower.weight.push_back(-density[i % rules]);
      }
      constraints_.push_back(std::move(upper));
      constraints_.push_back(std::move(lower));
    }
    for (std::size_t length = 0; length < most_loss.size(); ++length) {
      if (length == primary || !std::isfinite(most_loss[length])) continue;
      constraints_.push_back({program.loss[length], most_loss[length] + kSlack});
    }
    multipliers_.assign(constraints_.size(), 0.0);
    set_multipliers();
    prepare();
  }

  std::optional<std::vector<std::int64_t>> run() {
    find_incumbent();
    chosen_.assign(heads_, 0);
    used_.assign(constraints_.size(), 0.0);
    visit(0, 0);
    if (best_.empty() && heads_ > 0) return std::nullopt;
    return best_;
  }
  bool proven() const { return nodes_ < most_nodes_; }

 private:
  /// Cost of an assignment under the multipliers.
  double reduced(std::size_t i) const {
    double cost = cost_[i];
    for (std::size_t c = 0; c < constraints_.size(); ++c) cost += multipliers_[c] * constraints_[c].weight[i];
    return cost;
  }

  /// Subgradient ascent on the Lagrangian bound; the rules-per-layer limit is relaxed in it.
  void set_multipliers() {
    constexpr int steps = 300;
    const auto rules = static_cast<std::size_t>(program_.rules);
    std::vector<double> best = multipliers_;
    double highest = -std::numeric_limits<double>::infinity();
    double range = 0;
    for (const double cost : cost_) range = std::max(range, std::abs(cost));
    for (int step = 0; step < steps; ++step) {
      double bound = 0;
      std::vector<double> excess;
      for (const Constraint& constraint : constraints_) excess.push_back(-constraint.limit);
      for (std::size_t c = 0; c < constraints_.size(); ++c) bound -= multipliers_[c] * constraints_[c].limit;
      for (std::size_t head = 0; head < heads_; ++head) {
        std::size_t least = head * rules;
        double cost = reduced(least);
        for (std::size_t i = least + 1; i < (head + 1) * rules; ++i) {
          const double other = reduced(i);
          if (other < cost) {
            cost = other;
            least = i;
          }
        }
        bound += cost;
        for (std::size_t c = 0; c < constraints_.size(); ++c) excess[c] += constraints_[c].weight[least];
      }
      if (bound > highest) {
        highest = bound;
        best = multipliers_;
      }
      const double rate = (range + kSlack) / (1 + step);
      for (std::size_t c = 0; c < constraints_.size(); ++c) {
        double scale = kSlack;
        for (const double weight : constraints_[c].weight) scale = std::max(scale, std::abs(weight));
        multipliers_[c] =
            std::max(0.0, multipliers_[c] + rate * excess[c] / (scale * scale * static_cast<double>(heads_)));
      }
    }
    multipliers_ = best;
  }

  void prepare() {
    const auto rules = static_cast<std::size_t>(program_.rules);
    for (const Constraint& constraint : constraints_) {
      double largest = kSlack;
      for (const double weight : constraint.weight) largest = std::max(largest, std::abs(weight));
      largest_weight_.push_back(largest);
    }
    for (std::size_t i = 0; i < heads_ * rules; ++i) reduced_.push_back(reduced(i));
    order_.resize(heads_);
    least_reduced_.assign(heads_ + 1, 0.0);
    least_cost_.assign(heads_ + 1, 0.0);
    least_weight_.assign(constraints_.size(), std::vector<double>(heads_ + 1, 0.0));
    for (std::size_t head = heads_; head-- > 0;) {
      std::vector<std::int64_t>& order = order_[head];
      for (std::size_t r = 0; r < rules; ++r) order.push_back(static_cast<std::int64_t>(r));
      std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        return reduced_[head * rules + static_cast<std::size_t>(a)] <
               reduced_[head * rules + static_cast<std::size_t>(b)];
      });
      const auto first = static_cast<std::ptrdiff_t>(head * rules);
      const auto last = static_cast<std::ptrdiff_t>((head + 1) * rules);
      least_reduced_[head] =
          least_reduced_[head + 1] + *std::min_element(reduced_.begin() + first, reduced_.begin() + last);
      least_cost_[head] = least_cost_[head + 1] + *std::min_element(cost_.begin() + first, cost_.begin() + last);
      for (std::size_t c = 0; c < constraints_.size(); ++c) {
        const std::vector<double>& weight = constraints_[c].weight;
        least_weight_[c][head] =
            least_weight_[c][head + 1] + *std::min_element(weight.begin() + first, weight.begin() + last);
      }
    }
  }

  std::size_t index(std::size_t head, std::int64_t rule) const {
    return head * static_cast<std::size_t>(program_.rules) + static_cast<std::size_t>(rule);
  }

  /// How far an assignment is beyond its limits, each in units of its largest weight.
  double violation(std::span<const double> used) const {
    double sum = 0;
    for (std::size_t c = 0; c < constraints_.size(); ++c) {
      sum += std::max(0.0, used[c] - constraints_[c].limit) / largest_weight_[c];
    }
    return sum;
  }

  /// Whether a head may change to a rule while all others of its layer keep theirs.
  bool may_change(std::size_t head, std::int64_t rule) const {
    std::vector<std::int64_t> used{rule};
    for (std::size_t other = 0; other < heads_; ++other) {
      if (other == head || program_.layer_of_head[other] != program_.layer_of_head[head]) continue;
      if (std::find(used.begin(), used.end(), chosen_[other]) == used.end()) used.push_back(chosen_[other]);
    }
    return static_cast<std::int64_t>(used.size()) <= program_.rules_per_layer;
  }

  /// The cheapest one or two rules of every layer under the multipliers, then single changes: first those that bring
  /// the sums inside their limits, then those that lower the cost there. A start for programs too large to exhaust.
  void find_incumbent() {
    chosen_.assign(heads_, 0);
    for (std::size_t begin = 0; begin < heads_;) {
      std::size_t end = begin;
      while (end < heads_ && program_.layer_of_head[end] == program_.layer_of_head[begin]) ++end;
      choose_pair(begin, end);
      begin = end;
    }
    used_.assign(constraints_.size(), 0.0);
    double cost = 0;
    for (std::size_t head = 0; head < heads_; ++head) {
      cost += cost_[index(head, chosen_[head])];
      for (std::size_t c = 0; c < constraints_.size(); ++c) {
        used_[c] += constraints_[c].weight[index(head, chosen_[head])];
      }
    }
    const std::size_t most_changes = 20 * heads_;
    for (std::size_t change = 0; change < most_changes && improve(cost); ++change) {
    }
    if (violation(used_) > 0) return;
    best_ = chosen_;
    least_ = cost;
  }

  void choose_pair(std::size_t begin, std::size_t end) {
    double least = std::numeric_limits<double>::infinity();
    std::pair<std::int64_t, std::int64_t> pair{0, 0};
    for (std::int64_t a = 0; a < program_.rules; ++a) {
      for (std::int64_t b = a; b < (program_.rules_per_layer > 1 ? program_.rules : a + 1); ++b) {
        double sum = 0;
        for (std::size_t head = begin; head < end; ++head) {
          sum += std::min(reduced_[index(head, a)], reduced_[index(head, b)]);
        }
        if (sum < least) {
          least = sum;
          pair = {a, b};
        }
      }
    }
    for (std::size_t head = begin; head < end; ++head) {
      chosen_[head] =
          reduced_[index(head, pair.first)] <= reduced_[index(head, pair.second)] ? pair.first : pair.second;
    }
  }

  /// Makes the best single change: least violation, then least cost. False where none helps.
  bool improve(double& cost) {
    const double violated = violation(used_);
    double least_violation = violated;
    double least_cost = cost;
    std::size_t best_head = heads_;
    std::int64_t best_rule = 0;
    std::vector<double> used(constraints_.size());
    for (std::size_t head = 0; head < heads_; ++head) {
      const std::size_t from = index(head, chosen_[head]);
      for (std::int64_t rule = 0; rule < program_.rules; ++rule) {
        if (rule == chosen_[head]) continue;
        const std::size_t to = index(head, rule);
        for (std::size_t c = 0; c < constraints_.size(); ++c) {
          used[c] = used_[c] + constraints_[c].weight[to] - constraints_[c].weight[from];
        }
        const double other_violation = violation(used);
        const double other_cost = cost + cost_[to] - cost_[from];
        const bool closer = other_violation < least_violation - kSlack;
        const bool cheaper = other_violation <= least_violation && other_cost < least_cost - kSlack;
        if (!closer && !cheaper) continue;
        if (!may_change(head, rule)) continue;
        least_violation = other_violation;
        least_cost = other_cost;
        best_head = head;
        best_rule = rule;
      }
    }
    if (best_head == heads_) return false;
    for (std::size_t c = 0; c < constraints_.size(); ++c) {
      used_[c] += constraints_[c].weight[index(best_head, best_rule)] -
                  constraints_[c].weight[index(best_head, chosen_[best_head])];
    }
    cost = least_cost;
    chosen_[best_head] = best_rule;
    return true;
  }

  bool may_use(std::size_t head, std::int64_t rule) const {
    std::vector<std::int64_t> used;
    for (std::size_t other = head; other-- > 0 && program_.layer_of_head[other] == program_.layer_of_head[head];) {
      if (chosen_[other] == rule) return true;
      if (std::find(used.begin(), used.end(), chosen_[other]) == used.end()) used.push_back(chosen_[other]);
    }
    return static_cast<std::int64_t>(used.size()) < program_.rules_per_layer;
  }

  void visit(std::size_t head, double cost) {  // NOLINT(misc-no-recursion): as deep as there are heads
    if (++nodes_ >= most_nodes_) return;
    for (std::size_t c = 0; c < constraints_.size(); ++c) {
      if (used_[c] + least_weight_[c][head] > constraints_[c].limit) return;
    }
    if (head == heads_) {
      if (cost < least_) {
        least_ = cost;
        best_ = chosen_;
      }
      return;
    }
    double bound = cost + least_reduced_[head];
    for (std::size_t c = 0; c < constraints_.size(); ++c) {
      bound += multipliers_[c] * (used_[c] - constraints_[c].limit);
    }
    if (std::max(bound, cost + least_cost_[head]) >= least_ - kSlack * std::abs(least_)) return;
    for (const std::int64_t rule : order_[head]) {
      if (!may_use(head, rule)) continue;
      const std::size_t i = head * static_cast<std::size_t>(program_.rules) + static_cast<std::size_t>(rule);
      chosen_[head] = rule;
      for (std::size_t c = 0; c < constraints_.size(); ++c) used_[c] += constraints_[c].weight[i];
      visit(head + 1, cost + cost_[i]);
      for (std::size_t c = 0; c < constraints_.size(); ++c) used_[c] -= constraints_[c].weight[i];
      if (nodes_ >= most_nodes_) return;
    }
  }

  const SpanProgram& program_;
  std::size_t heads_;
  const std::vector<double>& cost_;
  std::int64_t most_nodes_;
  std::int64_t nodes_ = 0;
  std::vector<Constraint> constraints_;
  std::vector<double> multipliers_;
  std::vector<double> largest_weight_;  // of each constraint
  std::vector<double> reduced_;
  std::vector<std::vector<std::int64_t>> order_;  // rules of a head by reduced cost
  std::vector<double> least_reduced_;             // of heads from here on
  std::vector<double> least_cost_;
  std::vector<std::vector<double>> least_weight_;  // [constraint][head]
  std::vector<std::int64_t> chosen_;
  std::vector<double> used_;
  double least_ = std::numeric_limits<double>::infinity();
  std::vector<std::int64_t> best_;
};

SpanChoice choice_of(const SpanProgram& program, std::vector<std::int64_t> rule_of_head, bool proven) {
  SpanChoice choice;
  for (std::size_t length = 0; length < program.loss.size(); ++length) {
    double loss = 0;
    double density = 0;
    for (std::size_t head = 0; head < rule_of_head.size(); ++head) {
      loss += program.loss[length][head * static_cast<std::size_t>(program.rules) +
                                   static_cast<std::size_t>(rule_of_head[head])];
      density += program.density[length][static_cast<std::size_t>(rule_of_head[head])];
    }
    choice.loss.push_back(loss);
    choice.density.push_back(density / static_cast<double>(std::max<std::size_t>(1, rule_of_head.size())));
  }
  choice.rule_of_head = std::move(rule_of_head);
  choice.proven = proven;
  return choice;
}

bool dominates(const SpanChoice& a, const SpanChoice& b) {
  bool better = false;
  for (std::size_t i = 0; i < a.loss.size(); ++i) {
    if (a.loss[i] > b.loss[i]) return false;
    better = better || a.loss[i] < b.loss[i];
  }
  return better;
}

void check(const SpanProgram& program) {
  require(!program.loss.empty() && program.loss.size() == program.density.size(),
          "loss has {} lengths, density {}; expected the same, one at least", program.loss.size(),
          program.density.size());
  require(program.rules >= 1, "rules is {}; expected 1 or more", program.rules);
  require(program.rules_per_layer >= 1, "rules_per_layer is {}; expected 1 or more", program.rules_per_layer);
  require(std::is_sorted(program.layer_of_head.begin(), program.layer_of_head.end()),
          "layer_of_head does not ascend; expected heads layer by layer");
  const std::size_t expected = program.layer_of_head.size() * static_cast<std::size_t>(program.rules);
  for (std::size_t i = 0; i < program.loss.size(); ++i) {
    require(program.loss[i].size() == expected, "loss of length {} has {} entries; expected heads x rules = {}", i,
            program.loss[i].size(), expected);
    require(program.density[i].size() == static_cast<std::size_t>(program.rules),
            "density of length {} has {} entries; expected {}", i, program.density[i].size(), program.rules);
  }
}

}  // namespace

std::vector<double> block_influence(const Problem& problem, const AttentionInputs& inputs, const TensorView& grad_o,
                                    std::int64_t q_head) {
  check_inputs(problem, inputs);
  require(problem.causal && problem.batch == 1 && !problem.variable_length() && problem.q_len == problem.kv_len &&
              problem.q_offset_of(0) == 0,
          "the influence needs one causal sequence with as many queries as keys; got batch {}, {} queries, {} keys",
          problem.batch, problem.q_len, problem.kv_len);
  require(grad_o.shape == std::array{problem.batch, problem.q_heads, problem.q_len, problem.value_dim},
          "grad_o has shape [{}]; expected that of the output", fmt::join(grad_o.shape, ", "));
  require(q_head >= 0 && q_head < problem.q_heads, "q_head is {}; expected 0 to {}", q_head, problem.q_heads - 1);
  const std::int64_t length = problem.q_len;
  const std::int64_t blocks = (length + kSpanBlock - 1) / kSpanBlock;
  const std::int64_t dim = problem.head_dim;
  const std::int64_t value_dim = problem.value_dim;
  std::vector<float> keys(static_cast<std::size_t>(length * dim));
  std::vector<float> values(static_cast<std::size_t>(length * value_dim));
  score::load_keys(problem, inputs, 0, q_head / problem.group(), 0, length, keys.data());
  score::load_values(problem, inputs, 0, q_head / problem.group(), 0, length, values.data());
  std::vector<float> query(static_cast<std::size_t>(dim));
  std::vector<double> sums(static_cast<std::size_t>(blocks * blocks), 0.0);
  std::vector<double> a(static_cast<std::size_t>(length));
  std::vector<double> g(static_cast<std::size_t>(length));
  for (std::int64_t i = 0; i < length; ++i) {
    score::load_queries(problem, inputs, 0, q_head, i, 1, query.data());
    double most = -std::numeric_limits<double>::infinity();
    for (std::int64_t j = 0; j <= i; ++j) {
      double dot = 0;
      for (std::int64_t d = 0; d < dim; ++d) dot += static_cast<double>(query[d]) * keys[j * dim + d];
      a[j] = dot * problem.softmax_scale();
      most = std::max(most, a[j]);
      g[j] = 0;
      for (std::int64_t d = 0; d < value_dim; ++d) {
        g[j] +=
            static_cast<double>(load_as_float(grad_o.row(0, q_head, i), grad_o.dtype, d)) * values[j * value_dim + d];
      }
    }
    double total = 0;
    for (std::int64_t j = 0; j <= i; ++j) total += a[j] = std::exp(a[j] - most);
    double mean = 0;
    for (std::int64_t j = 0; j <= i; ++j) {
      a[j] /= total;
      mean += g[j] * a[j];
    }
    for (std::int64_t j = 0; j <= i; ++j) {
      const double rest = 1 - a[j] + std::numeric_limits<double>::epsilon();
      sums[i / kSpanBlock * blocks + j / kSpanBlock] += i == 0 ? -g[j] * a[j] : a[j] / rest * (mean - g[j]);
    }
  }
  return sums;
}

std::vector<double> influence_of_group(std::span<const std::vector<std::vector<double>>> heads) {
  std::vector<double> group;
  for (const auto& samples : heads) {
    require(!samples.empty(), "a head has no samples; expected one or more");
    std::vector<double> mean(samples.front().size(), 0.0);
    for (const std::vector<double>& sample : samples) {
      require(sample.size() == mean.size(), "samples have {} and {} entries; expected one length", sample.size(),
              mean.size());
      for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += sample[i] / static_cast<double>(samples.size());
    }
    group.resize(mean.size(), 0.0);
    for (std::size_t i = 0; i < mean.size(); ++i) group[i] = std::max(group[i], std::abs(mean[i]));
  }
  return group;
}

std::vector<ElasticSpan> candidate_rules(std::int64_t shortest, std::int64_t longest, std::int64_t extended,
                                         std::int64_t alpha_step) {
  require(alpha_step >= 1, "alpha_step is {}; expected 1 or more", alpha_step);
  require(shortest >= 1 && shortest <= longest && longest <= extended,
          "lengths are {}, {}, {}; expected shortest <= longest <= extended", shortest, longest, extended);
  std::vector<ElasticSpan> rules;
  const auto span = [](const ElasticSpan& rule, std::int64_t n) {
    return rule.alpha + rule.beta * static_cast<double>(n);
  };
  for (std::int64_t alpha = -(shortest / alpha_step) * alpha_step; alpha <= longest; alpha += alpha_step) {
    for (std::int64_t step = 0; step <= kBetaSteps; ++step) {
      const ElasticSpan rule{static_cast<double>(alpha), static_cast<double>(step) / static_cast<double>(kBetaSteps)};
      const bool fits = span(rule, shortest) > 0 && span(rule, longest) <= static_cast<double>(longest) &&
                        span(rule, extended) <= static_cast<double>(extended);
      if (fits) rules.push_back(rule);
    }
  }
  return rules;
}

double loss_of_rule(const ElasticSpan& rule, std::int64_t length, std::span<const double> influence) {
  const std::int64_t blocks = (length + kSpanBlock - 1) / kSpanBlock;
  require(static_cast<std::int64_t>(influence.size()) == blocks * blocks,
          "influence has {} entries; length {} needs {} x {}", influence.size(), length, blocks, blocks);
  const std::int64_t band = span_blocks(rule, length) - 1;
  double loss = 0;
  for (std::int64_t i = 0; i < blocks; ++i) {
    for (std::int64_t j = 1; j <= i - band; ++j) loss += influence[i * blocks + j];
  }
  return loss;
}

double density_of_rule(const ElasticSpan& rule, std::int64_t length) {
  const std::int64_t blocks = std::max<std::int64_t>(1, (length + kSpanBlock - 1) / kSpanBlock);
  return static_cast<double>(span_blocks(rule, length)) / static_cast<double>(blocks);
}

std::optional<SpanChoice> solve(const SpanProgram& program, std::size_t primary, std::span<const double> most_loss,
                                std::int64_t most_nodes) {
  check(program);
  require(primary < program.loss.size(), "primary is {}; expected one of {} lengths", primary, program.loss.size());
  require(most_loss.empty() || most_loss.size() == program.loss.size(), "most_loss has {} entries; expected {}",
          most_loss.size(), program.loss.size());
  Solver solver(program, primary, most_loss, most_nodes);
  auto rules = solver.run();
  if (!rules) return std::nullopt;
  return choice_of(program, std::move(*rules), solver.proven());
}

std::vector<SpanChoice> pareto_front(const SpanProgram& program, std::int64_t intervals, std::int64_t most_nodes) {
  check(program);
  require(intervals >= 1, "intervals is {}; expected 1 or more", intervals);
  const std::size_t lengths = program.loss.size();
  std::vector<SpanChoice> found;
  for (std::size_t primary = 0; primary < lengths; ++primary) {
    auto alone = solve(program, primary, {}, most_nodes);
    if (!alone) return {};
    found.push_back(std::move(*alone));
  }
  std::vector<double> least(lengths, std::numeric_limits<double>::infinity());
  std::vector<double> most(lengths, 0.0);
  for (const SpanChoice& choice : found) {
    for (std::size_t i = 0; i < lengths; ++i) {
      least[i] = std::min(least[i], choice.loss[i]);
      most[i] = std::max(most[i], choice.loss[i]);
    }
  }
  std::int64_t combinations = 1;
  for (std::size_t i = 1; i < lengths; ++i) combinations *= intervals;
  for (std::size_t primary = 0; primary < lengths; ++primary) {
    for (std::int64_t combination = 0; combination < combinations; ++combination) {
      std::vector<double> limits(lengths, std::numeric_limits<double>::infinity());
      std::int64_t rest = combination;
      for (std::size_t i = 0; i < lengths; ++i) {
        if (i == primary) continue;
        const auto cut = static_cast<double>(rest % intervals);
        limits[i] = least[i] + (most[i] - least[i]) * cut / static_cast<double>(intervals);
        rest /= intervals;
      }
      auto choice = solve(program, primary, limits, most_nodes);
      if (choice) found.push_back(std::move(*choice));
    }
  }
  std::vector<SpanChoice> front;
  for (const SpanChoice& choice : found) {
    const bool beaten =
        std::any_of(found.begin(), found.end(), [&](const SpanChoice& o) { return dominates(o, choice); });
    const bool known =
        std::any_of(front.begin(), front.end(), [&](const SpanChoice& o) { return o.loss == choice.loss; });
    if (!beaten && !known) front.push_back(choice);
  }
  return front;
}

std::size_t best_at(std::span<const SpanChoice> choices, std::span<const double> loss, std::int64_t rules) {
  require(!choices.empty(), "no choices to compare");
  std::size_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < choices.size(); ++i) {
    const std::vector<std::int64_t>& rule_of_head = choices[i].rule_of_head;
    require(loss.size() == rule_of_head.size() * static_cast<std::size_t>(rules),
            "loss has {} entries; expected heads x rules = {}", loss.size(),
            rule_of_head.size() * static_cast<std::size_t>(rules));
    double sum = 0;
    for (std::size_t head = 0; head < rule_of_head.size(); ++head) {
      sum += loss[head * static_cast<std::size_t>(rules) + static_cast<std::size_t>(rule_of_head[head])];
    }
    if (sum < least) {
      least = sum;
      best = i;
    }
  }
  return best;
}

SpanTable span_table(const SpanProgram& program, std::span<const ElasticSpan> rules, const SpanChoice& choice) {
  SpanTable table;
  for (std::size_t head = 0; head < choice.rule_of_head.size(); ++head) {
    const auto layer = static_cast<std::size_t>(program.layer_of_head[head]);
    if (table.size() <= layer) table.resize(layer + 1);
    table[layer].push_back(rules[static_cast<std::size_t>(choice.rule_of_head[head])]);
  }
  return table;
}

}  // namespace tessera::tune
