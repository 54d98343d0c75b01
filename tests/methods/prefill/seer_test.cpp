// SeerAttention: the gate, its two budgets, the ground truth and the gradients of its training.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "methods/attended.h"
#include "tessera/gate_training.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using test::HeadMask;

/// A gate with its tensors, for the problem of a case: q and k before RoPE at random.
struct OwnedGate {
  OwnedGate(const AttentionCase& input, const std::vector<TilePooling>& key_pools,
            const std::vector<TilePooling>& query_pools, std::int64_t width, std::int64_t tile) {
    const Problem& problem = input.problem;
    const std::int64_t batch = problem.variable_length() ? 1 : problem.batch;
    std::mt19937 random(9);
    std::normal_distribution<float> normal;
    const auto tensor = [&](std::array<std::int64_t, 4> shape, float amplitude) {
      std::vector<float>& values = memory.emplace_back();
      values.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3] + 1));
      for (float& x : values) x = amplitude * normal(random);
      return view_of(values.data(), DType::f32, shape);
    };
    memory.reserve(8);
    gate.tile = tile;
    gate.q = tensor({batch, problem.q_heads, problem.q_len, problem.head_dim}, 1);
    gate.k = tensor({batch, problem.kv_heads, problem.kv_len, problem.head_dim}, 1);
    const std::int64_t key_heads = query_pools.empty() ? problem.q_heads : problem.kv_heads;
    for (const TilePooling p : key_pools) {
      gate.wk[static_cast<std::size_t>(p)] = tensor({1, key_heads, problem.head_dim, width}, 0.7F);
    }
    for (const TilePooling p : query_pools) {
      gate.wq[static_cast<std::size_t>(p)] = tensor({1, problem.q_heads, problem.head_dim, width}, 0.7F);
    }
  }

  AttentionInputs inputs(const AttentionCase& input) const {
    AttentionInputs all = input.inputs;
    all.side = {{"gate_q", gate.q}, {"gate_k", gate.k}};
    const std::array<std::string, 3> names{"max", "min", "avg"};
    for (std::size_t p = 0; p < 3; ++p) {
      if (gate.wk[p].data != nullptr) all.side.push_back({"gate_wk_" + names[p], gate.wk[p]});
      if (gate.wq[p].data != nullptr) all.side.push_back({"gate_wq_" + names[p], gate.wq[p]});
    }
    return all;
  }

  std::vector<std::vector<float>> memory;
  TileGate gate;
};

float at(const TensorView& view, std::int64_t b, std::int64_t h, std::int64_t n, std::int64_t d) {
  return load_as_float(view.row(b, h, n), view.dtype, d);
}

/// Pooled, projected and rotated tiles of one side in float64.
std::vector<std::vector<double>> expected_side(const TileGate& gate, const TensorView& rows,
                                               const std::array<TensorView, 3>& weights, std::int64_t b,
                                               std::int64_t head, std::int64_t weight_head, std::int64_t begin,
                                               std::int64_t count, std::int64_t position, TilePooling alone) {
  const std::int64_t dim = rows.dim();
  std::vector<std::vector<double>> tiles;
  for (std::int64_t first = 0; first < count; first += gate.tile) {
    const std::int64_t end = std::min(first + gate.tile, count);
    std::vector<double> projected;
    for (std::size_t p = 0; p < 3; ++p) {
      const bool any = weights[0].data != nullptr || weights[1].data != nullptr || weights[2].data != nullptr;
      if (any ? weights[p].data == nullptr : p != static_cast<std::size_t>(alone)) continue;
      std::vector<double> pooled;
      for (std::int64_t d = 0; d < dim; ++d) {
        double value = p == 0 ? -INFINITY : p == 1 ? INFINITY : 0;
        for (std::int64_t n = first; n < end; ++n) {
          const double x = at(rows, b, head, begin + n, d);
          value = p == 0   ? std::max(value, x)
                  : p == 1 ? std::min(value, x)
                           : value + x / static_cast<double>(end - first);
        }
        pooled.push_back(value);
      }
      if (!any) {
        projected = pooled;
        continue;
      }
      projected.resize(static_cast<std::size_t>(weights[p].dim()), 0.0);
      for (std::size_t w = 0; w < projected.size(); ++w) {
        for (std::int64_t d = 0; d < dim; ++d) {
          projected[w] += pooled[d] * at(weights[p], 0, weight_head, d, static_cast<std::int64_t>(w));
        }
      }
    }
    const std::size_t half = projected.size() / 2;
    std::vector<double> rotated(projected.size());
    for (std::size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position + first) *
                           std::pow(gate.rope_base, -static_cast<double>(i) / static_cast<double>(half));
      rotated[i] = projected[i] * std::cos(angle) - projected[i + half] * std::sin(angle);
      rotated[i + half] = projected[i + half] * std::cos(angle) + projected[i] * std::sin(angle);
    }
    tiles.push_back(rotated);
  }
  return tiles;
}

