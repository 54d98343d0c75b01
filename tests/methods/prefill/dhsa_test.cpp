// DHSA: boundaries, chunks and the lists of its first version; the tiles and lines of its second.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "methods/masks.h"
#include "score/chunk_boundaries.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;
using test::masks_of;

using Keys = std::set<std::int64_t>;
using Rows = std::vector<std::vector<double>>;

/// Weights of a small predictor, as side inputs and for the formula.
struct Predictor {
  std::map<std::string, std::vector<float>> tensors;
  std::int64_t channels;
  std::int64_t hidden = 6;

  explicit Predictor(std::int64_t c) : channels(c) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    const auto fill = [&](const std::string& name, std::int64_t count, float size) {
      for (std::int64_t i = 0; i < count; ++i) tensors[name].push_back(size * normal(random));
    };
    fill("in_weight", 3 * c * c, 0.3F);
    fill("in_bias", 3 * c, 0.2F);
    fill("out_weight", c * c, 0.3F);
    fill("out_bias", c, 0.2F);
    fill("norm_weight", c, 1);
    fill("norm_bias", c, 0.3F);
    fill("pool_gate", c, 1);
    fill("hidden_weight", hidden * (4 * c + 1), 0.4F);
    fill("hidden_bias", hidden, 0.3F);
    fill("score_weight", hidden, 1);
    fill("score_bias", 1, 0.1F);
  }
  void add_to(AttentionInputs& inputs, bool gate) const {
    for (const auto& [name, values] : tensors) {
      if (name == "pool_gate" && !gate) continue;
      const auto size = static_cast<std::int64_t>(values.size());
      std::int64_t rows = 1;
      if (name == "in_weight") rows = 3 * channels;
      if (name == "out_weight") rows = channels;
      if (name == "hidden_weight") rows = hidden;
      inputs.side.push_back({name, view_of(values.data(), DType::f32, {1, 1, rows, size / rows})});
    }
  }
  double at(const std::string& name, std::int64_t i) const { return tensors.at(name)[static_cast<std::size_t>(i)]; }

  std::vector<double> linear(const std::string& name, const std::vector<double>& in) const {
    std::vector<double> out;
    const auto width = static_cast<std::int64_t>(in.size());
    const auto& bias = tensors.at(name + "_bias");
    for (std::size_t o = 0; o < bias.size(); ++o) {
      double sum = bias[o];
      for (std::int64_t i = 0; i < width; ++i) {
        sum += at(name + "_weight", static_cast<std::int64_t>(o) * width + i) * in[static_cast<std::size_t>(i)];
      }
      out.push_back(sum);
    }
    return out;
  }

  /// Score of a boundary after token t.
  double score(const Rows& rows, std::int64_t t, std::int64_t w, std::int64_t heads, bool gate) const {
    const std::int64_t dim = channels / heads;
    Rows projected;
    for (std::int64_t i = t - w + 1; i <= t + w; ++i) {
      const bool inside = i >= 0 && i < static_cast<std::int64_t>(rows.size());
      projected.push_back(
          linear("in", inside ? rows[i] : std::vector<double>(static_cast<std::size_t>(channels), 0.0)));
    }
    Rows encoded;
    for (const auto& own : projected) {
      std::vector<double> mixed(static_cast<std::size_t>(channels), 0.0);
      for (std::int64_t h = 0; h < heads; ++h) {
        std::vector<double> p;
        double sum = 0;
        for (const auto& other : projected) {
          double dot = 0;
          for (std::int64_t d = h * dim; d < (h + 1) * dim; ++d) dot += own[d] * other[channels + d];
          p.push_back(std::exp(dot / std::sqrt(static_cast<double>(dim))));
          sum += p.back();
        }
        for (std::size_t j = 0; j < p.size(); ++j) {
          for (std::int64_t d = h * dim; d < (h + 1) * dim; ++d)
            mixed[d] += p[j] / sum * projected[j][2 * channels + d];
        }
      }
      mixed = linear("out", mixed);
      const double mean = std::accumulate(mixed.begin(), mixed.end(), 0.0) / static_cast<double>(channels);
      double variance = 0;
      for (const double x : mixed) variance += (x - mean) * (x - mean) / static_cast<double>(channels);
      for (std::int64_t c = 0; c < channels; ++c) {
        mixed[c] = (mixed[c] - mean) / std::sqrt(variance + 1e-5) * at("norm_weight", c) + at("norm_bias", c);
      }
      encoded.push_back(mixed);
    }
    const auto pooled = [&](std::int64_t first) {
      std::vector<double> share;
      double sum = 0;
      for (std::int64_t i = first; i < first + w; ++i) {
        double dot = 0;
        for (std::int64_t c = 0; c < channels; ++c) dot += gate ? at("pool_gate", c) * encoded[i][c] : 0;
        share.push_back(std::exp(dot));
        sum += share.back();
      }
      std::vector<double> side(static_cast<std::size_t>(channels), 0.0);
      for (std::int64_t i = 0; i < w; ++i) {
        for (std::int64_t c = 0; c < channels; ++c) side[c] += share[i] / sum * encoded[first + i][c];
      }
      return side;
    };
    const auto l = pooled(0);
    const auto r = pooled(w);
    std::vector<double> features(l);
    features.insert(features.end(), r.begin(), r.end());
    double lr = 0;
    double ll = 0;
    double rr = 0;
    for (std::int64_t c = 0; c < channels; ++c) features.push_back(std::fabs(l[c] - r[c]));
    for (std::int64_t c = 0; c < channels; ++c) {
      features.push_back(l[c] * r[c]);
      lr += l[c] * r[c];
      ll += l[c] * l[c];
      rr += r[c] * r[c];
    }
    features.push_back(lr / std::sqrt(ll * rr));
    double score = at("score_bias", 0);
    const auto hidden_layer = linear("hidden", features);
    for (std::int64_t i = 0; i < hidden; ++i) score += at("score_weight", i) * std::max(0.0, hidden_layer[i]);
    return score;
  }
};

