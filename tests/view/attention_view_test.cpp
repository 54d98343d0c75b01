#include "view/attention_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>

#include "score/attention_case.h"
#include "view/packed_bytes.h"

namespace tessera {
namespace {

using test::AttentionCase;
using test::CaseShape;
using ::testing::HasSubstr;
using OrderedJson = nlohmann::ordered_json;

/// What the page does: base64, then zlib.
std::vector<std::uint8_t> unpack(const std::string& text, std::size_t size) {
  constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<std::uint8_t> deflated;
  std::uint32_t group = 0;
  int bits = 0;
  for (const char c : text) {
    if (c == '=') break;
    group = group << 6 | static_cast<std::uint32_t>(digits.find(c));
    bits += 6;
    if (bits >= 8) deflated.push_back(static_cast<std::uint8_t>(group >> (bits -= 8)));
  }
  std::vector<std::uint8_t> bytes(size);
  auto written = static_cast<uLongf>(size);
  EXPECT_EQ(uncompress(bytes.data(), &written, deflated.data(), static_cast<uLong>(deflated.size())), Z_OK);
  EXPECT_EQ(written, size);
  return bytes;
}

/// Dense probabilities of one head, [q_len][kv_len], in float64.
std::vector<double> probabilities(const AttentionCase& input, std::int64_t head) {
  const Problem& problem = input.problem;
  std::vector<double> p(static_cast<std::size_t>(problem.q_len * problem.kv_len), 0);
  const std::int64_t offset = problem.q_offset_of(0);
  for (std::int64_t q = 0; q < problem.q_len; ++q) {
    const std::int64_t visible = problem.causal ? std::min(problem.kv_len, offset + q + 1) : problem.kv_len;
    double sum = 0;
    for (std::int64_t k = 0; k < visible; ++k) {
      double dot = 0;
      for (std::int64_t d = 0; d < problem.head_dim; ++d) {
        dot += static_cast<double>(load_as_float(input.inputs.q.row(0, head, q), input.inputs.q.dtype, d)) *
               static_cast<double>(
                   load_as_float(input.inputs.k.row(0, head / problem.group(), k), input.inputs.k.dtype, d));
      }
      sum += p[static_cast<std::size_t>(q * problem.kv_len + k)] =
          std::exp(dot * static_cast<double>(problem.softmax_scale()));
    }
    for (std::int64_t k = 0; k < visible; ++k) p[static_cast<std::size_t>(q * problem.kv_len + k)] /= sum;
  }
  return p;
}

OrderedJson report_of(const AttentionCase& input, const std::vector<std::string>& specs,
                      const std::vector<std::int64_t>& heads, std::int64_t most_cells, int threads = 2) {
  AttentionViewOptions options;
  options.most_cells = most_cells;
  options.run.threads = threads;
  AttentionView view(specs, options);
  view.add(3, input.problem, input.inputs, heads);
  return view.report();
}

const std::array kShapes{
    CaseShape{.name = "square", .q_heads = 4, .kv_heads = 2, .q_len = 300, .kv_len = 300},
    CaseShape{.name = "last_queries", .q_heads = 2, .kv_heads = 1, .q_len = 37, .kv_len = 301},
    CaseShape{.name = "bidirectional", .q_heads = 2, .kv_heads = 2, .q_len = 129, .kv_len = 64, .causal = false},
    CaseShape{.name = "one", .q_heads = 2, .kv_heads = 1, .q_len = 1, .kv_len = 1},
    CaseShape{.name = "bf16", .q_heads = 2, .kv_heads = 1, .q_len = 65, .kv_len = 65, .dtype = DType::bf16},
};

TEST(AttentionView, CellsAreTheSmallestPowersOfTwo) {
  EXPECT_EQ(AttentionView::cell_of(1, 1, 512), 1);
  EXPECT_EQ(AttentionView::cell_of(512, 512, 512), 1);
  EXPECT_EQ(AttentionView::cell_of(513, 1, 512), 2);
  EXPECT_EQ(AttentionView::cell_of(32768, 32768, 512), 64);
  EXPECT_EQ(AttentionView::cell_of(1, 32769, 512), 128);
}

TEST(AttentionView, BytesOfMassAreLogarithmic) {
  EXPECT_EQ(AttentionView::byte_of_mass(0), 1);
  EXPECT_EQ(AttentionView::byte_of_mass(1e-6), 1);
  EXPECT_EQ(AttentionView::byte_of_mass(1e-3), 61);
  EXPECT_EQ(AttentionView::byte_of_mass(1), 121);
  EXPECT_EQ(AttentionView::byte_of_mass(1.1), 121);
  EXPECT_EQ(AttentionView::byte_of_mass(std::nan("")), 1);
  for (double mass = 1.1e-6; mass < 1; mass *= 1.37) {
    EXPECT_NEAR(std::log(1e-6 * std::pow(10, (AttentionView::byte_of_mass(mass) - 1) / 20.0) / mass), 0, 0.06);
  }
}

TEST(AttentionView, EveryLevelHoldsThePooledProbabilities) {
  for (const CaseShape& shape : kShapes) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    const Problem& problem = input.problem;
    const OrderedJson report = report_of(input, {"dense"}, {1}, 150);
    ASSERT_EQ(report["heads"].size(), 1U);
    const OrderedJson& head = report["heads"][0];
    EXPECT_EQ(head["layer"], 3);
    EXPECT_EQ(head["head"], 1);
    const std::vector<double> p = probabilities(input, 1);
    ASSERT_EQ(report["levels"].size(), head["attention"].size());
    EXPECT_LE(std::max(report["levels"].back()["rows"], report["levels"].back()["columns"]), 64);
    for (std::size_t l = 0; l < report["levels"].size(); ++l) {
      const auto cell = report["levels"][l]["cell"].get<std::int64_t>();
      const auto rows = report["levels"][l]["rows"].get<std::int64_t>();
      const auto columns = report["levels"][l]["columns"].get<std::int64_t>();
      EXPECT_EQ(cell, report["cell"].get<std::int64_t>() << l);
      const auto bytes = unpack(head["attention"][l].get<std::string>(), static_cast<std::size_t>(rows * columns));
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t end = std::min(problem.q_len, (row + 1) * cell);
        for (std::int64_t column = 0; column < columns; ++column) {
          double mass = 0;
          for (std::int64_t q = row * cell; q < end; ++q) {
            for (std::int64_t k = column * cell; k < std::min(problem.kv_len, (column + 1) * cell); ++k)
              mass += p[static_cast<std::size_t>(q * problem.kv_len + k)];
          }
          const std::uint8_t byte = bytes[static_cast<std::size_t>(row * columns + column)];
          const bool allowed = !problem.causal || column * cell <= problem.q_offset_of(0) + end - 1;
          ASSERT_EQ(byte != 0, allowed) << row << ' ' << column;
          if (allowed) {
            ASSERT_NEAR(byte, AttentionView::byte_of_mass(mass / static_cast<double>(end - row * cell)), 1);
          }
        }
      }
    }
  }
}

