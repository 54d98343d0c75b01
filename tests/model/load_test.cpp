// Model folders: configuration errors, weights that do not fit, shards, generation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>

#include "io/json.h"
#include "model/config.h"
#include "model/random_model.h"
#include "tessera/model.h"

namespace tessera {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::RandomModel;
using testing::RandomModelShape;
using testing::TemporaryFolder;

template <class Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

/// What is said about the configuration with a merge patch applied.
std::string config_message(const char* patch) {
  Json json = RandomModel({}).config();
  json.merge_patch(Json::parse(patch));
  return message_of([&] { model::read_config(json, "c.json"); });
}

TEST(ConfigTest, RefusalsNameKeyAndValue) {
  for (const char* key : {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "max_position_embeddings", "rms_norm_eps"}) {
    const std::string patch = std::string("{\"") + key + "\":null}";
    EXPECT_THAT(config_message(patch.c_str()), AllOf(HasSubstr("c.json"), HasSubstr(key), HasSubstr("missing")));
  }
  struct Case {
    const char* patch;
    const char* message;
  };
  for (const auto& [patch, message] : {
           Case{R"({"model_type":"mamba"})",
                "model_type 'mamba' is not supported; supported: llama (LlamaForCausalLM), mistral"},
           Case{R"({"architectures":["LlamaForSequenceClassification"]})", "LlamaForSequenceClassification"},
           Case{R"({"attention_bias":3})", "attention_bias"},
           Case{R"({"hidden_act":"relu"})", "hidden_act 'relu' is not supported; supported: silu, gelu"},
           Case{R"({"rope_scaling":{"type":"mrope","factor":2}})", "type 'mrope', which is not supported; supported"},
           Case{R"({"rope_scaling":{"type":"linear"}})", "'factor' is missing"},
           Case{R"({"rope_scaling":{"rope_type":"llama3","factor":8}})", "low_freq_factor"},
           Case{R"({"rope_scaling":{"rope_type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":4}})",
                "expected more than low_freq_factor 4"},
           Case{R"({"rope_scaling":{"rope_type":"dynamic","factor":0.5}})", "expected at least 1"},
           Case{R"({"rope_parameters":{"rope_type":"yarn","factor":-2}})", "'factor' is -2"},
           Case{R"({"rope_parameters":{"rope_type":"yarn","beta_fast":0}})", "'beta_fast' is 0"},
           Case{R"({"rope_scaling":{"type":"longrope","short_factor":[1,2]}})",
                "expected half of the rotated dimensions"},
           Case{R"({"rope_scaling":{"type":"longrope"}})", "'short_factor' is missing; expected a list of 8 numbers"},
           Case{R"({"rope_scaling":{"type":"longrope","short_factor":[1,1,1,1,1,1,1,1],)"
                R"("long_factor":[1,1,1,1,1,1,1,0]}})",
                "'long_factor' is 0; expected a positive number"},
           Case{R"({"rope_scaling":7})", "rope_scaling"},
           Case{R"({"partial_rotary_factor":1.5})", "'partial_rotary_factor' is 1.5; expected above 0 and at most 1"},
           Case{R"({"partial_rotary_factor":0.2})", "leaves 3 of 16 dimensions"},
           Case{R"({"rope_theta":-1})", "'rope_theta' is -1"},
           Case{R"({"rms_norm_eps":0})", "'rms_norm_eps' is 0"},
           Case{R"({"sliding_window":4096})", "'sliding_window' is set"},
           Case{R"({"quantization_config":{}})", "'quantization_config' is set"},
           Case{R"({"hidden_size":0})", "'hidden_size' is 0; expected 1 to"},
           Case{R"({"hidden_size":1e3})", "'hidden_size' is 1000.0; expected a 64-bit integer"},
           Case{R"({"vocab_size":9223372036854775807})", "expected 1 to"},
           Case{R"({"num_hidden_layers":100000})", "expected 1 to 4096"},
           Case{R"({"num_key_value_heads":3})", "num_key_value_heads 3 does not divide num_attention_heads 4"},
           Case{R"({"head_dim":15})", "head_dim is 15"},
           Case{R"({"head_dim":null,"hidden_size":22})", "num_attention_heads 4 does not divide hidden_size 22"},
           Case{R"({"bos_token_id":260})", "'bos_token_id' is 260; expected an id below vocab_size 260"},
           Case{R"({"eos_token_id":[1,-1]})", "'eos_token_id' is -1"},
           Case{R"({"eos_token_id":"x"})", "eos_token_id"},
       }) {
    EXPECT_THAT(config_message(patch), HasSubstr(message)) << patch;
  }
  EXPECT_EQ(config_message(R"({"rope_scaling":{"rope_type":"default"},"eos_token_id":[1,2]})"), "no error");
}

TEST(ConfigTest, DefaultsFollowTheFormat) {
  Json json = RandomModel({}).config();
  for (const char* key : {"num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta"}) json.erase(key);
  json["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5e5}};
  const ModelConfig config = model::read_config(json, "c");
  EXPECT_EQ(config.kv_heads, 4);
  EXPECT_EQ(config.head_dim, 6);
  EXPECT_FALSE(config.tied_head);
  EXPECT_EQ(config.rope.theta, 5e5);
}

/// What loading says after `change` has had its way with a good folder.
template <class Change>
std::string load_message(const Change& change, const RandomModelShape& shape = {}) {
  const TemporaryFolder folder;
  const RandomModel random(shape);
  random.write(folder);
  change(folder, random);
  return message_of([&] { Model::load(folder.path()); });
}

TEST(LoadTest, WeightsThatDoNotFit) {
  const auto reshaped = [](const char* key, std::int64_t value) {
    return load_message([&](const TemporaryFolder& folder, const RandomModel& random) {
      Json config = random.config();
      config[key] = value;
      folder.file("config.json", config.dump());
    });
  };
  EXPECT_THAT(reshaped("vocab_size", 259),
              HasSubstr("'model.embed_tokens.weight' has shape [260, 24]; config.json asks"));
  EXPECT_THAT(reshaped("num_hidden_layers", 3), HasSubstr("'model.layers.2.input_layernorm.weight' is missing"));
  EXPECT_THAT(reshaped("num_hidden_layers", 1), HasSubstr("has no place in the model"));
  EXPECT_THAT(reshaped("head_dim", 18), HasSubstr("self_attn.q_proj.weight' has shape [64, 24]"));
  EXPECT_THAT(
      load_message([](const auto& folder, const auto&) { std::filesystem::remove(folder / "model.safetensors"); }),
      HasSubstr("neither model.safetensors nor model.safetensors.index.json"));
  EXPECT_THAT(load_message([](const auto& folder, const auto&) { std::filesystem::remove(folder / "config.json"); }),
              HasSubstr("config.json"));
  EXPECT_THAT(load_message([](const auto& folder, const auto&) {
                std::filesystem::resize_file(folder / "model.safetensors", 5000);
              }),
              HasSubstr("model.safetensors"));
  EXPECT_THAT(load_message([](const auto&, const auto&) {}, {.vocab = 100}), HasSubstr("vocab_size 100 is too small"));
  EXPECT_THAT(message_of([] { Model::load("/nonexistent"); }), HasSubstr("is neither a folder"));
  EXPECT_EQ(load_message([](const auto&, const auto&) {}), "no error");
}

/// Splits the tensors over two files and writes the index.
Json write_shards(const TemporaryFolder& folder, const RandomModel& random) {
  std::filesystem::remove(folder / "model.safetensors");
  Json map = Json::object();
  for (const int shard : {0, 1}) {
    const std::string file = "model-" + std::to_string(shard) + ".safetensors";
    const auto chosen = [&](const std::string& name) { return (name.size() % 2 == 0) == (shard == 0); };
    for (const std::string& name : random.write_tensors(folder / file, chosen)) map[name] = file;
  }
  return {{"weight_map", map}};
}

TEST(LoadTest, ShardsEqualOneFile) {
  const TemporaryFolder folder;
  const RandomModel random({});
  random.write(folder);
  const auto tokens = testing::random_tokens(20, 260, 1);
  const auto logits = [&] {
    const Model model = Model::load(folder.path());
    Session session(model, {});
    const auto row = session.prefill(tokens);
    return std::vector<float>(row.begin(), row.end());
  };
  const auto whole = logits();
  folder.file("model.safetensors.index.json", write_shards(folder, random).dump());
  EXPECT_EQ(whole, logits());
}

TEST(LoadTest, LyingIndexes) {
  const auto message = [](const char* patch) {
    return load_message([&](const TemporaryFolder& folder, const RandomModel& random) {
      Json index = write_shards(folder, random);
      index.merge_patch(Json::parse(patch));
      folder.file("model.safetensors.index.json", index.dump());
    });
  };
  EXPECT_EQ(message("{}"), "no error");
  EXPECT_THAT(message(R"({"weight_map":{"model.norm.weight":"../model-0.safetensors"}})"), HasSubstr("same folder"));
  EXPECT_THAT(message(R"({"weight_map":{"model.norm.weight":"absent.safetensors"}})"), HasSubstr("absent.safetensors"));
  EXPECT_THAT(message(R"({"weight_map":{"extra":"model-0.safetensors"}})"), HasSubstr("tensor 'extra' is not in"));
  EXPECT_THAT(message(R"({"weight_map":3})"), HasSubstr("'weight_map' is no object"));
}

TEST(GenerateTest, BitsPerByteIsTheCodeLength) {
  const TemporaryFolder folder;
  const RandomModel random({});
  random.write(folder);
  const Model model = Model::load(folder.path());
  const auto prompt = testing::random_tokens(50, 256, 2);
  const auto expected = random.forward(prompt);
  double bits = 0;
  for (std::size_t i = 0; i + 1 < prompt.size(); ++i) {
    double sum = 0;
    for (const double logit : expected[i]) sum += std::exp(logit);
    bits -= std::log2(std::exp(expected[i][static_cast<std::size_t>(prompt[i + 1])]) / sum);
  }
  for (const std::int64_t chunk : {0, 7}) {
    Session session(model, {.chunk = chunk});
    const Generation generation = generate(session, prompt, {.max_tokens = 0, .bits_per_byte = true});
    EXPECT_NEAR(generation.bits_per_byte.value_or(-1), bits / 49, 1e-5);
    EXPECT_TRUE(generation.tokens.empty());
  }
}

TEST(GenerateTest, GreedyFollowsTheDefinition) {
  const TemporaryFolder folder;
  const RandomModel random({});
  random.write(folder);
  const Model model = Model::load(folder.path());
  std::vector<std::int32_t> sequence = testing::random_tokens(12, 256, 3);
  Session session(model, {});
  std::string streamed;
  const Generation generation =
      generate(session, sequence, {.max_tokens = 8, .on_text = [&](std::string_view bytes) { streamed += bytes; }});
  for (const std::int32_t token : generation.tokens) {
    const auto logits = random.forward(sequence).back();
    EXPECT_EQ(token, std::max_element(logits.begin(), logits.end()) - logits.begin());
    sequence.push_back(token);
  }
  EXPECT_EQ(generation.tokens.size(), 8U);
  EXPECT_EQ(streamed, generation.text);
}

TEST(GenerateTest, GoldenTokens) {
  const TemporaryFolder folder;
  const RandomModel random({.seed = 2026});
  random.write(folder);
  const Model model = Model::load(folder.path());
  std::vector<std::int32_t> sequence = model.encode("The plan is");
  Session session(model, {});
  const Generation generation = generate(session, sequence, {.max_tokens = 16});
  EXPECT_THAT(generation.tokens,
              ::testing::ElementsAre(75, 229, 185, 156, 148, 133, 215, 65, 78, 8, 48, 240, 223, 136, 28, 135));
  // The winners lead by far more than float32 rounding: the list is the same on every machine.
  sequence.insert(sequence.end(), generation.tokens.begin(), generation.tokens.end());
  const auto logits = random.forward(sequence);
  for (std::size_t i = sequence.size() - 17; i + 1 < sequence.size(); ++i) {
    std::vector<double> row = logits[i];
    std::partial_sort(row.begin(), row.begin() + 2, row.end(), std::greater<>());
    EXPECT_GT(row[0] - row[1], 1e-3) << i;
  }
}

TEST(GenerateTest, StopsAtTheEndTokenAndAtTheLimit) {
  const TemporaryFolder folder;
  const RandomModel random({.max_positions = 16});
  random.write(folder);
  const auto prompt = testing::random_tokens(12, 256, 3);
  std::vector<std::int32_t> tokens;
  {
    const Model model = Model::load(folder.path());
    Session session(model, {});
    tokens = generate(session, prompt, {.max_tokens = 100}).tokens;
    EXPECT_EQ(tokens.size(), 5U);  // the one after the 16th position is known without a place for it
    Session sampled(model, {});
    const SamplingOptions sampling{.temperature = 2, .top_p = 0.9, .seed = 3};
    Session again(model, {});
    EXPECT_EQ(generate(sampled, prompt, {.max_tokens = 5, .sampling = sampling}).tokens,
              generate(again, prompt, {.max_tokens = 5, .sampling = sampling}).tokens);
  }
  Json config = random.config();
  config["eos_token_id"] = {tokens[1]};
  config["bos_token_id"] = 258;
  folder.file("config.json", config.dump());
  const Model model = Model::load(folder.path());
  Session session(model, {});
  EXPECT_EQ(generate(session, prompt, {.max_tokens = 100}).tokens.back(), tokens[1]);
  EXPECT_EQ(model.encode("A"), (std::vector<std::int32_t>{258, 65}));
  EXPECT_EQ(model.encode("A", false), (std::vector<std::int32_t>{65}));
}

}  // namespace
}  // namespace tessera