/// G of one head; -inf above the diagonal.
std::vector<std::vector<double>> expected_gate(const AttentionCase& input, const TileGate& gate, std::int64_t s,
                                               std::int64_t h) {
  const Problem& problem = input.problem;
  const bool projected = gate.wq[0].data != nullptr || gate.wq[1].data != nullptr || gate.wq[2].data != nullptr;
  const std::int64_t b = problem.tensor_batch_of(s);
  const auto q = expected_side(gate, gate.q, gate.wq, b, h, h, problem.q_begin_of(s), problem.q_len_of(s),
                               problem.q_offset_of(s), gate.query_pooling);
  const auto k = expected_side(gate, gate.k, gate.wk, b, h / problem.group(), projected ? h / problem.group() : h,
                               problem.kv_begin_of(s), problem.kv_len_of(s), 0, gate.query_pooling);
  std::vector<std::vector<double>> scores;
  for (std::size_t i = 0; i < q.size(); ++i) {
    scores.emplace_back();
    const std::int64_t last = std::min(static_cast<std::int64_t>(i + 1) * gate.tile, problem.q_len_of(s)) - 1;
    for (std::size_t j = 0; j < k.size(); ++j) {
      const double dot = std::inner_product(q[i].begin(), q[i].end(), k[j].begin(), 0.0);
      const bool visible = input.allowed(s, last, static_cast<std::int64_t>(j) * gate.tile);
      scores.back().push_back(visible ? dot / std::sqrt(static_cast<double>(q[i].size())) : -INFINITY);
    }
  }
  return scores;
}

using enum TilePooling;
const std::vector<std::vector<TilePooling>> kSubsets{{maximum},
                                                     {minimum},
                                                     {average},
                                                     {maximum, minimum},
                                                     {maximum, average},
                                                     {minimum, average},
                                                     {maximum, minimum, average}};

TEST(Seer, GateFollowsTheTextForAllPoolings) {
  for (const CaseShape& shape : {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 150, .kv_len = 150},
                                 CaseShape{.name = "chunk", .batch = 2, .q_len = 40, .kv_len = 100},
                                 CaseShape{.name = "both", .q_len = 40, .kv_len = 100, .causal = false}}) {
    const AttentionCase input(shape);
    const auto check = [&](const OwnedGate& own) {
      for (std::int64_t s = 0; s < input.problem.batch; ++s) {
        for (std::int64_t h = 0; h < input.problem.q_heads; ++h) {
          const auto expected = expected_gate(input, own.gate, s, h);
          const auto actual = gate_scores(input.problem, own.gate, s, h);
          for (std::size_t i = 0; i < expected.size(); ++i) {
            for (std::size_t j = 0; j < expected[i].size(); ++j) {
              const float x = actual[i * expected[i].size() + j];
              if (std::isinf(expected[i][j])) {
                ASSERT_EQ(x, expected[i][j]);
              } else {
                ASSERT_NEAR(x, expected[i][j], 1e-3) << shape.name << " " << i << " " << j;
              }
            }
          }
        }
      }
    };
    for (const auto& keys : kSubsets) {
      for (const auto& queries : kSubsets) check(OwnedGate(input, keys, queries, 10, 16));
      OwnedGate bare(input, keys, {}, 16, 16);
      for (const TilePooling pooling : {maximum, minimum, average}) {
        bare.gate.query_pooling = pooling;
        check(bare);
      }
    }
  }
}

