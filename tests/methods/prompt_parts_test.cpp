// What Method::prefill_tile() promises: a prompt in such parts selects the same pairs, bit for bit, and gives the same
// outputs up to the rounding of float32 sums.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>

#include "io/temporary_folder.h"
#include "methods/masks.h"

namespace tessera {
namespace {

using test::AttentionCase;

/// Specs that select little of a short prompt.
const std::vector<std::string> kInParts{
    "window:left=40",
    "streaming:n_init=4,n_local=50",
    "tri-shape:n_init=4,n_local=50,n_last=0",
    "moa:alpha=200,beta=0",
    "moa:alpha=0,beta=1",
    "quest:budget=64,dense_layers=0,decode_rows=30",
    "anchor-stripe:block=16,step=2,theta=1",
    "anchor-stripe:block=32,step=3,theta=0,local=2",
    "flexprefill:gamma=1",
    "proxyattn:gamma=1",
    "hip:dense_layers=none,mask_k=32,window=16,sinks=4,dense_queries=0",
    "hip:dense_layers=none,mask_k=32,window=16,sinks=4,dense_queries=100,block_q=20,decode_rows=45",
    "hip:form=staged,dense_layers=none,stages=32+8:128+4:64,refresh=8+4+2,keep=32,sinks=8,window=16",
    "minference:pattern=stream_llm,n_init=10,n_local=40",
    "minference:pattern=block_sparse,k=2",
    "oracle-topk:k=2,block_q=32,block_k=32",
    "oracle-topk:rule=topp,p=0.6,block_q=48,block_k=20,sinks=3,local=20",
    "oracle-topk:unit=token,k=10,block_q=16,forced=outside",
    "seer:threshold=0.1,block=16,last_dense=0",
    "sparge:block_q=32,block_k=16,theta=0.1,cdf=0.5,lambda=4,smooth=false",
    "sparge:block_q=48,block_k=32,theta=0.1,cdf=0.5,smooth=false",
    "xattention:stride=8,tau=0.6,block=32",
    "xattention:stride=4,tau=0.3,block=100",
    "moba:block_size=32,top_k=3",
    "moba:block_size=50,top_k=2",
    "nsa:length=16,stride=8,block_size=32,top_k=4,window=40",
    "softplus-reweight:reweight=false",
    "lightning2:block=32",
    "gated-deltanet:chunk=32",
    "kda:chunk=32"};

/// A method that needs the whole prompt, or larger parts, and the parts that a wrong declaration would name.
struct WrongTile {
  std::string spec;
  std::int64_t tile;
};
const std::vector<WrongTile> kNotInParts{
    {"streaming:n_init=4,n_local=50,n_last=9", 1},
    {"tri-shape:n_init=4,n_local=50", 1},
    {"moa:alpha=0,beta=0.5", 64},
    {"moa:alpha=200,beta=0", 1},
    {"quest:budget=64,dense_layers=0,decode_rows=64", 32},
    {"anchor-stripe:block=16,step=2,theta=1", 16},
    {"flexprefill:block=16,gamma=0.5,tau=0,min_budget=16", 64},
    {"flexprefill:block=16,gamma=0.5,tau=1,min_budget=16", 64},
    {"proxyattn:block=16,gamma=0.3", 64},
    {"hip:dense_layers=none,mask_k=32,window=16,sinks=4", 32},
    {"hip:dense_layers=none,mask_k=32,window=16,sinks=4,dense_queries=0", 16},
    {"hip:dense_layers=none,mask_k=32,window=16,sinks=4,dense_queries=0,representative=random", 32},
    {"hip:dense_layers=none,mask_k=32,window=16,sinks=4,dense_queries=0,decode_rows=64", 32},
    {"minference:v=60,sl=50", 64},
    {"minference:pattern=block_sparse,k=2", 32},
    {"oracle-topk:k=2,block_q=32,block_k=32", 16},
    {"oracle-topk:k=2,block_q=32,block_k=32,last_rows=2", 32},
    {"oracle-topk:k=2,block_q=32,block_k=32,dense_below=300", 32},
    {"pbs:block=16,segment=32,threshold=0.5", 64},
    {"sale:threshold=0.9,dense_below=0,block_q=16,block_k=16,segment=16,local=16", 64},
    {"sale:threshold=0.9,dense_below=300,block_q=16,block_k=16,segment=16,local=16", 64},
    {"seer:threshold=0.1,block=16", 16},
    {"seer:rule=ratio,nonzero=0.2,block=16,last_dense=0", 16},
    {"sparge:block_q=32,block_k=16,theta=0.06,cdf=0.5", 32},
    {"sparge:block_q=32,block_k=16,theta=-1,rule=topk,topk=0.2,smooth=false", 32},
    {"sparge:block_q=32,block_k=64,theta=-1,cdf=0.5,smooth=false", 32},
    {"token-sparse:tau=0.3,min_tokens=20,window=16,layers=all", 64},
    {"xattention:stride=8,tau=0.6,block=32", 16},
    {"xattention:stride=8,tau=0.6,block=32,dense_below=300", 32},
    {"delta-llm:scale=0.1", 64},
    {"dhsa:mode=topk,block=32,block_k=16", 64},
    {"dhsa:mode=vsb,block=32,block_k=16", 64},
    {"dhsa:block=32,budget=64,recent=16,sinks=4,instruction=16", 64},
    {"hyper:min_seq_len=32,block=16,samples=16", 64}};

/// For tokens of pictures and videos, which come at once.
const std::vector<std::string> kOfGrids{"gna", "psa"};

/// Views of rows [first, first + count) of an axis.
TensorView part_of(TensorView view, std::size_t axis, std::int64_t first, std::int64_t count) {
  view.data = static_cast<const std::byte*>(view.data) +
              first * view.strides.at(axis) * static_cast<std::int64_t>(size_of(view.dtype));
  view.shape.at(axis) = count;
  return view;
}

/// A prompt and what a method reads beside q, k, v.
class Prompt {
 public:
  Prompt(const Method& method, std::int64_t length)
      : method_(method), input_({.name = "prompt", .q_heads = 4, .kv_heads = 2, .q_len = length, .kv_len = length}) {
    std::mt19937 random(5);
    for (const SideInputInfo& side : method.info().side) {
      if (!side.required) continue;
      const auto shape = side_shape(side, input_.problem);
      std::vector<float>& data = sides_[side.name];
      data.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
      std::uniform_real_distribution<float> uniform(static_cast<float>(side.minimum), static_cast<float>(side.maximum));
      for (float& x : data) x = uniform(random);
    }
  }

