// Configurations as published models write them, and what each architecture makes of them; refusals.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "io/json.h"
#include "model/config.h"
#include "tessera/model.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;

/// Sizes that every configuration needs, with `more` merged in.
Json config_of(const char* type, const char* more) {
  Json json{{"model_type", type},       {"vocab_size", 1000},
            {"hidden_size", 64},        {"intermediate_size", 128},
            {"num_hidden_layers", 6},   {"num_attention_heads", 4},
            {"num_key_value_heads", 2}, {"max_position_embeddings", 4096},
            {"rms_norm_eps", 1e-6}};
  json.merge_patch(Json::parse(more));
  return json;
}

ModelConfig read(const char* type, const char* more) {
  return model::read_config(config_of(type, more), "c.json");
}

std::string message_of(const char* type, const char* more) {
  try {
    read(type, more);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

std::vector<std::int64_t> windows_of(const ModelConfig& config) {
  std::vector<std::int64_t> windows;
  for (const LayerConfig& layer : config.layer_kinds) windows.push_back(layer.window);
  return windows;
}

using ::testing::ElementsAre;

TEST(ArchitecturesTest, Llama31) {
  const ModelConfig config = read("llama", R"({"rope_theta":500000.0,"rope_scaling":{"factor":8.0,"low_freq_factor":1.0,
    "high_freq_factor":4.0,"original_max_position_embeddings":2048,"rope_type":"llama3"},"attention_bias":false,
    "eos_token_id":[1,8,9],"tie_word_embeddings":false,"architectures":["LlamaForCausalLM"]})");
  EXPECT_EQ(config.rope.scaling, RopeScaling::llama3);
  EXPECT_EQ(config.rope.theta, 500000);
  EXPECT_EQ(config.rope.original_positions, 2048);
  EXPECT_EQ(config.rope.factor, 8);
  EXPECT_EQ(config.eos_tokens.size(), 3U);
  EXPECT_FALSE(config.qkv_bias || config.qk_norm || config.post_norms || config.tied_head);
  EXPECT_THAT(windows_of(config), ElementsAre(0, 0, 0, 0, 0, 0));
  EXPECT_TRUE(read("llama", R"({"attention_bias":true,"mlp_bias":true})").output_bias);
}

TEST(ArchitecturesTest, MistralAndMixtral) {
  EXPECT_THAT(windows_of(read("mistral", R"({"sliding_window":4096})")),
              ElementsAre(4096, 4096, 4096, 4096, 4096, 4096));
  EXPECT_THAT(windows_of(read("mistral", R"({"sliding_window":null})")), ElementsAre(0, 0, 0, 0, 0, 0));
  const ModelConfig config = read("mixtral", R"({"num_local_experts":8,"num_experts_per_tok":2,"rope_theta":1e6})");
  EXPECT_EQ(config.experts, (ExpertsConfig{8, 2, 128, true}));
  EXPECT_TRUE(config.layer(5).experts);
}

TEST(ArchitecturesTest, Qwen) {
  // Qwen2.5 names a window that it does not use.
  const ModelConfig two =
      read("qwen2", R"({"use_sliding_window":false,"sliding_window":32768,"max_window_layers":2,"rope_theta":1e6})");
  EXPECT_TRUE(two.qkv_bias);
  EXPECT_FALSE(two.output_bias);
  EXPECT_THAT(windows_of(two), ElementsAre(0, 0, 0, 0, 0, 0));
  EXPECT_THAT(windows_of(read("qwen2", R"({"use_sliding_window":true,"sliding_window":64,"max_window_layers":4})")),
              ElementsAre(0, 0, 0, 0, 64, 64));
  EXPECT_THAT(windows_of(read("qwen2", R"({"sliding_window":64,"layer_types":["full_attention","sliding_attention",
    "full_attention","sliding_attention","full_attention","full_attention"]})")),
              ElementsAre(0, 64, 0, 64, 0, 0));
  const ModelConfig three = read("qwen3", "{}");
  EXPECT_TRUE(three.qk_norm);
  EXPECT_EQ(three.head_dim, 128);
  const ModelConfig moe = read("qwen3_moe", R"({"num_experts":16,"num_experts_per_tok":4,"moe_intermediate_size":32,
    "norm_topk_prob":true,"decoder_sparse_step":2,"mlp_only_layers":[3],"head_dim":32})");
  EXPECT_EQ(moe.experts, (ExpertsConfig{16, 4, 32, true}));
  std::vector<bool> sparse;
  for (const LayerConfig& layer : moe.layer_kinds) sparse.push_back(layer.experts);
  EXPECT_THAT(sparse, ElementsAre(false, true, false, false, false, true));
}

