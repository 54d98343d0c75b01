#include "view/attention_view.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <utility>

#include "core/error.h"
#include "core/parallel.h"
#include "eval/side_inputs.h"
#include "plan/geometry.h"
#include "score/tile_mass.h"
#include "tessera/eval.h"
#include "tessera/model.h"
#include "view/packed_bytes.h"
#include "view/plan_map.h"

namespace tessera {

namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr std::int64_t kCoarsestCells = 64;  // a side: enough for a thumbnail
constexpr double kSmallestMass = 1e-6;
constexpr double kStepsPerDecade = 20;

/// One level of the pyramid.
struct Level {
  std::int64_t cell = 1;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

std::vector<Level> levels_of(std::int64_t queries, std::int64_t keys, std::int64_t cell) {
  std::vector<Level> levels;
  do {
    levels.push_back({cell, ceil_div(queries, cell), ceil_div(keys, cell)});
    cell *= 2;
  } while (std::max(levels.back().rows, levels.back().columns) > kCoarsestCells);
  return levels;
}

/// Sums of 2 x 2 cells.
template <class Number>
std::vector<Number> halved(const std::vector<Number>& fine, const Level& from, const Level& to) {
  std::vector<Number> coarse(static_cast<std::size_t>(to.rows * to.columns), Number{});
  for (std::int64_t row = 0; row < from.rows; ++row) {
    for (std::int64_t column = 0; column < from.columns; ++column) {
      coarse[static_cast<std::size_t>(row / 2 * to.columns + column / 2)] +=
          fine[static_cast<std::size_t>(row * from.columns + column)];
    }
  }
  return coarse;
}

template <class Number>
std::string packed_array(const std::vector<Number>& values) {
  return packed(std::as_bytes(std::span(values)));
}

/// Share of the allowed pairs as a byte: 0 only for none, 255 only for all.
std::uint8_t byte_of_share(std::int64_t pairs, std::int64_t allowed) {
  if (pairs <= 0 || allowed <= 0) return 0;
  if (pairs >= allowed) return 255;
  return static_cast<std::uint8_t>(
      std::clamp(std::lround(255 * static_cast<double>(pairs) / static_cast<double>(allowed)), 1L, 254L));
}

/// The plan without what it reads from derived sources.
Plan exact_part(const Plan& plan) {
  Plan exact = plan;
  exact.entries.clear();
  exact.sources.resize(1);
  for (std::int64_t row = 0; row < plan.rows(); ++row) {
    exact.entry_begin[static_cast<std::size_t>(row)] = std::ssize(exact.entries);
    for (const PlanEntry& entry : plan.row(row)) {
      if (entry.source == 0) exact.entries.push_back(entry);
    }
  }
  exact.entry_begin.back() = std::ssize(exact.entries);
  return exact;
}

/// O and LSE of one call.
struct Result {
  std::vector<std::byte> o;
  std::vector<float> lse;
  std::array<std::int64_t, 4> shape;
  DType dtype;