Rows flat_keys(const AttentionCase& input) {
  Rows rows;
  for (std::int64_t j = 0; j < input.problem.kv_len; ++j) {
    auto& row = rows.emplace_back();
    for (std::int64_t h = 0; h < input.problem.kv_heads; ++h) {
      for (std::int64_t d = 0; d < input.problem.head_dim; ++d) row.push_back(input.k(0, h, j, d));
    }
  }
  return rows;
}

double cosine_of_sides(const Rows& rows, std::int64_t t, std::int64_t w) {
  std::vector<double> l(rows[0].size(), 0.0);
  std::vector<double> r(rows[0].size(), 0.0);
  double lr = 0;
  double ll = 0;
  double rr = 0;
  for (std::size_t c = 0; c < l.size(); ++c) {
    for (std::int64_t i = t - w + 1; i <= t; ++i) l[c] += i < 0 ? 0 : rows[i][c];
    for (std::int64_t i = t + 1; i <= t + w && i < static_cast<std::int64_t>(rows.size()); ++i) r[c] += rows[i][c];
    lr += l[c] * r[c];
    ll += l[c] * l[c];
    rr += r[c] * r[c];
  }
  return lr / std::sqrt(std::max(1e-30, ll * rr));
}

/// Borders from the scores of all gaps.
Keys cut(const std::vector<double>& scores, double least, std::int64_t w, std::int64_t apart, std::int64_t most,
         std::int64_t instruction) {
  const auto n = static_cast<std::int64_t>(scores.size());
  std::vector<std::pair<double, std::int64_t>> order;
  for (std::int64_t t = w - 1; t < n - w; ++t) {
    if (scores[t] > least) order.emplace_back(-scores[t], t);
  }
  std::sort(order.begin(), order.end());
  std::vector<std::int64_t> picked;
  for (const auto& [minus, t] : order) {
    bool near = false;
    for (const std::int64_t other : picked) near = near || std::abs(other - t) <= apart;
    if (!near && static_cast<std::int64_t>(picked.size()) < most) picked.push_back(t);
  }
  Keys borders{0, n, n - instruction};
  for (const std::int64_t t : picked) borders.insert(t + 1);
  return borders;
}

