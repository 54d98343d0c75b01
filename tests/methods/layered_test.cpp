// A method per range of layers, from JSON.
#include "methods/layered.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "methods/masks.h"

namespace tessera {
namespace {

using testing::HasSubstr;

std::unique_ptr<const Method> layered(const std::string& text) {
  return make_layered_method(parse_json(text, "text"), "file.json");
}

std::string message_of(const std::string& text) {
  try {
    layered(text);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

const char* const kThree = R"({"layers": [
  {"layers": "2-", "method": "window", "parameters": {"left": 9}},
  {"layers": "0", "method": "dense"},
  {"layers": "1-1", "method": "streaming", "parameters": {"n_init": 2, "n_local": 5}}]})";

PlanContext layer_of(std::int64_t layer, std::int64_t layers) {
  PlanContext context;
  context.layer = layer;
  context.layers = layers;
  return context;
}

TEST(Layered, EveryLayerRunsItsMethod) {
  const auto method = layered(kThree);
  const test::AttentionCase input({.name = "square", .q_len = 100, .kv_len = 100});
  const char* const specs[] = {"dense", "streaming:n_init=2,n_local=5", "window:left=9", "window:left=9"};
  for (std::int64_t layer = 0; layer < 4; ++layer) {
    const auto expected = make_method(specs[layer])->plan(input.problem, input.inputs, {});
    EXPECT_TRUE(method->plan(input.problem, input.inputs, layer_of(layer, 4)) == expected) << layer;
    std::vector<float> o(static_cast<std::size_t>(2 * 100 * 8));
    Plan executed;
    method->attend(input.problem, input.inputs, {mutable_view_of(o.data(), DType::f32, {1, 2, 100, 8}), {}},
                   layer_of(layer, 4), &executed);
    EXPECT_TRUE(executed == expected) << layer;
  }
}

TEST(Layered, ReportsWhatRuns) {
  const auto method = layered(kThree);
  const Json parameters = Json::parse(method->parameters());
  ASSERT_EQ(parameters["layers"].size(), 3U);
  EXPECT_EQ(parameters["layers"][0]["layers"], "0");
  EXPECT_EQ(parameters["layers"][1]["layers"], "1");
  EXPECT_EQ(parameters["layers"][1]["parameters"]["n_local"], 5);
  EXPECT_EQ(parameters["layers"][2]["layers"], "2-");
  // What it reports is a configuration again.
  EXPECT_EQ(layered(method->parameters())->parameters(), method->parameters());
}

TEST(Layered, SupportsWhatAllPartsSupport) {
  EXPECT_TRUE(layered(kThree)->info().phases.decode);
  EXPECT_TRUE(layered(kThree)->info().own_cache);  // of streaming
  const auto mixed = layered(R"({"layers": [{"layers": "0", "method": "dense"},
                                            {"layers": "1-", "method": "xattention"}]})");
  EXPECT_TRUE(mixed->info().phases.prefill);
  EXPECT_FALSE(mixed->info().phases.decode);
  EXPECT_FALSE(mixed->info().own_cache);
  EXPECT_TRUE(mixed->runs_its_plan());
  EXPECT_FALSE(layered(R"({"layers": [{"layers": "0", "method": "dense"}, {"layers": "1-", "method": "nsa"}]})")
                   ->runs_its_plan());
}

TEST(Layered, StatesAndCachesBelongToTheirLayers) {
  const auto method = layered(R"({"layers": [{"layers": "0", "method": "dense"},
                                             {"layers": "1", "method": "snapkv"},
                                             {"layers": "2-", "method": "quest", "parameters": {"dense_layers": 0}}]})");
  EXPECT_TRUE(method->info().own_cache);
  const LayerCacheShape shape{
      .q_heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8, .page_size = 16, .capacity = 64};
  EXPECT_EQ(method->new_cache(shape, layer_of(0, 3)), nullptr);
  EXPECT_NE(method->new_cache(shape, layer_of(1, 3)), nullptr);
  EXPECT_EQ(method->new_cache(shape, layer_of(2, 3)), nullptr);
  const auto state = method->new_state();
  const test::AttentionCase input({.name = "decode", .q_len = 1, .kv_len = 500});
  PlanContext context = layer_of(2, 3);
  context.state = state.get();
  method->plan(input.problem, input.inputs, context);
  EXPECT_GT(state->memory_bytes(), 0U);
}

TEST(Layered, NamesLayersWithoutOrWithTwoMethods) {
  EXPECT_THAT(message_of(R"({"layers": [{"layers": "0-3", "method": "dense"}, {"layers": "3-", "method": "dense"}]})"),
              HasSubstr("'file.json': layer 3 is covered twice"));
  EXPECT_THAT(message_of(R"({"layers": [{"layers": "0-", "method": "dense"}, {"layers": "5", "method": "dense"}]})"),
              HasSubstr("layer 5 is covered twice"));
  EXPECT_THAT(message_of(R"({"layers": [{"layers": "0-1", "method": "dense"}, {"layers": "4-", "method": "dense"}]})"),
              HasSubstr("layers 2-3 have no method"));
  EXPECT_THAT(message_of(R"({"layers": [{"layers": "1-", "method": "dense"}]})"), HasSubstr("layers 0-0 have no"));
  const auto two = layered(R"({"layers": [{"layers": "0-1", "method": "dense"}]})");
  EXPECT_NO_THROW(two->check_model(2, 4, 2));
  const auto complaint = [&](const Method& method, std::int64_t layers) {
    try {
      method.check_model(layers, 4, 2);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(complaint(*two, 4), HasSubstr("covers layers 0-1; the model has 4"));
  EXPECT_THAT(complaint(*two, 1), HasSubstr("names layers 0-1; the model has 1"));
  EXPECT_THAT(complaint(*layered(kThree), 2), HasSubstr("names layers 2-; the model has 2"));
  const test::AttentionCase input({.name = "one", .q_len = 3, .kv_len = 3});
  EXPECT_THROW(two->plan(input.problem, input.inputs, layer_of(0, 4)), Error);
}

TEST(Layered, RefusesOtherText) {
  EXPECT_THAT(message_of(R"({"layers": []})"), HasSubstr("is not a JSON object"));
  EXPECT_THAT(message_of(R"({"layers": [], "method": "dense"})"), HasSubstr("is not a JSON object"));
  EXPECT_THAT(message_of(R"({"layers": [{"method": "dense"}]})"), HasSubstr("layers[0] has no key 'layers'"));
  EXPECT_THAT(message_of(R"({"layers": [{"layers": "0-"}]})"), HasSubstr("layers[0] is not a JSON object"));
  EXPECT_THAT(message_of(R"({"layers": [{"layers": "0-", "method": "dens"}]})"), HasSubstr("did you mean 'dense'"));
  EXPECT_THAT(message_of(R"({"layers": [{"layers": "0-", "method": "dense", "parameter": 1}]})"),
              HasSubstr("unknown key 'parameter'"));
  EXPECT_THAT(message_of(R"({"layers": [{"layers": "0-", "method": "window", "parameters": {"left": -7}}]})"),
              HasSubstr("left=-7 is outside"));
  for (const char* range : {"\"\"", "\"a\"", "\"-1\"", "\"2-1\"", "\"0-1-2\"", "\"1,2\"", "\"0 -\"", "0", "[0,1]",
                            "\"99999999999999999999\"", "\"2000000\""}) {
    EXPECT_THAT(message_of(std::string(R"({"layers": [{"method": "dense", "layers": )") + range + "}]}"),
                HasSubstr("is not a range"))
        << range;
  }
}

}  // namespace
}  // namespace tessera