/// Masks of a spec with side inputs, against the gate in float64 and the budget in plain loops.
void check_plan(const AttentionCase& input, const OwnedGate& own, const std::string& rule, double budget) {
  AttentionCase with_gate = input;
  const std::string spec = fmt::format("seer:block={},rule={},{}={},last_dense=1", own.gate.tile, rule,
                                       rule == "ratio" ? "nonzero" : "threshold", budget);
  SCOPED_TRACE(spec);
  const Plan plan = make_method(spec)->plan(input.problem, own.inputs(input), {});
  validate(plan);
  const auto mask = dense_mask(plan);
  const std::int64_t tile = own.gate.tile;
  std::int64_t left_out = 0;
  for (std::int64_t s = 0; s < input.problem.batch; ++s) {
    for (std::int64_t h = 0; h < input.problem.q_heads; ++h) {
      const HeadMask head = test::head_mask(plan, mask, s, h);
      const auto gate = expected_gate(input, own.gate, s, h);
      for (std::size_t i = 0; i < gate.size(); ++i) {
        const auto& row = gate[i];
        double sum = 0;
        for (const double x : row) sum += std::exp(x);
        const double share = input.problem.causal ? 1 - std::sqrt(1 - budget) : budget;
        const auto count =
            std::max<std::int64_t>(1, static_cast<std::int64_t>(share * static_cast<double>(row.size())));
        const auto first = static_cast<std::int64_t>(i) * tile;
        const std::int64_t last = std::min(first + tile, head.queries) - 1;
        for (std::size_t j = 0; j < row.size(); ++j) {
          std::int64_t better = 0;
          for (std::size_t other = 0; other < row.size(); ++other) {
            better += row[other] > row[j] || (row[other] == row[j] && other < j) ? 1 : 0;
          }
          bool keep = rule == "ratio" ? better < count : std::exp(row[j]) / sum > budget;
          const auto key = static_cast<std::int64_t>(j) * tile;
          const std::int64_t low = std::min(test::position(input, s, first), head.keys - 1) / tile;
          const std::int64_t high = std::min(test::position(input, s, last), head.keys - 1) / tile;
          keep = keep || (static_cast<std::int64_t>(j) >= low && static_cast<std::int64_t>(j) <= high);
          keep = keep || i + 1 == gate.size();
          left_out += keep ? 0 : 1;
          for (std::int64_t n = first; n <= last; ++n) {
            for (std::int64_t k = key; k < std::min(key + tile, head.keys); ++k) {
              ASSERT_EQ(head.at(n, k), keep && input.allowed(s, n, k)) << s << " " << h << " " << n << " " << k;
            }
          }
        }
      }
    }
  }
  EXPECT_GT(left_out, 0);
}

TEST(Seer, BudgetsFollowTheText) {
  for (const CaseShape& shape : {CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 250, .kv_len = 250},
                                 CaseShape{.name = "chunk", .batch = 2, .q_len = 70, .kv_len = 200},
                                 CaseShape{.name = "both", .q_len = 70, .kv_len = 200, .causal = false},
                                 CaseShape{.name = "lengths", .q_lens = {130, 64}, .kv_lens = {260, 200}}}) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    const OwnedGate own(input, {maximum, minimum, average}, {}, 16, 16);
    for (const double threshold : {0.01, 0.1, 0.9}) check_plan(input, own, "threshold", threshold);
    for (const double nonzero : {0.0, 0.3, 0.6}) check_plan(input, own, "ratio", nonzero);
  }
}

TEST(Seer, FullBudgetAndEveryShape) {
  for (const CaseShape& shape : test::all_shapes()) {
    AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    const OwnedGate own(input, {maximum, minimum, average}, {}, 16, 64);
    input.inputs = own.inputs(input);
    test::expect_full_budget_is_dense(*make_method("seer:threshold=0"), input);
    test::expect_full_budget_is_dense(*make_method("seer:rule=ratio,nonzero=1,block=32"), input);
    test::expect_full_budget_is_dense(*make_method("seer:threshold=1,last_dense=100000"), input);
    test::expect_plans_hold(*make_method("seer:threshold=1,block=16,last_dense=0"), input);
    test::expect_plans_hold(*make_method("seer:rule=ratio,nonzero=0.2,block=48"), input);
  }
}

TEST(Seer, UndefinedGatesKeepTheirTiles) {
  AttentionCase input({.name = "nan", .q_len = 256, .kv_len = 256});
  OwnedGate own(input, {maximum, minimum, average}, {}, 16, 16);
  own.memory[1][40 * 16 + 3] = std::nanf("");  // key 40
  input.inputs = own.inputs(input);
  for (const std::string spec : {"seer:threshold=1,block=16", "seer:rule=ratio,nonzero=0,block=16"}) {
    for (const auto& mask : test::masks_of(spec, input)) {
      for (std::int64_t n = 48; n < 256; ++n) ASSERT_TRUE(mask.at(n, 40));
    }
  }
}