struct Lists {
  std::int64_t block = 32;
  std::int64_t budget = 100;
  std::int64_t recent = 40;
  std::int64_t sinks = 20;
  std::int64_t instruction = 10;
  std::int64_t window = -1;

  std::string spec() const {
    return fmt::format("block={},budget={},recent={},sinks={},instruction={},layer_window={}", block, budget, recent,
                       sinks, instruction, window);
  }
  /// Keys of a query tile by the text, for the heads [first_head, + heads).
  Keys keys(const AttentionCase& input, const Keys& borders, std::int64_t first_head, std::int64_t heads,
            std::int64_t tile) const {
    const Problem& problem = input.problem;
    const std::int64_t first = tile * block;
    const std::int64_t rows = std::min(block, problem.q_len - first);
    const std::int64_t end = std::min(problem.kv_len, test::position(input, 0, first + rows - 1) + 1);
    const std::int64_t begin = window < 0 ? 0 : std::max<std::int64_t>(0, test::position(input, 0, first) - window);
    Keys all;
    for (std::int64_t j = begin; j < end; ++j) all.insert(j);
    if (end - begin <= budget || first + rows > problem.q_len - instruction) return all;
    std::vector<std::pair<double, std::int64_t>> ranked;  // -score of the chunk, -token
    for (auto it = borders.begin(); std::next(it) != borders.end(); ++it) {
      const double length = static_cast<double>(*std::next(it) - *it);
      double score = 0;
      for (std::int64_t d = 0; d < problem.head_dim; ++d) {
        double k = 0;
        double q = 0;
        for (std::int64_t h = first_head; h < first_head + heads; ++h) {
          for (std::int64_t j = *it; j < *std::next(it); ++j) k += input.k(0, h / problem.group(), j, d);
          for (std::int64_t r = first; r < first + rows; ++r) q += input.q(0, h, r, d);
        }
        const auto share = static_cast<double>(heads);
        score += (k / share / length * std::sqrt(length)) *
                 (q / share / static_cast<double>(rows) * std::sqrt(static_cast<double>(rows)));
      }
      for (std::int64_t j = *it; j < *std::next(it); ++j) {
        if (j >= begin && j < end - recent) ranked.emplace_back(-score, -j);
      }
    }
    std::sort(ranked.begin(), ranked.end());
    Keys chosen;
    for (std::int64_t i = 0; i < budget - recent; ++i) chosen.insert(-ranked[static_cast<std::size_t>(i)].second);
    for (std::int64_t j = end - recent; j < end; ++j) chosen.insert(j);
    for (std::int64_t i = 0; i < sinks; ++i) chosen.erase(chosen.begin());
    for (std::int64_t j = 0; j < sinks; ++j) chosen.insert(j);
    return chosen;
  }
};

void expect_lists(const AttentionCase& input, const std::vector<HeadMask>& masks, const Lists& lists,
                  const Keys& borders, std::int64_t heads) {
  for (std::int64_t h = 0; h < input.problem.q_heads; ++h) {
    for (std::int64_t n = 0; n < input.problem.q_len; n += lists.block) {
      const Keys keys = lists.keys(input, borders, h / heads * heads, heads, n / lists.block);
      for (std::int64_t r = n; r < std::min(n + lists.block, input.problem.q_len); ++r) {
        const std::int64_t p = test::position(input, 0, r);
        for (std::int64_t j = 0; j < input.problem.kv_len; ++j) {
          const bool inside = lists.window < 0 || j >= p - lists.window;
          ASSERT_EQ(masks[h].at(r, j), input.allowed(0, r, j) && inside && keys.contains(j))
              << "head " << h << ", query " << r << ", key " << j;
        }
      }
    }
  }
}

const CaseShape kSquare{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 300, .kv_len = 300, .head_dim = 8};
const CaseShape kChunk{.name = "chunk", .q_heads = 4, .kv_heads = 2, .q_len = 100, .kv_len = 333, .head_dim = 8};

