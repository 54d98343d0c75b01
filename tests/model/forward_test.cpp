// The forward pass against its float64 definition; chunks, decode, caches, methods, threads.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "io/json.h"
#include "model/random_model.h"
#include "tessera/model.h"

namespace tessera {
namespace {

using testing::RandomModel;
using testing::RandomModelShape;
using testing::TemporaryFolder;
using Logits = std::vector<float>;

/// Logits of every prompt position, [tokens * vocab].
Logits prefill_logits(const Model& model, std::span<const std::int32_t> tokens, SessionOptions options = {}) {
  Session session(model, std::move(options));
  Logits all;
  const auto last = session.prefill(tokens, {.on_logits =
                                                 [&](std::int64_t first, std::span<const float> rows) {
                                                   EXPECT_EQ(first * model.config().vocab_size,
                                                             static_cast<std::int64_t>(all.size()));
                                                   all.insert(all.end(), rows.begin(), rows.end());
                                                 },
                                             .on_progress = {}});
  EXPECT_TRUE(std::equal(last.begin(), last.end(), all.end() - model.config().vocab_size));
  return all;
}

double largest_difference(const Logits& a, const Logits& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  }
  return largest;
}

double difference_from(const std::vector<std::vector<double>>& expected, const Logits& actual) {
  double largest = 0;
  std::size_t i = 0;
  for (const auto& row : expected) {
    for (const double logit : row) largest = std::max(largest, std::abs(logit - static_cast<double>(actual.at(i++))));
  }
  EXPECT_EQ(i, actual.size());
  return largest;
}

struct Loaded {
  explicit Loaded(const RandomModelShape& shape) : random(shape) { random.write(folder); }
  RandomModel random;
  TemporaryFolder folder;
  Model load() const { return Model::load(folder.path()); }
};

class Forward : public ::testing::TestWithParam<RandomModelShape> {};

TEST_P(Forward, EqualsTheDefinition) {
  const Loaded loaded(GetParam());
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(45, GetParam().vocab, 3);
  const auto expected = loaded.random.forward(tokens);
  EXPECT_LT(difference_from(expected, prefill_logits(model, tokens, {.exact_products = true})), 2e-4);
  // Activations in bf16 have 8 bits, on machines with products of bf16 and for weights of bf16 only.
  EXPECT_LT(difference_from(expected, prefill_logits(model, tokens)), GetParam().storage == DType::bf16 ? 0.1 : 2e-4);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Forward,
                         ::testing::Values(RandomModelShape{}, RandomModelShape{.kv_heads = 4, .tied = true},
                                           RandomModelShape{.q_heads = 3, .kv_heads = 1, .head_dim = 10},
                                           RandomModelShape{.hidden = 33, .inner = 7, .layers = 3, .head_dim = 32},
                                           RandomModelShape{.vocab = 700, .storage = DType::bf16},
                                           RandomModelShape{.tied = true, .storage = DType::f16}));

TEST(ForwardChunks, AnyChunkLengthEqualsTheWholePrompt) {
  const Loaded loaded({});
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(150, 260, 4);
  const Logits whole = prefill_logits(model, tokens, {.chunk = 0});
  for (const std::int64_t chunk : {1, 7, 16, 63, 64, 65, 149, 150, 1000}) {
    EXPECT_LT(largest_difference(whole, prefill_logits(model, tokens, {.chunk = chunk})), 1e-4) << chunk;
  }
}

TEST(ForwardDecode, StepByStepEqualsPrefill) {
  const Loaded loaded({});
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(90, 260, 5);
  const Logits whole = prefill_logits(model, tokens);
  for (const std::int64_t page_size : {16, 64}) {
    Session session(model, {.page_size = page_size});
    Logits steps;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const auto logits = i == 0 ? session.prefill(std::span(tokens).first(1)) : session.decode(tokens[i]);
      steps.insert(steps.end(), logits.begin(), logits.end());
    }
    EXPECT_LT(largest_difference(whole, steps), 1e-4) << page_size;
    EXPECT_EQ(session.tokens(), 90);
    EXPECT_EQ(session.statistics().decode_tokens, 89);
  }
}

TEST(ForwardDecode, PromptsInPartsEqualOnePrompt) {
  const Loaded loaded({});
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(70, 260, 6);
  Session session(model, {});
  session.prefill(std::span(tokens).first(33));
  const auto logits = session.prefill(std::span(tokens).subspan(33));
  const Logits whole = prefill_logits(model, tokens);
  EXPECT_LT(largest_difference({whole.end() - 260, whole.end()}, {logits.begin(), logits.end()}), 1e-4);
}

TEST(ForwardCache, NarrowTypesStayNear) {
  const Loaded loaded({});
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(100, 260, 7);
  const Logits exact = prefill_logits(model, tokens);
  const double bf16 = largest_difference(exact, prefill_logits(model, tokens, {.kv_dtype = CacheType::bf16}));
  const double f16 = largest_difference(exact, prefill_logits(model, tokens, {.kv_dtype = CacheType::f16}));
  EXPECT_GT(bf16, 1e-5);
  EXPECT_LT(bf16, 0.1);
  EXPECT_GT(f16, 1e-6);
  EXPECT_LT(f16, 0.02);
}