TEST(AttentionView, PlansAndRecoveredMassAreThoseOfTheMethod) {
  for (const CaseShape& shape : kShapes) {
    SCOPED_TRACE(shape.name);
    const AttentionCase input(shape);
    const Problem& problem = input.problem;
    const std::vector<std::string> specs{"window:left=20,right=0", "oracle-topk:unit=token,k=9"};
    const OrderedJson report = report_of(input, specs, {1}, 40);
    const auto cell = report["cell"].get<std::int64_t>();
    const auto rows = report["levels"][0]["rows"].get<std::int64_t>();
    const auto columns = report["levels"][0]["columns"].get<std::int64_t>();
    const std::vector<double> p = probabilities(input, 1);
    for (std::size_t m = 0; m < specs.size(); ++m) {
      SCOPED_TRACE(specs[m]);
      const auto method = make_method(specs[m]);
      const std::vector<std::uint8_t> mask = dense_mask(method->plan(problem, input.inputs, {}));
      const OrderedJson& drawn = report["heads"][0]["methods"][m];
      EXPECT_FALSE(drawn.contains("pooled") || drawn.contains("corrected"));
      const auto kept = unpack(drawn["kept"][0].get<std::string>(), static_cast<std::size_t>(rows * columns));
      const auto tiles = unpack(drawn["tile_mass"].get<std::string>(), static_cast<std::size_t>(2 * rows));
      double total = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t end = std::min(problem.q_len, (row + 1) * cell);
        double mass = 0;
        for (std::int64_t column = 0; column < columns; ++column) {
          double computed = 0;
          double allowed = 0;
          for (std::int64_t q = row * cell; q < end; ++q) {
            for (std::int64_t k = column * cell; k < std::min(problem.kv_len, (column + 1) * cell); ++k) {
              const bool keeps = mask[static_cast<std::size_t>((problem.q_len + q) * problem.kv_len + k)] != 0;
              allowed += !problem.causal || k <= problem.q_offset_of(0) + q ? 1 : 0;
              computed += keeps ? 1 : 0;
              mass += keeps ? p[static_cast<std::size_t>(q * problem.kv_len + k)] : 0;
            }
          }
          const std::uint8_t byte = kept[static_cast<std::size_t>(row * columns + column)];
          ASSERT_NEAR(byte, allowed > 0 ? 255 * computed / allowed : 0, 1) << row << ' ' << column;
          ASSERT_EQ(byte == 0, computed == 0);
          ASSERT_EQ(byte == 255, computed > 0 && computed == allowed);
        }
        total += mass;
        std::uint16_t value = 0;
        std::memcpy(&value, tiles.data() + 2 * row, 2);
        ASSERT_NEAR(value / 65535.0, mass / static_cast<double>(end - row * cell), 1e-3) << row;
      }
      EXPECT_NEAR(drawn["mass"].get<double>(), total / static_cast<double>(problem.q_len), 1e-3);
    }
  }
}