Keys fixed_borders(const AttentionCase& input, std::int64_t length, std::int64_t instruction) {
  Keys borders{input.problem.kv_len, input.problem.kv_len - instruction};
  for (std::int64_t j = 0; j < input.problem.kv_len; j += length) borders.insert(j);
  return borders;
}

TEST(Dhsa, ListsOfFixedChunksFollowTheText) {
  for (const CaseShape& shape : {kSquare, kChunk}) {
    const AttentionCase input(shape);
    for (const Lists& lists : {Lists{}, Lists{.block = 16, .budget = 60, .recent = 16, .sinks = 0, .instruction = 5},
                               Lists{.block = 32, .budget = 90, .recent = 50, .window = 150}}) {
      for (const auto& [share, heads] : {std::pair{"auto", 4}, {"group", 2}, {"none", 1}}) {
        const auto masks = masks_of(fmt::format("dhsa:{},beta=4,share={}", lists.spec(), share), input);
        expect_lists(input, masks, lists, fixed_borders(input, lists.block / 4, lists.instruction), heads);
      }
    }
  }
}

TEST(Dhsa, BoundariesOfThePredictorFollowTheText) {
  for (const bool gate : {false, true}) {
    AttentionCase input(kSquare);
    const Predictor predictor(16);
    predictor.add_to(input.inputs, gate);
    const Rows rows = flat_keys(input);
    std::vector<double> scores;
    for (std::int64_t t = 0; t < 300; ++t) scores.push_back(predictor.score(rows, t, 3, 4, gate));
    const Lists lists;
    for (const auto& [beta, least] : {std::pair{4, 0.0}, {1, -100.0}}) {
      const Keys borders = cut(scores, least, 3, 5, 300 / 32 * beta, 10);
      EXPECT_GT(borders.size(), 6U);
      const auto masks = masks_of(
          fmt::format("dhsa:{},beta={},window=3,heads=4,apart=5,least_score={}", lists.spec(), beta, least), input);
      expect_lists(input, masks, lists, borders, 4);
    }
    // Keys before RoPE are what the predictor reads where they are given.
    AttentionCase before(kSquare, 77);
    input.inputs.side.push_back({"keys", before.inputs.k});
    const Rows other = flat_keys(before);
    scores.clear();
    for (std::int64_t t = 0; t < 300; ++t) scores.push_back(predictor.score(other, t, 3, 4, gate));
    const auto masks = masks_of("dhsa:" + lists.spec() + ",beta=4,window=3,heads=4,apart=5", input);
    expect_lists(input, masks, lists, cut(scores, 0, 3, 5, 36, 10), 4);
  }
}

TEST(Dhsa, BoundariesByCosineFollowTheText) {
  const AttentionCase input(kChunk);
  const Rows rows = flat_keys(input);
  std::vector<double> scores;
  for (std::int64_t t = 0; t < 333; ++t) scores.push_back(-cosine_of_sides(rows, t, 4));
  const Lists lists;
  const Keys borders = cut(scores, -0.1, 4, 8, 333 / 32 * 8, 10);
  EXPECT_GT(borders.size(), 10U);
  expect_lists(input, masks_of("dhsa:" + lists.spec() + ",boundaries=cosine,most_cosine=0.1", input), lists, borders,
               4);
}

TEST(Dhsa, BoundaryLiesWhereTheSubjectChanges) {
  std::vector<float> rows;
  for (std::int64_t j = 0; j < 200; ++j) {
    for (std::int64_t c = 0; c < 4; ++c) rows.push_back(c == (j < 83 ? 0 : j < 140 ? 1 : 2) ? 1.0F : 0.1F);
  }
  const auto picked = score::pick_boundaries(score::boundaries_by_cosine(rows, 4, 4, 2), -0.9F, 4, 8, 100);
  EXPECT_EQ(picked, (std::vector<std::int32_t>{82, 139}));
}

