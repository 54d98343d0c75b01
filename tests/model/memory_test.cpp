// The 8-bit cache, and refusals of prompts that do not fit the memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "model/available_memory.h"
#include "model/random_model.h"
#include "tessera/model.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;
using testing::RandomModel;
using testing::TemporaryFolder;

struct Loaded {
  explicit Loaded(const testing::RandomModelShape& shape = {}) {
    RandomModel(shape).write(folder);
    model.emplace(Model::load(folder.path()));
  }
  TemporaryFolder folder;
  std::optional<Model> model;
};

/// Logits after a prompt and after every decoded token.
std::vector<float> logits_of(const Model& model, const SessionOptions& options, std::int64_t prompt,
                             std::size_t* bytes = nullptr) {
  Session session(model, options);
  const auto tokens = testing::random_tokens(prompt + 100, 260, 5);
  const auto first = session.prefill(std::span(tokens).first(static_cast<std::size_t>(prompt)));
  std::vector<float> all(first.begin(), first.end());
  for (std::size_t i = static_cast<std::size_t>(prompt); i < tokens.size(); ++i) {
    const auto logits = session.decode(tokens[i]);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  if (bytes != nullptr) *bytes = session.cache_bytes();
  return all;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  EXPECT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, static_cast<double>(std::abs(a[i] - b[i])));
  return largest;
}

TEST(Int8Cache, StaysNearAndIsSmaller) {
  const Loaded loaded({.head_dim = 32});
  for (const char* method : {"dense", "window:left=199", "quest:dense_layers=0,budget=4096"}) {
    SessionOptions options;
    options.prefill = make_method(method);
    std::size_t exact_bytes = 0;
    std::size_t bytes = 0;
    const auto exact = logits_of(*loaded.model, options, 256, &exact_bytes);
    for (const std::int64_t chunk : {0, 50}) {
      options.kv_dtype = CacheType::i8;
      options.chunk = chunk;
      const double difference = largest_difference(exact, logits_of(*loaded.model, options, 256, &bytes));
      EXPECT_GT(difference, 1e-5) << method;
      EXPECT_LT(difference, 0.2) << method;
      if (std::string_view(method) == "dense") {
        EXPECT_LT(bytes, exact_bytes * 6 / 10);
      }
    }
  }
}

TEST(Int8Cache, DenseDecodingFromCodesEqualsWidenedRows) {
  const Loaded loaded;
  SessionOptions codes;
  codes.kv_dtype = CacheType::i8;
  SessionOptions widened = codes;
  // The same attention by another name, which reads rows.
  widened.decode = make_method("window:left=4095");
  EXPECT_LT(largest_difference(logits_of(*loaded.model, codes, 150), logits_of(*loaded.model, widened, 150)), 2e-3);
}

TEST(Int8Cache, ThreadsChangeNothing) {
  const Loaded loaded;
  SessionOptions options;
  options.kv_dtype = CacheType::i8;
  options.run.threads = 1;
  const auto one = logits_of(*loaded.model, options, 100);
  options.run.threads = 3;
  EXPECT_EQ(one, logits_of(*loaded.model, options, 100));
}

TEST(Int8Cache, AFailedPassIsTakenBackOrForgotten) {
  const Loaded loaded;
  bool cancel = false;
  SessionOptions options;
  options.kv_dtype = CacheType::i8;
  options.cancelled = [&] { return cancel; };
  Session session(*loaded.model, options);
  const auto tokens = testing::random_tokens(130, 260, 11);
  session.prefill(std::span(tokens).first(130));
  cancel = true;
  EXPECT_THROW(session.decode(1), Cancelled);
  EXPECT_EQ(session.tokens(), 130);
  EXPECT_THROW(session.prefill(tokens), Cancelled);
  EXPECT_EQ(session.tokens(), 0);  // its first layer had quantised the pass
  cancel = false;
  session.prefill(tokens);
  EXPECT_EQ(session.tokens(), 130);
}

TEST(MemoryTest, TheNeedGrowsWithWhatIsKept) {
  const Loaded loaded({.max_positions = 100000});
  SessionOptions options;
  Session f32(*loaded.model, options);
  options.kv_dtype = CacheType::bf16;
  Session bf16(*loaded.model, options);
  // 2 layers, 2 kv heads of 16, keys and values.
  const auto per_token = [](const Session& session) {
    return (session.memory_needed(0, 64000) - session.memory_needed(0, 0)) / 64000;
  };
  EXPECT_EQ(per_token(f32), 2U * 2 * 2 * 16 * 4);
  EXPECT_EQ(per_token(bf16), 2U * 2 * 2 * 16 * 2);
  EXPECT_GT(f32.memory_needed(5000), f32.memory_needed(0, 5000));  // activations
}