/// Bytes of a plane at the finest level; empty where the method has none.
std::vector<std::uint8_t> plane_of(const OrderedJson& report, const char* name) {
  const OrderedJson& method = report["heads"][0]["methods"][0];
  if (!method.contains(name)) return {};
  const OrderedJson& level = report["levels"][0];
  return unpack(method[name][0].get<std::string>(),
                static_cast<std::size_t>(level["rows"].get<std::int64_t>() * level["columns"].get<std::int64_t>()));
}

TEST(AttentionView, PooledAndCorrectedPartsAreToldApart) {
  const AttentionCase input({.name = "", .q_heads = 1, .kv_heads = 1, .q_len = 512, .kv_len = 512, .causal = false});
  // PISA computes few tiles and expands all others around their means.
  const OrderedJson pisa = report_of(input, {"pisa:block=64,density=0.25"}, {0}, 16);
  const auto kept = plane_of(pisa, "kept");
  const auto corrected = plane_of(pisa, "corrected");
  EXPECT_TRUE(plane_of(pisa, "pooled").empty());
  ASSERT_EQ(kept.size(), corrected.size());
  EXPECT_NEAR(static_cast<double>(std::count(kept.begin(), kept.end(), 255)) / static_cast<double>(kept.size()), 0.25,
              0.01);
  for (std::size_t i = 0; i < kept.size(); ++i) ASSERT_EQ(kept[i] + corrected[i], 255) << i;
  EXPECT_LT(pisa["heads"][0]["methods"][0]["mass"], 0.9) << "what is corrected is not recovered";

  // PSA reads blocks at several resolutions and skips the rest.
  const OrderedJson psa = report_of(input, {"psa"}, {0}, 16);
  const auto raw = plane_of(psa, "kept");
  const auto pooled = plane_of(psa, "pooled");
  EXPECT_TRUE(plane_of(psa, "corrected").empty());
  ASSERT_EQ(raw.size(), pooled.size());
  std::map<std::string, int> seen;
  for (std::size_t i = 0; i < raw.size(); ++i) {
    ASSERT_LE(raw[i] + pooled[i], 256) << i;
    ++seen[raw[i] == 255 ? "kept" : pooled[i] == 255 ? "pooled" : raw[i] + pooled[i] == 0 ? "skipped" : "mixed"];
  }
  EXPECT_GT(seen["kept"], 0);
  EXPECT_GT(seen["pooled"], 0);
  EXPECT_GT(seen["skipped"], 0);

  // HyperAttention's samples stand for everything that its rows leave out.
  const OrderedJson hyper = report_of(input, {"hyper"}, {0}, 16);
  const auto blocks = plane_of(hyper, "kept");
  const auto sampled = plane_of(hyper, "corrected");
  if (!sampled.empty()) {
    for (std::size_t i = 0; i < blocks.size(); ++i) ASSERT_NEAR(blocks[i] + sampled[i], 255, 2) << i;
  }
}