TEST(ArchitecturesTest, Gemma) {
  const ModelConfig one = read("gemma", R"({"hidden_act":"gelu","head_dim":16})");
  EXPECT_EQ(one.activation, Activation::gelu_tanh);  // what the published files mean
  EXPECT_TRUE(one.norm_plus_one && one.tied_head && !one.post_norms);
  EXPECT_EQ(one.embedding_scale, 8);
  const ModelConfig two = read("gemma2", R"({"hidden_activation":"gelu_pytorch_tanh","hidden_act":"silu",
    "attn_logit_softcapping":50.0,"final_logit_softcapping":30.0,"query_pre_attn_scalar":144,"sliding_window":512})");
  EXPECT_EQ(two.activation, Activation::gelu_tanh);
  EXPECT_EQ(two.head_dim, 256);
  EXPECT_EQ(two.attention_softcap, 50);
  EXPECT_EQ(two.final_softcap, 30);
  EXPECT_DOUBLE_EQ(two.attention_scale, 1 / 12.0);
  EXPECT_THAT(windows_of(two), ElementsAre(512, 0, 512, 0, 512, 0));
  const ModelConfig three = read("gemma3_text", R"({"sliding_window":256,"rope_theta":1e6,"rope_local_base_freq":5000,
    "rope_scaling":{"rope_type":"linear","factor":8},"sliding_window_pattern":3})");
  EXPECT_THAT(windows_of(three), ElementsAre(256, 256, 0, 256, 256, 0));
  EXPECT_EQ(three.layer(0).rope, LayerRope::local);
  EXPECT_EQ(three.layer(2).rope, LayerRope::global);
  EXPECT_EQ(three.local_rope.theta, 5000);
  EXPECT_EQ(three.local_rope.scaling, RopeScaling::none);
  EXPECT_EQ(three.rope.theta, 1e6);
  EXPECT_EQ(three.rope.factor, 8);
  EXPECT_EQ(three.attention_softcap, 0);
}

TEST(ArchitecturesTest, GemmaWithVision) {
  // As published: most of the text part is left to the reader.
  const ModelConfig config = model::read_config(
      Json::parse(R"({"model_type":"gemma3","architectures":["Gemma3ForConditionalGeneration"],"eos_token_id":[1,106],
    "text_config":{"hidden_size":2560,"intermediate_size":10240,"model_type":"gemma3_text","num_hidden_layers":34,
    "rope_scaling":{"factor":8.0,"rope_type":"linear"},"sliding_window":1024},"vision_config":{"hidden_size":1152}})"),
      "c.json");
  EXPECT_EQ(config.vocab_size, 262208);
  EXPECT_EQ(config.q_heads, 8);
  EXPECT_EQ(config.kv_heads, 4);
  EXPECT_EQ(config.head_dim, 256);
  EXPECT_EQ(config.rope.factor, 8);
  EXPECT_EQ(config.layer(0).window, 1024);
  EXPECT_EQ(config.layer(5).window, 0);
  EXPECT_EQ(config.eos_tokens.size(), 2U);
  EXPECT_TRUE(config.tied_head);
}