  struct Attended {
    std::vector<std::vector<std::uint8_t>> pairs;  ///< per query and head: the keys up to the query's own
    std::vector<std::vector<float>> o;             ///< likewise
  };

  /// In parts of `part` tokens; a rest shorter than `tile` joins the part before it.
  Attended attend(std::int64_t part, std::int64_t tile) const {
    const Problem& whole = input_.problem;
    const auto state = method_.new_state();
    Attended all;
    for (std::int64_t first = 0, rows = 0; first < whole.q_len; first += rows) {
      rows = whole.q_len - first < part + tile ? whole.q_len - first : part;
      Problem problem = whole;
      problem.q_len = rows;
      problem.kv_len = first + rows;
      problem.q_offset = first;
      AttentionInputs inputs = input_.inputs;
      inputs.q = part_of(inputs.q, 2, first, rows);
      inputs.k = part_of(inputs.k, 2, 0, first + rows);
      inputs.v = part_of(inputs.v, 2, 0, first + rows);
      for (const SideInputInfo& side : method_.info().side) {
        if (side.required) inputs.side.push_back({side.name, side_of_part(side, first, rows)});
      }
      std::vector<float> o(static_cast<std::size_t>(problem.q_heads * rows * problem.value_dim));
      Plan plan;
      const PlanContext context{.layer = 6, .layers = 8, .state = state.get(), .run = {}};
      const auto view = mutable_view_of(o.data(), DType::f32, {1, problem.q_heads, rows, problem.value_dim});
      method_.attend(problem, inputs, {view, {}}, context, &plan);
      std::vector<std::uint8_t> mask;
      if (method_.info().has_plan) mask = dense_mask(plan);
      for (std::int64_t n = 0; n < rows; ++n) {
        for (std::int64_t h = 0; h < problem.q_heads; ++h) {
          const std::int64_t row = h * rows + n;
          const float* out = o.data() + row * problem.value_dim;
          all.o.emplace_back(out, out + problem.value_dim);
          const auto keys = mask.begin() + row * problem.kv_len;
          if (!mask.empty()) all.pairs.emplace_back(keys, keys + first + n + 1);
        }
      }
    }
    return all;
  }

  /// What a prompt in parts changes: nothing (empty), or the first pair or output that differs.
  std::string change(std::int64_t part, std::int64_t tile) const {
    const Attended whole = attend(input_.problem.q_len, tile);
    const Attended parts = attend(part, tile);
    const auto heads = static_cast<std::size_t>(input_.problem.q_heads);
    for (std::size_t i = 0; i < whole.pairs.size(); ++i) {
      if (whole.pairs[i] == parts.pairs[i]) continue;
      const auto [a, b] = std::mismatch(whole.pairs[i].begin(), whole.pairs[i].end(), parts.pairs[i].begin());
      return fmt::format("parts of {}: query {}, head {}: key {} is {}", part, i / heads, i % heads,
                         a - whole.pairs[i].begin(), *b != 0 ? "added" : "missing");
    }
    double largest = 0;
    for (const auto& row : whole.o) {
      for (const float x : row) largest = std::max(largest, static_cast<double>(std::abs(x)));
    }
    for (std::size_t i = 0; i < whole.o.size(); ++i) {
      for (std::size_t d = 0; d < whole.o[i].size(); ++d) {
        const double difference = std::abs(static_cast<double>(whole.o[i][d]) - static_cast<double>(parts.o[i][d]));
        if (difference <= 1e-5 * largest) continue;
        return fmt::format("parts of {}: query {}, head {}: output is {} in place of {}", part, i / heads, i % heads,
                           parts.o[i][d], whole.o[i][d]);
      }
    }
    return {};
  }