TEST(Seer, MissingAndWrongSideInputsAreNamed) {
  const AttentionCase input({.name = "sides", .q_heads = 4, .kv_heads = 2, .q_len = 100, .kv_len = 100});
  const auto method = make_method("seer");
  EXPECT_THROW(method->plan(input.problem, input.inputs, {}), Error);
  const OwnedGate no_keys(input, {}, {average}, 16, 64);
  EXPECT_THROW(method->plan(input.problem, no_keys.inputs(input), {}), Error);
  const OwnedGate narrow(input, {average}, {}, 8, 64);  // without query weights the width is the head dimension
  EXPECT_THROW(method->plan(input.problem, narrow.inputs(input), {}), Error);
  const OwnedGate odd(input, {average}, {average}, 7, 64);
  EXPECT_THROW(method->plan(input.problem, odd.inputs(input), {}), Error);
  OwnedGate heads(input, {average}, {}, 16, 64);
  heads.gate.wk[2].shape[1] = 2;
  EXPECT_THROW(method->plan(input.problem, heads.inputs(input), {}), Error);
  EXPECT_NO_THROW(method->plan(input.problem, OwnedGate(input, {average}, {}, 16, 64).inputs(input), {}));
}

std::vector<float> target_of(const AttentionCase& input, std::int64_t tile, const RunOptions& options = {}) {
  const Problem& p = input.problem;
  std::vector<float> target(
      static_cast<std::size_t>(p.batch * p.q_heads * ((p.q_len + tile - 1) / tile) * ((p.kv_len + tile - 1) / tile)),
      777.0F);
  gate_target(p, input.inputs, tile, target, options);
  return target;
}

TEST(GateTraining, TargetIsTheLargestDenseProbability) {
  for (const CaseShape& shape : test::all_shapes()) {
    if (!shape.q_lens.empty()) continue;
    const AttentionCase input(shape);
    SCOPED_TRACE(shape.name);
    const Problem& problem = input.problem;
    for (const std::int64_t tile : {16, 20, 64, 150}) {
      const std::vector<float> target = target_of(input, tile);
      std::size_t at = 0;
      for (std::int64_t s = 0; s < problem.batch; ++s) {
        for (std::int64_t h = 0; h < problem.q_heads; ++h) {
          for (std::int64_t first = 0; first < problem.q_len; first += tile) {
            std::vector<double> most(static_cast<std::size_t>((problem.kv_len + tile - 1) / tile), 0.0);
            for (std::int64_t n = first; n < std::min(first + tile, problem.q_len); ++n) {
              const auto p = input.probabilities(s, h, n);
              for (std::size_t j = 0; j < p.size(); ++j) {
                most[j / static_cast<std::size_t>(tile)] = std::max(most[j / static_cast<std::size_t>(tile)], p[j]);
              }
            }
            const double sum = std::accumulate(most.begin(), most.end(), 0.0);
            for (const double x : most) {
              ASSERT_NEAR(target[at++], sum > 0 ? x / sum : 0, shape.dtype == DType::bf16 ? 1e-2 : 1e-4) << tile;
            }
          }
        }
      }
      ASSERT_EQ(at, target.size());
    }
  }
}

TEST(GateTraining, TargetOfOneHotRowsIsOneAtTheirTile) {
  AttentionCase input({.name = "hot", .q_heads = 1, .q_len = 128, .kv_len = 128});
  for (std::int64_t n = 0; n < 128; ++n) input.set_q(0, 0, n, 0, 100);
  for (std::int64_t n = 0; n < 128; ++n) input.set_k(0, 0, n, 0, n == 5 ? 100.0F : 0.0F);
  const auto target = target_of(input, 16);
  for (std::size_t i = 1; i < 8; ++i) {
    for (std::size_t j = 0; j < 8; ++j) EXPECT_NEAR(target[i * 8 + j], j == 0 ? 1 : 0, 1e-6);
  }
}