TEST(ArchitecturesTest, Phi) {
  const ModelConfig config = read("phi3", R"({"sliding_window":2047,"partial_rotary_factor":0.5,
    "original_max_position_embeddings":1024,"rope_scaling":{"type":"su","short_factor":[1,1,1,1],
    "long_factor":[2,2,2,2]}})");
  EXPECT_TRUE(config.fused_projections);
  EXPECT_EQ(config.rope.scaling, RopeScaling::longrope);
  EXPECT_EQ(config.rope.dims, 8);
  EXPECT_EQ(config.rope.original_positions, 1024);
  EXPECT_DOUBLE_EQ(config.rope.attention_factor, std::sqrt(1 + std::log(4.0) / std::log(1024.0)));
  EXPECT_EQ(config.layer(3).window, 2047);
}

TEST(ArchitecturesTest, SmolLm3) {
  const ModelConfig config = read("smollm3", "{}");
  std::vector<LayerRope> ropes;
  for (const LayerConfig& layer : config.layer_kinds) ropes.push_back(layer.rope);
  using enum LayerRope;
  EXPECT_THAT(ropes, ElementsAre(global, global, global, none, global, global));
}

TEST(ArchitecturesTest, YarnAttentionFactor) {
  EXPECT_DOUBLE_EQ(yarn_attention_factor(4), 0.1 * std::log(4.0) + 1);
  EXPECT_DOUBLE_EQ(yarn_attention_factor(40, 1, 1), 1);
  EXPECT_DOUBLE_EQ(yarn_attention_factor(40, 0.7, 0), 0.1 * std::log(40.0) + 1);
  EXPECT_DOUBLE_EQ(yarn_attention_factor(0.5), 1);
}

TEST(ArchitecturesTest, Refusals) {
  EXPECT_THAT(message_of("qwen2_moe", "{}"), HasSubstr("model_type 'qwen2_moe' is not supported; supported: llama ("));
  EXPECT_THAT(message_of("qwen2", R"({"architectures":["Qwen2ForSequenceClassification"]})"),
              HasSubstr("'Qwen2ForSequenceClassification' is not supported"));
  EXPECT_THAT(message_of("llama", R"({"sliding_window":4096})"), HasSubstr("'sliding_window' is set"));
  EXPECT_THAT(message_of("mixtral", "{}"), HasSubstr("num_local_experts"));
  EXPECT_THAT(message_of("mixtral", R"({"num_local_experts":4,"num_experts_per_tok":5})"),
              HasSubstr("'num_experts_per_tok' is 5; expected 1 to 4"));
  EXPECT_THAT(message_of("mixtral", R"({"num_local_experts":1000000000000,"num_experts_per_tok":1})"),
              HasSubstr("'num_local_experts' is 1000000000000"));
  EXPECT_THAT(message_of("qwen3_moe", R"({"num_experts":4,"num_experts_per_tok":2,"moe_intermediate_size":0})"),
              HasSubstr("'moe_intermediate_size' is 0"));
  EXPECT_THAT(message_of("qwen2", R"({"layer_types":["full_attention"]})"),
              HasSubstr("'layer_types' has 1 entries; expected num_hidden_layers 6"));
  EXPECT_THAT(message_of("qwen2", R"({"num_hidden_layers":1,"layer_types":["chunked_attention"]})"),
              HasSubstr("layer_types[0] is 'chunked_attention'; supported: full_attention, sliding_attention"));
  EXPECT_THAT(message_of("qwen2", R"({"num_hidden_layers":1,"layer_types":["sliding_attention"]})"),
              HasSubstr("'sliding_window' is not set"));
  EXPECT_THAT(message_of("mistral", R"({"sliding_window":-1})"), HasSubstr("'sliding_window' is -1; expected 1 to"));
  EXPECT_THAT(message_of("gemma2", R"({"attn_logit_softcapping":-50})"), HasSubstr("'attn_logit_softcapping' is -50"));
  EXPECT_THAT(message_of("gemma2", R"({"query_pre_attn_scalar":0})"), HasSubstr("'query_pre_attn_scalar' is 0"));
  EXPECT_THAT(message_of("gemma3_text", R"({"use_bidirectional_attention":true})"), HasSubstr("bidirectional"));
  EXPECT_THAT(message_of("smollm3", R"({"no_rope_layers":[1,1]})"), HasSubstr("'no_rope_layers' has 2 entries"));
  EXPECT_THAT(message_of("smollm3", R"({"no_rope_layers":[1,1,2,1,1,1]})"), HasSubstr("no_rope_layers[2] is 2"));
  EXPECT_THAT(message_of("phi3", R"({"partial_rotary_factor":0})"), HasSubstr("'partial_rotary_factor' is 0"));
  EXPECT_THAT(message_of("qwen2", R"({"rope_parameters":{"full_attention":{"rope_theta":2},
    "sliding_attention":{"rope_theta":3}}})"),
              HasSubstr("the two kinds of layers differ"));
}