TEST(AttentionView, DoesNotDependOnThreads) {
  const AttentionCase input(kShapes[0]);
  EXPECT_EQ(report_of(input, {"xattention:block=64", "streaming"}, {0, 3}, 64, 1),
            report_of(input, {"xattention:block=64", "streaming"}, {0, 3}, 64, 3));
}

TEST(AttentionView, TokensComeBack) {
  AttentionView view({"dense"}, {});
  const std::array<std::string, 3> tokens{"ab", "", "\xff\n"};
  view.set_tokens(tokens);
  const OrderedJson text = view.report()["text"];
  EXPECT_EQ(unpack(text["bytes"].get<std::string>(), 4), (std::vector<std::uint8_t>{'a', 'b', 0xff, '\n'}));
  EXPECT_EQ(unpack(text["lengths"].get<std::string>(), 6), (std::vector<std::uint8_t>{2, 0, 0, 0, 2, 0}));
}

TEST(AttentionView, RefusesWhatItCannotDraw) {
  const auto message = [](const auto& body) -> std::string {
    try {
      body();
    } catch (const Error& error) {
      return error.what();
    }
    return "nothing";
  };
  const AttentionCase input(kShapes[0]);
  const AttentionCase longer({.name = "", .q_len = 301, .kv_len = 301});
  const AttentionCase batch({.name = "", .batch = 2, .q_len = 30, .kv_len = 30});
  EXPECT_THAT(message([] { AttentionView({"kda"}, {}); }), HasSubstr("kda: a recurrence"));
  EXPECT_THAT(message([] { AttentionView({"tidaldecode"}, {}); }), HasSubstr("for decoding"));
  EXPECT_THAT(message([] { AttentionView({"xatention"}, {}); }), HasSubstr("xattention"));
  EXPECT_THAT(message([&] { report_of(input, {"dense"}, {0}, 8); }), HasSubstr("8 cells"));
  EXPECT_THAT(message([&] { report_of(input, {"dense"}, {4}, 64); }), HasSubstr("head 4 of 4"));
  EXPECT_THAT(message([&] { report_of(batch, {"dense"}, {0}, 64); }), HasSubstr("2 sequences"));
  EXPECT_THAT(message([&] { report_of(input, {"pisa"}, {0}, 64); }), HasSubstr("causal"));
  AttentionView view({"dense"}, {});
  const std::array<std::int64_t, 1> heads{0};
  view.add(0, input.problem, input.inputs, heads);
  EXPECT_THAT(message([&] { view.add(1, longer.problem, longer.inputs, heads); }), HasSubstr("301 queries"));
}

TEST(PackedBytes, Base64HasItsPadding) {
  const auto encode = [](std::string_view text) { return base64(std::as_bytes(std::span(text.data(), text.size()))); };
  EXPECT_EQ(encode(""), "");
  EXPECT_EQ(encode("f"), "Zg==");
  EXPECT_EQ(encode("fo"), "Zm8=");
  EXPECT_EQ(encode("foobar"), "Zm9vYmFy");
}

}  // namespace
}  // namespace tessera