TEST(ForwardCache, QueriesAreRoundedAsTheirKeysWherePairsAreMultiplied) {
  const Loaded loaded({});
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(100, 260, 9);
  // Of the prompt, and of tokens that are decoded after it.
  const auto decoded_logits = [&](const SessionOptions& options) {
    Session session(model, options);
    session.prefill(tokens);
    Logits all;
    for (const std::int32_t token : {3, 200, 41, 7}) {
      const auto logits = session.decode(token);
      all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
  };
  for (const Isa isa : supported_isas()) {
    for (const bool decoding : {false, true}) {
      SCOPED_TRACE(std::string(name_of(isa)) + (decoding ? ", decoding" : ", prompt"));
      const auto run = [&](CacheType cache, bool exact_products) {
        SessionOptions options;
        options.run.isa = isa;
        options.kv_dtype = cache;
        options.exact_products = exact_products;
        return decoding ? decoded_logits(options) : prefill_logits(model, tokens, options);
      };
      const Logits rounded = run(CacheType::bf16, false);
      const Logits exact = run(CacheType::bf16, true);
      const double difference = largest_difference(exact, rounded);
      if (isa == Isa::avx512_bf16) {
        EXPECT_GT(difference, 1e-6);
      } else {
        EXPECT_EQ(difference, 0);
      }
      // What rounding the queries adds is no more than what rounding keys and values did.
      EXPECT_LT(difference, 2 * largest_difference(run(CacheType::f32, false), exact));
    }
  }
}

TEST(ForwardThreads, ResultsDoNotDependOnThem) {
  const Loaded loaded({});
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(200, 260, 8);
  const auto logits = [&](int threads) {
    SessionOptions options;
    options.run.threads = threads;
    return prefill_logits(model, tokens, options);
  };
  const Logits one = logits(1);
  EXPECT_EQ(one, logits(2));
  EXPECT_EQ(one, logits(5));
}

TEST(ForwardMethods, DensityAndPlansAreReported) {
  const Loaded loaded({});
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(300, 260, 9);
  std::vector<std::int64_t> layers;
  SessionOptions options;
  options.prefill = make_method("window:left=31");
  options.chunk = 100;
  options.on_plan = [&](std::int64_t layer, const Plan& plan) {
    EXPECT_EQ(plan.problem.q_len, 100);
    layers.push_back(layer);
  };
  Session session(model, options);
  session.prefill(tokens);
  // Query p sees min(p + 1, 32) keys.
  EXPECT_NEAR(session.statistics().density(), (31 * 32 / 2.0 + 269 * 32.0) / (300 * 301 / 2.0), 1e-9);
  EXPECT_THAT(layers, ::testing::ElementsAre(0, 1, 0, 1, 0, 1));
  EXPECT_EQ(session.statistics().prefill_tokens, 300);
  EXPECT_GT(session.cache_bytes(), 0U);
  session.reset();
  EXPECT_EQ(session.cache_bytes(), 0U);
  EXPECT_EQ(session.tokens(), 0);
  EXPECT_EQ(session.statistics().density(), 0);
}

TEST(ForwardMethods, AWindowOverTheWholePromptEqualsDense) {
  const Loaded loaded({});
  const Model model = loaded.load();
  const auto tokens = testing::random_tokens(140, 260, 10);
  const Logits dense = prefill_logits(model, tokens);
  EXPECT_LT(largest_difference(dense, prefill_logits(model, tokens, {.prefill = make_method("window:left=511")})),
            1e-5);
  EXPECT_GT(largest_difference(dense, prefill_logits(model, tokens, {.prefill = make_method("window:left=3")})), 1e-2);
}

template <class Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(SessionErrors, NameWhatIsWrong) {
  using ::testing::HasSubstr;
  const Loaded loaded({.max_positions = 40});
  const Model model = loaded.load();
  Session session(model, {});
  EXPECT_THAT(message_of([&] { session.prefill(std::vector<std::int32_t>(41, 1)); }), HasSubstr("limit of 40"));
  EXPECT_THAT(message_of([&] {
                session.prefill(std::vector<std::int32_t>{1, 260});
              }),
              HasSubstr("token 260 at place 1"));
  EXPECT_THAT(message_of([&] { session.prefill({}); }), HasSubstr("no tokens"));
  EXPECT_EQ(session.tokens(), 0);
  EXPECT_THAT(message_of([&] { Session(model, {.decode = make_method("xattention")}); }),
              HasSubstr("does not support decode"));
  EXPECT_THAT(message_of([&] { cache_type_from_name("f64"); }), HasSubstr("expected f32, bf16, f16 or i8"));
  EXPECT_THAT(message_of([&] { Session(model, {.decode = make_method("snapkv"), .kv_dtype = CacheType::i8}); }),
              HasSubstr("keeps its own cache"));
  EXPECT_THAT(message_of([&] { Session(model, {.chunk = -1}); }), HasSubstr("chunk is -1"));
  session.prefill(std::vector<std::int32_t>(40, 1));
  EXPECT_THAT(message_of([&] { session.decode(1); }), HasSubstr("limit of 40"));
}

TEST(SessionErrors, CancellingKeepsTheSession) {
  const Loaded loaded({});
  const Model model = loaded.load();
  bool cancel = false;
  Session session(model, {.cancelled = [&] { return cancel; }});
  const auto tokens = testing::random_tokens(30, 260, 11);
  session.prefill(tokens);
  cancel = true;
  EXPECT_THROW(session.prefill(tokens), Cancelled);
  EXPECT_EQ(session.tokens(), 30);
  cancel = false;
  session.decode(1);
  EXPECT_EQ(session.tokens(), 31);
}

}  // namespace
}  // namespace tessera