/// What any reader of another format has to hold.
TEST(ArchitecturesTest, ValidateChecksEveryField) {
  const ModelConfig good = read("gemma3_text", R"({"sliding_window":64})");
  EXPECT_NO_THROW(validate(good, "g"));
  const auto message = [&](const auto& change) -> std::string {
    ModelConfig config = good;
    change(config);
    try {
      validate(config, "g.gguf");
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_THAT(message([](ModelConfig& c) { c.vocab_size = 0; }), HasSubstr("g.gguf: 'vocab_size' is 0; expected 1 to"));
  EXPECT_THAT(message([](ModelConfig& c) { c.layers = 5; }), HasSubstr("6 kinds of layers; expected one per layer, 5"));
  EXPECT_THAT(message([](ModelConfig& c) { c.layer_kinds[2].window = -1; }), HasSubstr("'sliding_window' is -1"));
  EXPECT_THAT(message([](ModelConfig& c) { c.rope.dims = 258; }), HasSubstr("258 rotated dimensions"));
  EXPECT_THAT(message([](ModelConfig& c) { c.local_rope.theta = 0; }), HasSubstr("'rope_theta' is 0"));
  EXPECT_THAT(message([](ModelConfig& c) { c.rope.scaling = RopeScaling::longrope; }), HasSubstr("original_positions"));
  EXPECT_THAT(message([](ModelConfig& c) {
                c.rope.scaling = RopeScaling::longrope;
                c.rope.original_positions = 10;
              }),
              HasSubstr("'short_factor' has 0 entries; expected 128"));
  EXPECT_THAT(message([](ModelConfig& c) { c.norm_epsilon = NAN; }), HasSubstr("'rms_norm_eps' is nan"));
  EXPECT_THAT(message([](ModelConfig& c) { c.final_softcap = INFINITY; }), HasSubstr("'final_logit_softcapping'"));
  EXPECT_THAT(message([](ModelConfig& c) { c.layer_kinds[0].experts = true; }), HasSubstr("'num_experts' is 0"));
  EXPECT_THAT(message([](ModelConfig& c) { c.q_heads = 3; }), HasSubstr("does not divide"));
  EXPECT_THAT(message([](ModelConfig& c) { c.eos_tokens = {1000}; }), HasSubstr("'eos_token_id' is 1000"));
}

TEST(ArchitecturesTest, ThePageNamesEveryOne) {
  const std::string page = architectures_markdown();
  for (const ArchitectureInfo& info : architectures()) {
    EXPECT_THAT(page, HasSubstr("| `" + std::string(info.name) + "` |"));
  }
  for (const char* scaling : {"linear", "dynamic", "yarn", "llama3", "longrope"}) EXPECT_THAT(page, HasSubstr(scaling));
}

}  // namespace
}  // namespace tessera