TEST(MemoryTest, PrefillHoldsFewActivationsAtOnceWherePartsChangeNothing) {
  const Loaded loaded({.max_positions = 1000000});
  const auto activations = [&](const SessionOptions& options) {
    const Session session(*loaded.model, options);
    constexpr std::int64_t tokens = 500000;
    return session.memory_needed(tokens) - session.memory_needed(0, tokens);
  };
  const std::size_t dense = activations({});
  EXPECT_LE(dense, std::size_t{48} << 20);
  SessionOptions whole;
  whole.chunk = 0;
  EXPECT_GT(activations(whole), 4 * dense);
  const auto with = [&](const char* prefill, const char* decode) {
    SessionOptions options;
    options.prefill = make_method(prefill);
    options.decode = make_method(decode);
    return activations(options);
  };
  EXPECT_LE(with("xattention", "dense"), std::size_t{48} << 20);
  EXPECT_LE(with("minference:pattern=block_sparse", "dense"), std::size_t{48} << 20);
  // Super-tiles of 2,048 rows; what is too short for one joins the part before it.
  EXPECT_LE(with("anchor-stripe", "dense"), (std::size_t{48} << 20) + (std::size_t{1} << 21));
  EXPECT_GT(with("flexprefill", "dense"), 4 * dense);  // looks at the last queries
  EXPECT_GT(with("xattention:dense_below=1000", "dense"), 4 * dense);
  EXPECT_GT(with("dense", "snapkv"), 4 * dense);  // all layers would be whole until the last part is in
}

/// What a prompt from token `first` on, after one of the tokens before it, gives, and the queries of each plan.
struct Prompted {
  std::vector<float> logits;
  std::vector<std::int64_t> parts;
};

Prompted prompted(const Loaded& loaded, const char* method, std::int64_t first, std::int64_t length,
                  std::optional<std::int64_t> chunk = {}) {
  Prompted result;
  SessionOptions options;
  options.prefill = make_method(method);
  options.decode = make_method("dense");
  options.chunk = chunk;
  options.on_plan = [&](std::int64_t, const Plan& plan) { result.parts.push_back(plan.problem.q_len); };
  Session session(*loaded.model, options);
  const auto tokens = testing::random_tokens(first + length, 260, 3);
  if (first > 0) session.prefill(std::span(tokens).first(static_cast<std::size_t>(first)));
  const auto last = session.prefill(std::span(tokens).subspan(static_cast<std::size_t>(first)));
  result.logits.assign(last.begin(), last.end());
  return result;
}

using Lengths = std::vector<std::int64_t>;
constexpr const char* kTiles = "xattention:tau=0.05";

// The models hold 25 KiB of activations per token, of which 48 MiB are parts of 1,024 tokens.
TEST(MemoryTest, PartsOfAPromptChangeNothingWhereTheMethodSaysSo) {
  const Loaded loaded({.layers = 1, .q_heads = 25, .kv_heads = 1, .head_dim = 128, .max_positions = 4000});
  const Prompted in_parts = prompted(loaded, kTiles, 0, 2148);
  EXPECT_EQ(in_parts.parts, (Lengths{1024, 1124}));  // 100 tokens are less than a query tile
  const Prompted whole = prompted(loaded, kTiles, 0, 2148, 0);
  EXPECT_EQ(whole.parts, (Lengths{2148}));
  EXPECT_LT(largest_difference(in_parts.logits, whole.logits), 1e-3);
}

TEST(MemoryTest, PromptsComeInPartsOfWholeTiles) {
  const Loaded loaded({.hidden = 6400, .inner = 8, .layers = 1, .q_heads = 2, .kv_heads = 1, .max_positions = 4000});
  const auto parts = [&](const char* method, std::int64_t first, std::int64_t length) {
    return prompted(loaded, method, first, length).parts;
  };
  EXPECT_EQ(parts(kTiles, 0, 2176), (Lengths{1024, 1024, 128}));
  // A prompt that continues another is in parts where its tiles lie as in the whole.
  EXPECT_EQ(parts(kTiles, 128, 1200), (Lengths{128, 1024, 176}));
  EXPECT_EQ(parts(kTiles, 100, 1200), (Lengths{100, 1200}));
  EXPECT_EQ(parts("minference:v=30,sl=50", 0, 1500), (Lengths{1500}));
  EXPECT_EQ(parts("window:left=20", 0, 1025), (Lengths{1024, 1}));
}

TEST(MemoryTest, PromptsThatDoNotFitAreRefusedBeforeTheyRun) {
  const Loaded loaded({.max_positions = 100000});
  SessionOptions options;
  Session probe(*loaded.model, options);
  const std::size_t fits = probe.memory_needed(1000);
  options.memory_limit = static_cast<std::int64_t>(fits);
  Session session(*loaded.model, options);
  const auto tokens = testing::random_tokens(1100, 260, 1);
  session.prefill(std::span(tokens).first(1000));
  session.reset();
  try {
    session.prefill(tokens);
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("a prompt of 1100 tokens"));
    EXPECT_THAT(error.what(), HasSubstr("are allowed; shorten it"));
  }
  EXPECT_EQ(session.tokens(), 0);
  // Decoded tokens count when they are announced.
  EXPECT_THROW(generate(session, std::span(tokens).first(1000), {.max_tokens = 200}), Error);
  EXPECT_NO_THROW(generate(session, std::span(tokens).first(1000), {.max_tokens = 1}));
  options.memory_limit = -1;
  Session unlimited(*loaded.model, options);
  EXPECT_NO_THROW(unlimited.check_memory(100000));
}

TEST(MemoryTest, TheMachineSaysWhatItHas) {
  const auto available = model::available_memory();
  if (!available) GTEST_SKIP() << "this system does not say";
  EXPECT_GT(*available, std::size_t{1} << 20);
  const Loaded loaded({.max_positions = std::int64_t{1} << 30});
  Session session(*loaded.model, {.capacity = std::int64_t{1} << 30});
  // 2^30 tokens of this model are 512 GiB.
  if (*available > std::size_t{1} << 39) GTEST_SKIP();
  EXPECT_THROW(session.check_memory(std::int64_t{1} << 30), Error);
}

}  // namespace
}  // namespace tessera