 private:
  TensorView side_of_part(const SideInputInfo& side, std::int64_t first, std::int64_t rows) const {
    TensorView view = view_of(sides_.at(side.name).data(), DType::f32, side_shape(side, input_.problem));
    for (std::size_t i = 0; i < side.axes.size(); ++i) {
      const std::size_t axis = 4 - side.axes.size() + i;
      if (side.axes[i] == SideAxis::queries) view = part_of(view, axis, first, rows);
      if (side.axes[i] == SideAxis::tokens) view = part_of(view, axis, 0, first + rows);
    }
    return view;
  }

  const Method& method_;
  AttentionCase input_;
  std::map<std::string, std::vector<float>> sides_;
};

/// The first change of a prompt in parts of different numbers of tiles.
std::string change_in_parts(const Method& method, std::int64_t tile) {
  // An odd number of tiles, so that tiles twice as large are found; the last part is one tile and a half.
  const std::int64_t step = tile * (((39 + tile) / tile) | 1);
  const std::int64_t length = std::max<std::int64_t>(3, (429 + step) / step) * step + tile + tile / 2;
  const Prompt prompt(method, length);
  std::string change = prompt.change(step, tile);
  return change.empty() ? prompt.change(2 * step, tile) : change;
}

bool runs_prompts(const MethodInfo& info) {
  return info.phases.prefill && info.domain.causal;
}

TEST(PromptParts, ChangeNothingWhereTheMethodSaysSo) {
  std::vector<std::string> specs = kInParts;
  for (const MethodEntry& entry : methods()) {
    // Tiles of thousands of queries are shown by the smaller ones of the list.
    if (runs_prompts(entry.info) && entry.info.name != "anchor-stripe") specs.push_back(entry.info.name);
  }
  for (const std::string& spec : specs) {
    SCOPED_TRACE(spec);
    const auto method = make_method(spec);
    const std::int64_t tile = method->prefill_tile();
    ASSERT_GE(tile, 0);
    if (tile == 0) {
      EXPECT_EQ(spec.find(':'), std::string::npos) << "a listed spec needs the whole prompt";
      continue;
    }
    EXPECT_EQ(change_in_parts(*method, tile), "");
  }
}

TEST(PromptParts, AWrongDeclarationIsFound) {
  for (const auto& [spec, tile] : kNotInParts) {
    SCOPED_TRACE(spec);
    const auto method = make_method(spec);
    EXPECT_TRUE(method->prefill_tile() == 0 || tile % method->prefill_tile() != 0);
    EXPECT_NE(change_in_parts(*method, tile), "") << "parts of " << tile;
  }
}

TEST(PromptParts, EveryMethodForPromptsIsShownOneWayOrTheOther) {
  for (const MethodEntry& entry : methods()) {
    if (!runs_prompts(entry.info)) continue;
    const bool refused = std::any_of(kNotInParts.begin(), kNotInParts.end(),
                                     [&](const auto& wrong) { return wrong.spec.starts_with(entry.info.name + ":"); });
    const bool of_grids = std::find(kOfGrids.begin(), kOfGrids.end(), entry.info.name) != kOfGrids.end();
    EXPECT_TRUE(entry.make("{}")->prefill_tile() > 0 || refused || of_grids) << entry.info.name;
  }
}

TEST(PromptParts, TilesOfSeveralMethodsHaveACommonOne) {
  EXPECT_EQ(common_prefill_tile(1, 1), 1);
  EXPECT_EQ(common_prefill_tile(64, 48), 192);
  EXPECT_EQ(common_prefill_tile(0, 48), 0);
  EXPECT_EQ(common_prefill_tile(48, 0), 0);
  EXPECT_EQ(common_prefill_tile((1 << 30) - 1, 1 << 30), 0);  // longer than any prompt

  testing::TemporaryFolder folder;
  const auto layers = [&](const std::string& lower, const std::string& upper) {
    folder.file("layers.json", R"({"layers": [{"layers": "0-5", )" + lower + R"(}, {"layers": "6-", )" + upper + "}]}");
    return make_method((folder.path() / "layers.json").string());
  };
  const std::string dense = R"("method": "dense")";
  const std::string tiles = R"("method": "xattention", "parameters": {"stride": 8, "tau": 0.6, "block": 32})";
  EXPECT_EQ(layers(dense, dense)->prefill_tile(), 1);
  EXPECT_EQ(layers(dense, tiles)->prefill_tile(), 32);
  EXPECT_EQ(layers(R"("method": "flexprefill")", tiles)->prefill_tile(), 0);
  EXPECT_EQ(change_in_parts(*layers(dense, tiles), 32), "");
  EXPECT_NE(change_in_parts(*layers(dense, tiles), 16), "");
}

}  // namespace
}  // namespace tessera