TEST(Dhsa, RootOfTheLengthKeepsScoresOfChunksComparable) {
  // Independent keys: the variance of a chunk's score does not depend on its length.
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> rows(4000 * 4);
  for (float& x : rows) x = normal(random);
  const auto variance = [&](std::int32_t length) {
    std::vector<std::int32_t> borders;
    for (std::int32_t j = 0; j <= 4000; j += length) borders.push_back(j);
    const auto pooled = score::pool_chunks(rows, 4, borders, 2);
    double sum = 0;
    for (const float x : pooled) sum += static_cast<double>(x) * x;
    return sum / static_cast<double>(pooled.size());
  };
  EXPECT_NEAR(variance(2), 1, 0.1);
  EXPECT_NEAR(variance(40), 1, 0.2);
}

TEST(Dhsa, LaterLayersShareBoundariesAndLists) {
  const AttentionCase first(kSquare, 1);
  const AttentionCase second(kSquare, 2);
  const auto plan = [](const Method& method, const AttentionCase& input, std::int64_t layer, MethodState* state) {
    PlanContext context;
    context.layer = layer;
    context.layers = 8;
    context.state = state;
    return method.plan(input.problem, input.inputs, context);
  };
  const std::string spec = "dhsa:" + Lists{}.spec() + ",boundaries=cosine,most_cosine=0.1";
  const auto own = make_method(spec);
  const auto state = own->new_state();
  plan(*own, first, 0, state.get());
  const Plan alone = plan(*own, second, 1, nullptr);
  const Plan shared = plan(*own, second, 1, state.get());
  EXPECT_FALSE(shared == alone) << "the boundaries are those of the first layer";
  EXPECT_TRUE(plan(*own, second, 0, state.get()) == alone) << "a new pass begins at the first layer";
  EXPECT_GT(state->memory_bytes(), 0U);

  const auto lists = make_method(spec + ",list_layer=2");
  const auto other = lists->new_state();
  plan(*lists, first, 0, other.get());
  const Plan published = plan(*lists, first, 2, other.get());
  EXPECT_TRUE(plan(*lists, second, 3, other.get()) == published);
  EXPECT_TRUE(plan(*lists, second, 7, other.get()) == published);
  EXPECT_FALSE(plan(*lists, second, 1, other.get()) == published);
  const AttentionCase chunk(kChunk);
  EXPECT_TRUE(plan(*lists, chunk, 3, other.get()) == plan(*lists, chunk, 3, nullptr)) << "another problem";
}

