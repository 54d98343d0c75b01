// Sessions whose methods keep the cache their own way: prefill, compression, decoding, memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "io/json.h"
#include "model/random_model.h"
#include "tessera/model.h"

namespace tessera {
namespace {

using testing::RandomModel;
using testing::RandomModelShape;
using testing::TemporaryFolder;
using Logits = std::vector<float>;

constexpr std::int64_t kPrompt = 200;
constexpr std::int64_t kSteps = 20;

struct Loaded {
  explicit Loaded(const RandomModelShape& shape = {.layers = 3}) : random(shape) { random.write(folder); }
  RandomModel random;
  TemporaryFolder folder;
  Model load() const { return Model::load(folder.path()); }
};

/// What a session gives for a prompt and some decoded tokens.
struct Outcome {
  Logits logits;  ///< after the prompt and after each decoded token
  std::size_t cache_bytes = 0;
  std::size_t peak_bytes = 0;
  double tokens_kept = 0;
};

Outcome run_session(Session& session, std::span<const std::int32_t> tokens) {
  Outcome result;
  const auto add = [&](std::span<const float> logits) {
    result.logits.insert(result.logits.end(), logits.begin(), logits.end());
  };
  add(session.prefill(tokens.first(kPrompt)));
  for (const std::int32_t token : tokens.subspan(kPrompt)) add(session.decode(token));
  result.cache_bytes = session.cache_bytes();
  result.peak_bytes = session.statistics().cache_peak_bytes;
  result.tokens_kept = session.cache_tokens_kept();
  return result;
}

Outcome run_with(const Model& model, const std::string& prefill, const std::string& decode,
                 std::optional<std::int64_t> chunk = {}) {
  SessionOptions options;
  options.prefill = make_method(prefill);
  if (!decode.empty()) options.decode = make_method(decode);
  options.page_size = 16;
  options.chunk = chunk;
  Session session(model, options);
  EXPECT_EQ(session.cache_bytes(), 0U);
  const auto tokens = testing::random_tokens(kPrompt + kSteps, 260, 4);
  Outcome result = run_session(session, tokens);
  EXPECT_EQ(session.tokens(), kPrompt + kSteps);
  // A session that was reset gives the same again.
  session.reset();
  EXPECT_EQ(session.cache_bytes(), 0U);
  EXPECT_EQ(session.cache_tokens_kept(), 0);
  EXPECT_EQ(run_session(session, tokens).logits, result.logits);
  return result;
}

double largest_difference(const Logits& a, const Logits& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  }
  return largest;
}

TEST(SessionCaches, AWholeBudgetEqualsDense) {
  const Loaded loaded;
  const Model model = loaded.load();
  const Outcome dense = run_with(model, "dense", "");
  for (const std::string spec : {"quest:dense_layers=0,budget=220", "snapkv:capacity=300",
                                 "snapkv:capacity=200,window=8", "h2o:heavy=300", "h2o:heavy=100,recent=120"}) {
    for (const std::int64_t chunk : {0, 64}) {
      const Outcome own = run_with(model, spec, "", chunk);
      EXPECT_LT(largest_difference(own.logits, dense.logits), 1e-4) << spec;
      EXPECT_EQ(own.tokens_kept, kPrompt + kSteps) << spec;
    }
  }
}

TEST(SessionCaches, ASmallBudgetHoldsLess) {
  const Loaded loaded;
  const Model model = loaded.load();
  const Outcome dense = run_with(model, "dense", "");
  struct Case {
    std::string spec;
    double kept;
  };
  for (const Case& c : {Case{"snapkv:capacity=40,window=8", 40 + kSteps}, Case{"h2o", 40}}) {
    const Outcome own = run_with(model, c.spec, "");
    EXPECT_EQ(own.tokens_kept, c.kept) << c.spec;
    EXPECT_LT(own.cache_bytes, dense.cache_bytes / 2) << c.spec;
    EXPECT_GT(largest_difference(own.logits, dense.logits), 1e-3) << c.spec;
    // One pass over the prompt: while a layer holds it whole, those before are compressed and those after empty.
    EXPECT_LT(own.peak_bytes, dense.peak_bytes * 3 / 4) << c.spec;
    // The prompt itself is dense: what follows it first is the same.
    const Logits first(own.logits.begin(), own.logits.begin() + 260);
    EXPECT_LT(largest_difference(first, {dense.logits.begin(), dense.logits.begin() + 260}), 1e-5) << c.spec;
    // The same with another prefill method, and in chunks, where every layer holds the prompt until the last chunk.
    const Outcome sparse = run_with(model, "xattention:tau=0.9,stride=4,block=32", c.spec, 64);
    EXPECT_EQ(sparse.tokens_kept, c.kept) << c.spec;
    EXPECT_LT(sparse.cache_bytes, dense.cache_bytes / 2) << c.spec;
  }
}

TEST(SessionCaches, QuestHoldsBoundsBesideThePages) {
  const Loaded loaded;
  const Model model = loaded.load();
  const Outcome dense = run_with(model, "dense", "");
  const Outcome quest = run_with(model, "quest:dense_layers=1,budget=48", "");
  EXPECT_EQ(quest.tokens_kept, kPrompt + kSteps);
  EXPECT_GT(largest_difference(quest.logits, dense.logits), 1e-3);
  EXPECT_GT(quest.cache_bytes, dense.cache_bytes);
  EXPECT_LT(quest.cache_bytes, dense.cache_bytes * 5 / 4);
}

TEST(SessionCaches, DuoHoldsLittleOfStreamingHeads) {
  const Loaded loaded;
  const Model model = loaded.load();
  const Outcome dense = run_with(model, "dense", "");
  const std::string path = (loaded.folder.path() / "heads.json").string();
  std::ofstream(path) << R"({"sink": 4, "recent": 30, "retrieval": [[1, 0], [0, 0], [1, 1]]})";
  const Outcome whole = run_with(model, "duo:recent=300,heads=" + path, "", 64);
  EXPECT_LT(largest_difference(whole.logits, dense.logits), 1e-4);
  // Chunks change nothing but the memory.
  const Outcome at_once = run_with(model, "duo:heads=" + path, "", 0);
  const Outcome chunks = run_with(model, "duo:heads=" + path, "", 16);
  EXPECT_LT(largest_difference(at_once.logits, chunks.logits), 1e-4);
  EXPECT_GT(largest_difference(at_once.logits, dense.logits), 1e-3);
  EXPECT_DOUBLE_EQ(chunks.tokens_kept, (3 * (kPrompt + kSteps) + 3 * 33) / 6.0);
  EXPECT_LT(chunks.cache_bytes, dense.cache_bytes * 3 / 4);
  EXPECT_LT(chunks.peak_bytes, dense.peak_bytes * 3 / 4);
  // A dense prompt is whole until its end; its first logits are those of dense attention.
  const Outcome dense_prompt = run_with(model, "dense", "duo:heads=" + path, 64);
  EXPECT_EQ(dense_prompt.tokens_kept, chunks.tokens_kept);
  const Logits first(dense_prompt.logits.begin(), dense_prompt.logits.begin() + 260);
  EXPECT_LT(largest_difference(first, {dense.logits.begin(), dense.logits.begin() + 260}), 1e-4);
  // A file for another model.
  std::ofstream(path) << R"({"retrieval": [[1, 0]]})";
  EXPECT_THROW(run_with(model, "duo:heads=" + path, ""), Error);
}

TEST(SessionCaches, SpansAndWindowsGiveMemoryBack) {
  const Loaded loaded;
  const Model model = loaded.load();
  const Outcome dense = run_with(model, "dense", "");
  // moa: at least 64 sinks and a block, less the place of the next token.
  const Outcome spans = run_with(model, "dense", "moa:alpha=0,beta=0.3,new_tokens=16");
  EXPECT_DOUBLE_EQ(spans.tokens_kept, 127);
  EXPECT_LT(spans.cache_bytes, dense.cache_bytes);
  for (const std::string positions : {"true", "slot"}) {
    const std::string method = "positions=" + positions + ",n_init=4,n_local=";
    const Outcome all = run_with(model, "streaming:" + method + "1000", "");
    EXPECT_LT(largest_difference(all.logits, dense.logits), 1e-4) << "nothing is dropped";
    const Outcome few = run_with(model, "dense", "streaming:" + method + "30");
    EXPECT_DOUBLE_EQ(few.tokens_kept, positions == "slot" ? 34 : 33);
    EXPECT_LT(few.cache_bytes, dense.cache_bytes * 3 / 4);
    EXPECT_GT(largest_difference(few.logits, dense.logits), 1e-3);
  }
}

TEST(SessionCaches, LayersHaveMethodsOfTheirOwn) {
  const Loaded loaded;
  const Model model = loaded.load();
  const std::string path = (loaded.folder.path() / "layers.json").string();
  std::ofstream(path) << R"({"layers": [{"layers": "0", "method": "dense"},
      {"layers": "1", "method": "snapkv", "parameters": {"capacity": 50, "window": 8}},
      {"layers": "2-", "method": "h2o", "parameters": {"heavy": 20, "recent": 10}}]})";
  // For both phases, or for decoding alone.
  for (const auto& [prefill, decode] : {std::pair<std::string, std::string>{path, ""}, {"streaming", path}}) {
    const Outcome own = run_with(model, prefill, decode);
    EXPECT_DOUBLE_EQ(own.tokens_kept, (kPrompt + kSteps + 50 + kSteps + 30) / 3.0);
  }
  std::ofstream(path) << R"({"layers": [{"layers": "0-1", "method": "dense"}]})";
  for (const bool decode : {false, true}) {
    SessionOptions options;
    (decode ? options.decode : options.prefill) = make_method(path);
    try {
      const Session session(model, options);
      FAIL() << "a model of three layers";
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), ::testing::HasSubstr("covers layers 0-1; the model has 3"));
    }
  }
}

