// Searches as a whole: what they write is read by the methods, and prompts are what they should be.
#include "tune/tuner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "io/json.h"
#include "model/random_model.h"
#include "tune/capture.h"
#include "tune/prompts.h"

namespace tessera::tune {
namespace {

using ::testing::HasSubstr;

const Model& random_model() {
  static const Model model = [] {
    const testing::RandomModel random({.max_positions = 4096});
    const testing::TemporaryFolder folder;
    random.write(folder);
    return Model::load(folder.path());
  }();
  return model;
}

const Model& bytes_model() {
  static const Model model = Model::load(TESSERA_SOURCE_DIR "/models/tessera-bytes");
  return model;
}

TuningTask task_of(const Model& model, std::int64_t length) {
  TuningTask task;
  task.model = &model;
  task.length = length;
  return task;
}

std::unique_ptr<const Method> method_of(const Json& document, const testing::TemporaryFolder& folder) {
  return make_method(folder.file("method.json", document.dump()).string());
}

TEST(Tuners, WriteWhatTheMethodsRead) {
  random_model();  // has a folder of the same name
  const testing::TemporaryFolder folder;
  const std::map<std::string, std::string> parameters{
      {"duo", R"({"steps": 3, "passkeys": 2, "words": 2, "sink": 4, "recent": 20})"},
      {"razor", R"({"induction": 0.3})"},
      {"minference", R"({"scale": 0.1, "first_row": -1})"},
      {"sale", R"({"dense_below": 0, "error": 0.05})"},
      {"sparge", R"({"thetas": 1, "block_q": 32, "block_k": 16, "prompts": 2})"},
      {"xattention", R"({"form": "profile", "block": 64, "prompts": 2})"},
  };
  for (const auto& [name, text] : parameters) {
    SCOPED_TRACE(name);
    const Json document = tune(name, task_of(random_model(), 700), text);
    EXPECT_EQ(document["method"], name);
    EXPECT_EQ(document["tuned"]["model"]["layers"], 2);
    EXPECT_EQ(document["tuned"]["search"], Json::parse(text));
    const std::shared_ptr<const Method> method = method_of(document, folder);
    EXPECT_EQ(method->info().name, name);
    Session session(random_model(), {.prefill = method});
    session.prefill(testing::random_tokens(300, 260, 1));
    EXPECT_EQ(tune(name, task_of(random_model(), 700), text), document);  // nothing depends on the run
  }
}

TEST(Tuners, EveryDefaultIsInRange) {
  for (const TunerEntry& tuner : tuners()) {
    Json defaults = Json::object();
    for (const ParameterInfo& info : tuner.parameters) {
      const Json value = Json::parse(info.default_value, nullptr, false);
      defaults[info.name] = value.is_number() || value.is_boolean() ? value : Json(info.default_value);
      EXPECT_FALSE(info.description.empty()) << tuner.method << " " << info.name;
    }
    TuningTask task = task_of(random_model(), 3000);
    task.cancelled = [] { return true; };
    EXPECT_THROW(tune(tuner.method, task, defaults.dump()), Cancelled) << tuner.method;
    EXPECT_FALSE(tuner.paper.empty());
  }
  EXPECT_THROW(find_tuner("razr"), Error);
}

TEST(Tuners, RazorFindsTheInductionHeadOfTheEmbeddedModel) {
  const Json document = tune("razor", task_of(bytes_model(), 1200), R"({"induction": 0.0625, "echo": 0})");
  const Json& heads = document["parameters"]["heads"]["heads"];
  // Its circuit: the first kv head of the second layer.
  for (std::size_t layer = 0; layer < 4; ++layer) {
    for (std::size_t head = 0; head < 2; ++head) {
      EXPECT_EQ(heads[layer][head]["class"], layer == 1 && head == 0 ? "full" : "span") << layer << " " << head;
    }
  }
  EXPECT_GT(document["tuned"]["scores"][1]["induction"][0].get<double>(), 0.2);
}

TEST(Tuners, EndWhenAskedTo) {
  for (const TunerEntry& tuner : tuners()) {
    TuningTask task = task_of(random_model(), 3000);
    task.cancelled = [] { return true; };
    EXPECT_THROW(tune(tuner.method, task), Cancelled) << tuner.method;
  }
}

TEST(Tuners, SayWhatIsWrong) {
  const auto message = [](const std::string& name, std::int64_t length, const std::string& parameters) -> std::string {
    try {
      tune(name, task_of(random_model(), length), parameters);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_THAT(message("razor", 1 << 20, "{}"), HasSubstr("length is 1048576"));
  EXPECT_THAT(message("razor", 5, "{}"), HasSubstr("length is 5"));
  EXPECT_THAT(message("razor", 500, R"({"repeat": 3})"), HasSubstr("did you mean 'repeats'"));
  EXPECT_THAT(message("minference", 700, "{}"), HasSubstr("first_row=2500"));
  EXPECT_THAT(message("minference", 700, R"({"first_row": -1, "candidates": [["spiral", 1, 2]]})"),
              HasSubstr("candidates[0]: unknown pattern 'spiral'"));
  EXPECT_THAT(message("minference", 700, R"({"first_row": -1, "candidates": [["block_sparse", 1, 2]]})"),
              HasSubstr("equal_cost=false"));
  EXPECT_THAT(message("xattention", 700, R"({"stride": 7})"), HasSubstr("stride=7 does not divide"));
  EXPECT_THAT(message("sale", 700, "{}"), HasSubstr("run dense below dense_below=1025"));
  EXPECT_THAT(message("sparge", 700, R"({"pv_l1": 0.01})"), HasSubstr("pv_l1=0.01 is not above l1=0.07"));
}

TEST(Prompts, HoldTheirPasskeysAndAsk) {
  const Model& model = bytes_model();
  for (const PasskeyStyle style : {PasskeyStyle::words, PasskeyStyle::digits}) {
    const PasskeyOptions options{.length = 3001, .passkeys = 5, .words = 6, .style = style};
    const Prompt prompt = passkey_prompt(model, "", options, 7);
    ASSERT_EQ(prompt.tokens.size(), 3001U);
    ASSERT_EQ(prompt.answers.size(), 5U);
    EXPECT_EQ(prompt.tokens[0], 256);
    const std::string text = model.decode(prompt.tokens);
    for (const auto& [first, end] : prompt.answers) {
      const std::string answer = model.decode(
          std::span(prompt.tokens).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(end - first - 1)));
      EXPECT_LT(text.find(answer), text.find("\nWhat "));  // planted before the questions
    }
    EXPECT_EQ(prompt.answers.back().second, 3001);
    EXPECT_EQ(passkey_prompt(model, "", options, 7).tokens, prompt.tokens);
    EXPECT_NE(passkey_prompt(model, "", options, 8).tokens, prompt.tokens);
    const Prompt asked = passkey_prompt(model, "", options, 7, false);
    EXPECT_EQ(asked.tokens.size(), 3001U);
    EXPECT_TRUE(asked.answers.empty());
  }
  // Fewer where they do not fit; none that fits is an error.
  EXPECT_LT(passkey_prompt(model, "", {.length = 1500}, 1).answers.size(), 4U);
  EXPECT_THROW(passkey_prompt(model, "", {.length = 200}, 1), Error);
  // A text is the hay.
  const Prompt prompt = passkey_prompt(model, "hay ", {.length = 700, .passkeys = 2, .words = 3}, 1);
  EXPECT_THAT(model.decode(prompt.tokens), HasSubstr("hay hay hay "));
}

TEST(Prompts, RepeatOrdinaryTokensOnly) {
  const auto tokens = repeated_tokens(bytes_model(), 300, 4, 2);
  ASSERT_EQ(tokens.size(), 1200U);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    EXPECT_LT(tokens[i], 256);  // the others are special or unused
    EXPECT_EQ(tokens[i], tokens[i % 300]);
  }
  EXPECT_GT(std::set<std::int32_t>(tokens.begin(), tokens.end()).size(), 100U);
}

TEST(Capture, LayersComeOnceAndWhole) {
  const auto tokens = testing::random_tokens(1100, 260, 9);
  std::int64_t next = 0;
  for_each_layer(task_of(random_model(), 0), tokens, "test", [&](std::int64_t layer, const LayerTensors& tensors) {
    EXPECT_EQ(layer, next++);
    EXPECT_EQ(tensors.problem.q_len, 1100);
    EXPECT_NO_THROW(check_inputs(tensors.problem, tensors.inputs()));
    EXPECT_NE(tensors.k.back(), 0);
    EXPECT_NE(tensors.q[tensors.q.size() / 4], 0);  // the second head's first row
  });
  EXPECT_EQ(next, 2);
}

}  // namespace
}  // namespace tessera::tune