/// The second version once more, tile by tile.
Keys tiles_by_text(const AttentionCase& input, const std::string& mode, std::int64_t h, std::int64_t tile,
                   double density, std::int64_t bq, std::int64_t bk) {
  const Problem& problem = input.problem;
  const std::int64_t nk = (problem.kv_len + bk - 1) / bk;
  const std::int64_t nq = (problem.q_len + bq - 1) / bq;
  const std::int64_t wanted = std::max<std::int64_t>(1, static_cast<std::int64_t>(density * static_cast<double>(nk)));
  const std::int64_t offset = problem.q_offset_of(0);
  const auto rows_of = [&](std::int64_t i) { return std::min(bq, problem.q_len - i * bq); };
  const auto latest = [&](std::int64_t i) { return (offset + i * bq + rows_of(i) - 1) / bk; };
  const auto mean_score = [&](std::int64_t i, std::int64_t j) {
    double score = 0;
    const std::int64_t keys = std::min(bk, problem.kv_len - j * bk);
    for (std::int64_t d = 0; d < problem.head_dim; ++d) {
      double q = 0;
      double k = 0;
      for (std::int64_t r = i * bq; r < i * bq + rows_of(i); ++r) q += input.q(0, h, r, d);
      for (std::int64_t c = j * bk; c < j * bk + keys; ++c) k += input.k(0, h / problem.group(), c, d);
      score += q / static_cast<double>(rows_of(i)) * k / static_cast<double>(keys);
    }
    return score * problem.softmax_scale();
  };
  const auto best = [](const std::vector<double>& scores, std::int64_t count) {
    std::vector<std::int64_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return scores[a] > scores[b]; });
    order.resize(std::min(order.size(), static_cast<std::size_t>(std::max<std::int64_t>(0, count))));
    return order;
  };
  const std::int64_t last = latest(tile);
  const std::int64_t own = (offset + tile * bq) / bk;
  Keys all;
  for (std::int64_t j = 0; j <= last; ++j) all.insert(j);
  std::vector<double> scores(static_cast<std::size_t>(last + 1), 0.0);
  if (mode == "topk" || mode == "a") {
    for (std::int64_t j = 0; j <= last; ++j) scores[j] = mean_score(tile, j);
  }
  if (mode == "topk") {
    const auto chosen = best(scores, wanted);
    Keys keys(chosen.begin(), chosen.end());
    if (*keys.begin() > own) keys.insert(own);
    return keys;
  }
  if (last + 1 <= wanted) return all;
  const bool lines = mode != "a";
  if (lines && (offset + tile * bq < wanted * bk || tile == nq - 1)) return all;
  Keys forced{0, last};
  if (mode == "vs") {
    std::vector<double> columns(static_cast<std::size_t>(problem.kv_len), 0.0);
    std::vector<double> distances(static_cast<std::size_t>(problem.kv_len), 0.0);
    for (std::int64_t r = problem.q_len - std::min(bq, problem.q_len); r < problem.q_len; ++r) {
      const auto p = input.probabilities(0, h, r);
      for (std::int64_t j = 0; j <= offset + r; ++j) {
        columns[j] += p[j];
        distances[offset + r - j] += p[j];
      }
    }
    const std::int64_t budget = std::min(wanted * bk, problem.kv_len);
    for (const std::int64_t j : best(columns, budget / 2)) {
      if (j / bk <= last) scores[j / bk] += columns[j];
    }
    for (const std::int64_t o : best(distances, budget - budget / 2)) {
      for (std::int64_t j = 0; j <= last; ++j) {
        bool touched = false;
        for (std::int64_t p = offset + tile * bq; p < offset + (tile + 1) * bq; ++p) {
          touched = touched || (p - o >= j * bk && p - o < (j + 1) * bk);
        }
        if (touched) scores[j] += distances[o];
      }
    }
  }
  if (mode == "vsb") {
    for (std::int64_t j = own; j <= last; ++j) forced.insert(j);
    const std::int64_t final_tile = latest(nq - 1);
    std::vector<double> probe;
    for (std::int64_t j = 0; j <= final_tile; ++j) probe.push_back(mean_score(nq - 1, j));
    for (const std::int64_t j : best(probe, wanted / 2)) {
      if (j <= last) scores[j] += probe[j];
    }
    for (const std::int64_t j : best(probe, wanted - wanted / 2)) {
      const std::int64_t distance = final_tile - j;
      for (std::int64_t t = own - distance; t <= last - distance; ++t) {
        if (t >= 0) scores[t] += probe[j];
      }
    }
  }
  const std::int64_t open = wanted - static_cast<std::int64_t>(forced.size());
  for (const std::int64_t j : forced) scores[j] = -1e30;
  for (const std::int64_t j : best(scores, open)) forced.insert(j);
  return forced;
}

TEST(Dhsa, TilesFollowTheTextWithPlainLoops) {
  for (const CaseShape& shape : {kSquare, kChunk}) {
    const AttentionCase input(shape);
    for (const std::string mode : {"topk", "a", "vs", "vsb"}) {
      for (const double density : {0.2, 0.45}) {
        const auto masks = masks_of(fmt::format("dhsa:mode={},block=32,block_k=16,density={}", mode, density), input);
        for (std::int64_t h = 0; h < 4; ++h) {
          for (std::int64_t n = 0; n < shape.q_len; ++n) {
            const Keys tiles = tiles_by_text(input, mode, h, n / 32, density, 32, 16);
            for (std::int64_t j = 0; j < shape.kv_len; j += 5) {
              ASSERT_EQ(masks[h].at(n, j), input.allowed(0, n, j) && tiles.contains(j / 16))
                  << mode << " " << density << ", head " << h << ", query " << n << ", key " << j;
            }
            n += n % 32 == 0 ? 30 : 0;  // the first and the last rows of a tile
          }
        }
      }
    }
  }
}