  Result(const Problem& problem, DType of)
      : o(static_cast<std::size_t>(problem.q_heads * problem.q_len * problem.value_dim) * size_of(of)),
        lse(static_cast<std::size_t>(problem.q_heads * problem.q_len)),
        shape{1, problem.q_heads, problem.q_len, problem.value_dim},
        dtype(of) {}
  AttentionOutputs outputs() { return {mutable_view_of(o.data(), dtype, shape), lse}; }
  TensorView view() const { return view_of(o.data(), dtype, shape); }
};

}  // namespace

/// One method with what it carries from call to call, and what it did in the last one.
struct AttentionView::Runner {
  std::string spec;
  std::unique_ptr<const Method> method;
  std::unique_ptr<MethodState> state;
  Plan plan;
  PlanStatistics statistics;
  OutputError error;
  std::vector<float> mass;  ///< [q_heads, q_len] recovered softmax mass of each row
  bool corrects_rest = false;
};

AttentionView::AttentionView(const std::vector<std::string>& specs, AttentionViewOptions options)
    : options_(std::move(options)) {
  require(options_.most_cells >= 16 && options_.most_cells <= 4096, "{} cells a side; expected 16 to 4096",
          options_.most_cells);
  for (const std::string& spec : specs) {
    Runner runner;
    runner.spec = spec;
    runner.method = make_method(spec);
    const MethodInfo& info = runner.method->info();
    require(info.has_plan, "{}: a recurrence has no plan to draw; expected a method with a plan", info.name);
    require(info.phases.prefill, "{}: the method is for decoding; expected one for prefill", info.name);
    runners_.push_back(std::move(runner));
  }
}

AttentionView::~AttentionView() = default;

std::int64_t AttentionView::cell_of(std::int64_t queries, std::int64_t keys, std::int64_t most_cells) {
  std::int64_t cell = 1;
  while (std::max(queries, keys) > cell * most_cells) cell *= 2;
  return cell;
}

std::uint8_t AttentionView::byte_of_mass(double mass) {
  if (!(mass > kSmallestMass)) return 1;  // NaN too
  const double steps = kStepsPerDecade * std::log10(mass / kSmallestMass);
  return static_cast<std::uint8_t>(
      1 + std::min(std::lround(steps), std::lround(-std::log10(kSmallestMass) * kStepsPerDecade)));
}

void AttentionView::add(std::int64_t layer, const Problem& problem, const AttentionInputs& inputs,
                        std::span<const std::int64_t> heads) {
  check_inputs(problem, inputs);
  require(problem.batch == 1 && !problem.variable_length(), "a view of {} sequences at once; expected 1",
          problem.batch);
  if (cell_ == 0) {
    queries_ = problem.q_len;
    keys_ = problem.kv_len;
    offset_ = problem.q_offset_of(0);
    causal_ = problem.causal;
    cell_ = cell_of(queries_, keys_, options_.most_cells);
  }
  require(queries_ == problem.q_len && keys_ == problem.kv_len,
          "a view of {} queries and {} keys was given {} queries and {} keys", queries_, keys_, problem.q_len,
          problem.kv_len);
  for (const std::int64_t head : heads) {
    require(head >= 0 && head < problem.q_heads, "head {} of {} query heads", head, problem.q_heads);
  }
  const DType dtype = inputs.q.dtype;
  std::optional<Result> dense;
  if (!heads.empty()) {
    dense.emplace(problem, dtype);
    tessera::run(dense_plan(problem), inputs, dense->outputs(), options_.run);
  }
  for (Runner& runner : runners_) {
    if (options_.cancelled && options_.cancelled()) throw Cancelled("cancelled");
    if (!runner.state || !options_.follows_layers) runner.state = runner.method->new_state();
    if (heads.empty() && !runner.state) continue;
    AttentionInputs own = inputs;
    const eval::RandomSideInputs side(runner.method->info(), problem, options_.seed);
    side.add_to(own);
    PlanContext context;
    context.layer = layer;
    context.layers = std::max(options_.layers, layer + 1);
    context.state = runner.state.get();
    context.run = options_.run;
    Result result(problem, dtype);
    runner.method->attend(problem, own, result.outputs(), context, &runner.plan);
    if (heads.empty()) continue;
    runner.statistics = statistics(runner.plan);
    runner.error = compare_outputs(result.view(), result.lse, dense->view(), dense->lse);
    // The learned branch of SLA adds to what its softmax leaves out.
    runner.corrects_rest = runner.method->info().name == "sla" && own.find_side("projection") != nullptr;
    if (!runner.method->runs_its_plan() || runner.plan.sources.size() > 1) {
      tessera::run(exact_part(runner.plan), inputs, result.outputs(), options_.run);
    }
    runner.mass.resize(result.lse.size());
    for (std::size_t i = 0; i < result.lse.size(); ++i) {
      const float all = dense->lse[i];
      runner.mass[i] = std::isfinite(all) ? std::clamp(std::exp(result.lse[i] - all), 0.0F, 1.0F) : 1.0F;
    }
  }
  for (const std::int64_t head : heads) {
    if (options_.cancelled && options_.cancelled()) throw Cancelled("cancelled");
    OrderedJson methods = OrderedJson::array();
    for (const Runner& runner : runners_) {
      methods.push_back(method_of(runner, problem, runner.plan, head, runner.corrects_rest));
    }
    heads_.push_back({{"layer", layer},
                      {"head", head},
                      {"attention", attention_of(problem, inputs, head)},
                      {"methods", std::move(methods)}});
  }
}

OrderedJson AttentionView::attention_of(const Problem& problem, const AttentionInputs& inputs,
                                        std::int64_t head) const {
  const std::vector<Level> levels = levels_of(queries_, keys_, cell_);
  const score::TileMassOptions exact{.tile_q = cell_, .tile_k = cell_, .stride = 1, .scale = problem.softmax_scale()};
  std::vector<float> mass(static_cast<std::size_t>(levels.front().rows * levels.front().columns));
  const std::int64_t band = score::tiles_per_band(exact);
  const std::int64_t bands = ceil_div(levels.front().rows, band);
  std::vector<score::TileMassBuffers> buffers(static_cast<std::size_t>(thread_count(options_.run.threads)));
  parallel_for(bands, options_.run.threads, [&](std::int64_t i, int thread) {
    const std::int64_t first = (bands - 1 - i) * band;  // of a causal call the last is the longest
    const std::int64_t count = std::min(band, levels.front().rows - first);
    const auto place = static_cast<std::size_t>(first * levels.front().columns);
    score::tile_mass(problem, inputs, 0, head, exact, first, count,
                     std::span(mass).subspan(place, static_cast<std::size_t>(count * levels.front().columns)),
                     buffers[static_cast<std::size_t>(thread)]);
  });
  const Window window = problem.causal ? Window{-1, 0} : Window{};
  OrderedJson planes = OrderedJson::array();
  for (std::size_t l = 0; l < levels.size(); ++l) {
    const Level& level = levels[l];
    if (l > 0) mass = halved(mass, levels[l - 1], level);
    std::vector<std::uint8_t> bytes(mass.size(), 0);
    for (std::int64_t row = 0; row < level.rows; ++row) {
      const std::int64_t rows = std::min(level.cell, queries_ - row * level.cell);
      for (std::int64_t column = 0; column < level.columns; ++column) {
        const std::int64_t end = std::min(keys_, (column + 1) * level.cell);
        const auto at = static_cast<std::size_t>(row * level.columns + column);
        if (pairs_in_window(window, offset_ + row * level.cell, rows, column * level.cell, end) == 0) continue;
        bytes[at] = byte_of_mass(mass[at] / static_cast<double>(rows));
      }
    }
    planes.push_back(packed_array(bytes));
  }
  return planes;
}

OrderedJson AttentionView::method_of(const Runner& runner, const Problem& problem, const Plan& plan, std::int64_t head,
                                     bool corrects_rest) const {
  PlanMap map = PlanMap::of_call(problem, 0, cell_);
  map.add(plan, 0, head);
  const std::vector<Level> levels = levels_of(queries_, keys_, cell_);
  const auto cells = static_cast<std::size_t>(map.rows() * map.columns());
  std::vector<std::int64_t> allowed(cells);
  std::array<std::vector<std::int64_t>, 3> pairs;  // kept, pooled, corrected
  for (auto& plane : pairs) plane.resize(cells);
  for (std::int64_t row = 0; row < map.rows(); ++row) {
    for (std::int64_t column = 0; column < map.columns(); ++column) {
      const auto at = static_cast<std::size_t>(row * map.columns() + column);
      allowed[at] = map.allowed(row, column);
      pairs[0][at] = map.computed(row, column);
      pairs[1][at] = map.pooled(row, column);
      pairs[2][at] = corrects_rest ? allowed[at] - pairs[0][at] : map.corrected(row, column);
    }
  }
  OrderedJson planes = {{"kept", OrderedJson::array()}};
  constexpr std::array names{"kept", "pooled", "corrected"};
  std::array<bool, 3> used{true, false, false};
  for (std::size_t p = 1; p < pairs.size(); ++p)
    used[p] = std::any_of(pairs[p].begin(), pairs[p].end(), [](std::int64_t n) { return n > 0; });
  for (std::size_t l = 0; l < levels.size(); ++l) {
    if (l > 0) allowed = halved(allowed, levels[l - 1], levels[l]);
    for (std::size_t p = 0; p < pairs.size(); ++p) {
      if (!used[p]) continue;
      if (l > 0) pairs[p] = halved(pairs[p], levels[l - 1], levels[l]);
      std::vector<std::uint8_t> bytes(allowed.size());
      for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = byte_of_share(pairs[p][i], allowed[i]);
      planes[names[p]].push_back(packed_array(bytes));
    }
  }
  // Mean over the rows of each query tile.
  std::vector<std::uint16_t> tiles;
  double sum = 0;
  double least = 1;
  for (std::int64_t row = 0; row < map.rows(); ++row) {
    const std::int64_t begin = row * cell_;
    const std::int64_t end = std::min(queries_, begin + cell_);
    double mass = 0;
    for (std::int64_t q = begin; q < end; ++q) mass += runner.mass[static_cast<std::size_t>(head * queries_ + q)];
    sum += mass;
    mass /= static_cast<double>(end - begin);
    least = std::min(least, mass);
    tiles.push_back(static_cast<std::uint16_t>(std::lround(65535 * mass)));
  }
  OrderedJson result{{"density", runner.statistics.head_density[static_cast<std::size_t>(head)]},
                     {"rel_l2", runner.error.head_rel_l2[static_cast<std::size_t>(head)]},
                     {"mass", sum / static_cast<double>(queries_)},
                     {"least_mass", least},
                     {"tile_q", plan.tile_q},
                     {"tile_k", plan.tile_k},
                     {"tile_mass", packed_array(tiles)}};
  result.update(planes);
  return result;
}

void AttentionView::set_tokens(std::span<const std::string> tokens) {
  std::string bytes;
  std::vector<std::uint16_t> lengths;
  for (const std::string& token : tokens) {
    bytes += token;
    lengths.push_back(static_cast<std::uint16_t>(std::min<std::size_t>(token.size(), 65535)));
  }
  text_ = {{"bytes", packed(std::as_bytes(std::span(bytes)))}, {"lengths", packed_array(lengths)}};
}

OrderedJson AttentionView::report() const {
  OrderedJson document{{"kind", "view"},
                       {"queries", queries_},
                       {"keys", keys_},
                       {"offset", offset_},
                       {"causal", causal_},
                       {"cell", cell_},
                       {"steps_per_decade", kStepsPerDecade},
                       {"smallest_mass", kSmallestMass}};
  document["levels"] = OrderedJson::array();
  if (cell_ > 0) {
    for (const Level& level : levels_of(queries_, keys_, cell_))
      document["levels"].push_back({{"cell", level.cell}, {"rows", level.rows}, {"columns", level.columns}});
  }
  document["methods"] = OrderedJson::array();
  for (const Runner& runner : runners_) {
    document["methods"].push_back({{"spec", runner.spec},
                                   {"summary", runner.method->info().summary},
                                   {"params", OrderedJson::parse(runner.method->parameters())}});
  }
  document["heads"] = heads_;
  document["text"] = text_;
  return document;
}

}  // namespace tessera