TEST(SessionCaches, PromptsInParts) {
  const Loaded loaded;
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(150, 260, 5);
  SessionOptions options;
  options.prefill = make_method("snapkv:capacity=40,window=8");
  Session session(model, options);
  session.prefill(std::span(tokens).first(90));
  EXPECT_EQ(session.cache_tokens_kept(), 40);
  session.decode(1);
  session.prefill(std::span(tokens).subspan(90));
  EXPECT_EQ(session.cache_tokens_kept(), 40);
  EXPECT_EQ(session.tokens(), 151);
  // Density counts pairs of the sequence: the second part computed fewer than it might have seen.
  EXPECT_LT(session.statistics().density(), 1);
  EXPECT_GT(session.statistics().density(), 0.4);
}

TEST(SessionCaches, CancellingForgetsWhatCannotBeTakenBack) {
  const Loaded loaded;
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(60, 260, 6);
  int passes_left = 1000;
  SessionOptions options;
  options.prefill = make_method("snapkv:capacity=40,window=8");
  options.chunk = 30;
  options.cancelled = [&] { return passes_left-- == 0; };
  Session session(model, options);
  // In the first chunk, or in the second while no layer is compressed: as with any other cache.
  passes_left = 1;
  EXPECT_THROW(session.prefill(tokens), Cancelled);
  EXPECT_EQ(session.tokens(), 0);
  EXPECT_EQ(session.cache_tokens_kept(), 0);
  // After the first layer of the last chunk: that layer is compressed already.
  passes_left = 3;
  EXPECT_THROW(session.prefill(tokens), Cancelled);
  EXPECT_EQ(session.tokens(), 0);
  EXPECT_EQ(session.cache_bytes(), 0U);
  // The session works on, and gives what an undisturbed one gives.
  passes_left = 1000;
  const auto logits = session.prefill(tokens);
  const Logits after(logits.begin(), logits.end());
  Session fresh(model, options);
  const auto expected = fresh.prefill(tokens);
  EXPECT_EQ(after, Logits(expected.begin(), expected.end()));
}

TEST(SessionCaches, NarrowTypesAndThreads) {
  const Loaded loaded;
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(kPrompt + kSteps, 260, 7);
  for (const std::string spec : {"snapkv:capacity=40,window=8", "h2o", "quest:dense_layers=0,budget=48"}) {
    for (const CacheType dtype : {CacheType::f32, CacheType::bf16}) {
      Logits one;
      for (const int threads : {1, 2, 5}) {
        SessionOptions options;
        options.prefill = make_method(spec);
        options.kv_dtype = dtype;
        options.run.threads = threads;
        Session session(model, options);
        const Logits logits = run_session(session, tokens).logits;
        if (one.empty()) one = logits;
        EXPECT_EQ(logits, one) << spec;
      }
    }
  }
}

}  // namespace
}  // namespace tessera