TEST(Dhsa, ChunksOfOneTokenAreTopTokens) {
  // beta = block: every token is a chunk, so that the list is the exact top-k of the pooled query.
  const AttentionCase input({.name = "tokens", .q_heads = 1, .q_len = 256, .kv_len = 256});
  const Lists lists{.block = 16, .budget = 40, .recent = 16, .sinks = 4, .instruction = 0};
  Keys every;
  for (std::int64_t j = 0; j <= 256; ++j) every.insert(j);
  expect_lists(input, masks_of("dhsa:" + lists.spec() + ",beta=16", input), lists, every, 1);
}

TEST(Dhsa, WholeBudgetAndEveryShape) {
  for (const CaseShape& shape : test::all_shapes()) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    if (!input.problem.causal) {
      EXPECT_THROW(make_method("dhsa")->plan(input.problem, input.inputs, {}), Error);
      continue;
    }
    for (const std::string spec : {"dhsa:budget=100000", "dhsa:instruction=100000", "dhsa:mode=topk,density=1",
                                   "dhsa:mode=a,density=1", "dhsa:mode=vs,density=1", "dhsa:mode=vsb,density=1"}) {
      test::expect_full_budget_is_dense(*make_method(spec), input);
    }
    for (const std::string spec :
         {"dhsa:block=16,budget=40,recent=5,sinks=7,instruction=9",
          "dhsa:block=16,budget=40,recent=20,sinks=7,instruction=0,boundaries=cosine,share=none",
          "dhsa:mode=topk,block=32,block_k=16,density=0.1", "dhsa:mode=a,block=50,block_k=17,density=0.2,share=all",
          "dhsa:mode=vs,block=32,block_k=16,density=0.2",
          "dhsa:mode=vsb,block=32,block_k=16,density=0.3,share=group"}) {
      test::expect_plans_hold(*make_method(spec), input);
    }
  }
}

TEST(Dhsa, UndefinedHugeAndEqualKeysKeepEveryRow) {
  for (const float value : {std::nanf(""), std::numeric_limits<float>::infinity(), 1e30F, 0.0F}) {
    AttentionCase input({.name = "bad", .q_heads = 2, .q_len = 300, .kv_len = 300});
    for (std::int64_t j = 0; j < 300; ++j) {
      for (std::int64_t d = 0; d < 16; ++d) {
        if (value == 0 || j == 120) input.set_k(0, 0, j, d, value);
      }
    }
    for (const std::string spec :
         {"dhsa:block=16,budget=40,recent=5,sinks=7", "dhsa:block=16,budget=40,boundaries=cosine,sinks=7,recent=5",
          "dhsa:mode=topk,block=32,block_k=16", "dhsa:mode=vs,block=32,block_k=16",
          "dhsa:mode=vsb,block=32,block_k=16"}) {
      const auto method = make_method(spec);
      test::expect_plans_hold(*method, input);
      if (std::isnan(value)) {
        EXPECT_TRUE(masks_of(*method, input)[0].at(280, 120)) << spec;
      }
    }
  }
}

TEST(Dhsa, BadParametersAndWeights) {
  EXPECT_THROW(make_method("dhsa:beta=7"), Error);
  EXPECT_THROW(make_method("dhsa:budget=200"), Error);
  AttentionCase input(kSquare);
  Predictor predictor(16);
  predictor.add_to(input.inputs, false);
  EXPECT_THROW(make_method("dhsa:heads=5")->plan(input.problem, input.inputs, {}), Error);
  EXPECT_NO_THROW(make_method("dhsa:heads=2")->plan(input.problem, input.inputs, {}));
  AttentionCase missing(kSquare);
  predictor.add_to(missing.inputs, false);
  std::erase_if(missing.inputs.side, [](const SideTensor& tensor) { return tensor.name == "norm_bias"; });
  EXPECT_THROW(make_method("dhsa:heads=2")->plan(missing.problem, missing.inputs, {}), Error);
  AttentionCase wrong(kSquare);
  Predictor(8).add_to(wrong.inputs, false);
  EXPECT_THROW(make_method("dhsa:heads=2")->plan(wrong.problem, wrong.inputs, {}), Error);
}

}  // namespace
}  // namespace tessera