TEST(GateTraining, LossIsTheDivergenceAndGradientsMatchDifferences) {
  for (const CaseShape& shape :
       {CaseShape{.name = "square", .batch = 2, .q_heads = 4, .kv_heads = 2, .q_len = 140, .kv_len = 140},
        CaseShape{.name = "chunk", .q_len = 70, .kv_len = 150}}) {
    const AttentionCase input(shape);
    const std::vector<float> target = target_of(input, 16);
    for (const auto& queries : {std::vector<TilePooling>{}, {average}, {maximum, minimum, average}}) {
      OwnedGate own(input, {maximum, minimum, average}, queries, queries.empty() ? 16 : 12, 16);
      SCOPED_TRACE(fmt::format("{}, {} query poolings", shape.name, queries.size()));
      const auto loss_of = [&](const Problem& p) {
        double loss = 0;
        std::size_t at = 0;
        double entries = 0;
        for (std::int64_t s = 0; s < p.batch; ++s) {
          for (std::int64_t h = 0; h < p.q_heads; ++h) {
            const auto gate = expected_gate(input, own.gate, s, h);
            for (std::size_t i = 0; i < gate.size(); ++i) {
              double sum = 0;
              for (const double x : gate[i]) sum += std::exp(x);
              for (const double x : gate[i]) {
                const double t = target[at++];
                if (i < gate.size() / 4) continue;
                entries += 1;
                if (t > 0) loss += t * (std::log(t) - (x - std::log(sum)));
              }
            }
          }
        }
        return loss / entries;
      };
      TileGateGradients gradients;
      EXPECT_NEAR(gate_loss(input.problem, own.gate, target, &gradients), loss_of(input.problem), 1e-5);
      EXPECT_NEAR(gate_loss(input.problem, own.gate, target, nullptr, 0.25, 1),
                  gate_loss(input.problem, own.gate, target, &gradients, 0.25, 2), 0);

      // Central differences of the loss in float64, at places all over the weights.
      const auto check = [&](const TensorView& weight, const std::vector<float>& gradient) {
        if (weight.data == nullptr) {
          EXPECT_TRUE(gradient.empty());
          return;
        }
        std::vector<float>* values = nullptr;
        for (auto& memory : own.memory) values = memory.data() == weight.data ? &memory : values;
        ASSERT_NE(values, nullptr);
        ASSERT_EQ(gradient.size() + 1, values->size());
        float largest = 0;
        for (const float g : gradient) largest = std::max(largest, std::fabs(g));
        EXPECT_GT(largest, 0);
        for (std::size_t i = 0; i < gradient.size(); i += gradient.size() / 7 + 1) {
          constexpr float step = 1.0F / 512;
          const float before = (*values)[i];
          (*values)[i] = before + step;
          const double above = loss_of(input.problem);
          (*values)[i] = before - step;
          const double below = loss_of(input.problem);
          (*values)[i] = before;
          const double difference = (above - below) / (static_cast<double>(before + step) - (before - step));
          EXPECT_NEAR(gradient[i], difference, 2e-3 * largest) << i;
        }
      };
      for (std::size_t p = 0; p < kTilePoolings; ++p) {
        check(own.gate.wk[p], gradients.wk[p]);
        check(own.gate.wq[p], gradients.wq[p]);
      }
    }
  }
}

TEST(GateTraining, DescentLearnsAPlantedPattern) {
  // Queries of tile i look at the keys of tile i - 3: the content before RoPE says so.
  const std::int64_t tile = 16;
  AttentionCase input({.name = "planted", .q_heads = 1, .q_len = 256, .kv_len = 256});
  OwnedGate own(input, {average}, {}, 16, tile);
  for (std::int64_t n = 0; n < 256; ++n) {
    for (std::int64_t d = 0; d < 16; ++d) {
      own.memory[0][n * 16 + d] = d == n / tile ? 4.0F : 0.0F;
      own.memory[1][n * 16 + d] = d == (n / tile + 3) % 16 ? 4.0F : 0.0F;
      input.set_q(0, 0, n, d, own.memory[0][n * 16 + d]);
      input.set_k(0, 0, n, d, own.memory[1][n * 16 + d]);
    }
  }
  own.gate.rope_base = 1e12;
  const auto target = target_of(input, tile);
  TileGateGradients gradients;
  const double before = gate_loss(input.problem, own.gate, target, &gradients);
  double after = before;
  for (int step = 0; step < 300; ++step) {
    for (std::size_t i = 0; i < gradients.wk[2].size(); ++i) own.memory[2][i] -= 5 * gradients.wk[2][i];
    after = gate_loss(input.problem, own.gate, target, &gradients);
  }
  EXPECT_LT(after, 0.5 * before);
}

TEST(GateTraining, BadCallsAreRefused) {
  const AttentionCase input({.name = "bad", .q_len = 100, .kv_len = 100});
  const OwnedGate own(input, {average}, {}, 16, 64);
  std::vector<float> target(8);
  EXPECT_NO_THROW(gate_target(input.problem, input.inputs, 64, target));
  EXPECT_THROW(gate_target(input.problem, input.inputs, 0, target), Error);
  EXPECT_THROW(gate_target(input.problem, input.inputs, 32, target), Error);
  EXPECT_THROW(gate_loss(input.problem, own.gate, std::span<float>(target).first(7)), Error);
  EXPECT_THROW(gate_loss(input.problem, own.gate, target, nullptr, 1), Error);
}

}  // namespace
}  // namespace tessera
