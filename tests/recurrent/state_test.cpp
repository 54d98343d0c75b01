// States in memory and in files.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <functional>
#include <limits>
#include <numeric>

#include "io/safetensors.h"
#include "recurrent/recurrent_case.h"
#include "tessera/recurrent.h"

namespace tessera {
namespace {

using testing::HasSubstr;

/// A path in the test's temporary folder, removed at the end.
class TemporaryPath {
 public:
  explicit TemporaryPath(const std::string& name) : path_(testing::TempDir() + name) {}
  ~TemporaryPath() { std::filesystem::remove(path_); }
  TemporaryPath(const TemporaryPath&) = delete;
  TemporaryPath& operator=(const TemporaryPath&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(RecurrentState, SavesAndLoads) {
  const TemporaryPath file("recurrent_state.safetensors");
  RecurrentState state({.layers = 3, .sequences = 2, .heads = 2, .head_dim = 5, .value_dim = 7});
  for (std::int64_t layer = 0; layer < 3; ++layer) {
    std::iota(state.layer(layer).begin(), state.layer(layer).end(), static_cast<float>(1000 * layer));
    state.tokens(layer)[1] = 40 + layer;
  }
  state.save(file.path());
  const RecurrentState loaded = RecurrentState::load(file.path());
  EXPECT_EQ(loaded.shape(), state.shape());
  for (std::int64_t layer = 0; layer < 3; ++layer) {
    EXPECT_TRUE(std::ranges::equal(loaded.layer(layer), std::as_const(state).layer(layer)));
    EXPECT_EQ(loaded.tokens(layer)[1], 40 + layer);
  }
}

TEST(RecurrentState, ARestoredStateContinuesExactly) {
  const TemporaryPath file("recurrent_continue.safetensors");
  const test::RecurrentCase input({.batch = 2, .heads = 2, .tokens = 80, .decay = test::Decay::channel, .delta = true});
  RecurrentState state({.sequences = 2, .heads = 2, .head_dim = 16, .value_dim = 16});
  test::OwnTensor o;
  o.allocate({2, 2, 80, 16}, DType::f32);
  run_recurrent(input.problem, input.inputs, state.layer(0), o.view);
  state.save(file.path());
  const RecurrentState snapshot = state;
  run_recurrent(input.problem, input.inputs, state.layer(0), o.view);
  const std::vector<float> expected = o.numbers();
  RecurrentState restored = RecurrentState::load(file.path());
  run_recurrent(input.problem, input.inputs, restored.layer(0), o.view);
  EXPECT_EQ(o.numbers(), expected);
  RecurrentState copy = snapshot;
  run_recurrent(input.problem, input.inputs, copy.layer(0), o.view);
  EXPECT_EQ(o.numbers(), expected) << "a copy is a snapshot";
  copy.reset();
  EXPECT_EQ(copy.layer(0)[7], 0.0F);
}

TEST(RecurrentState, RefusesSizes) {
  EXPECT_THAT(message_of([] { RecurrentState({.head_dim = 0, .value_dim = 4}); }), HasSubstr("head_dim is 0"));
  EXPECT_THAT(
      message_of([] { RecurrentState({.layers = 1 << 20, .heads = 1 << 10, .head_dim = 128, .value_dim = 128}); }),
      HasSubstr("at most 2^31 elements"));
  EXPECT_THAT(message_of([] { RecurrentState({.head_dim = 4, .value_dim = 4}).layer(1); }), HasSubstr("layer is 1"));
  EXPECT_THAT(message_of([] { RecurrentState().layer(0); }), HasSubstr("layer is 0"));
  EXPECT_THAT(message_of([] { RecurrentState().save("nowhere"); }), HasSubstr("empty"));
}

TEST(RecurrentState, RefusesFilesOfAnotherKind) {
  const TemporaryPath file("recurrent_hostile.safetensors");
  const std::vector<float> values(8, 1.0F);
  const std::vector<std::int64_t> tokens(1, 3);
  const auto message = [&](std::vector<NamedTensor> tensors, const std::string& layout = "key-value") {
    write_safetensors(file.path(), tensors, {{"layout", layout}});
    return message_of([&] { RecurrentState::load(file.path()); });
  };
  const auto state = [&](std::vector<std::int64_t> shape) {
    return named_tensor<float>("state", DType::f32, std::move(shape), values);
  };
  const auto counts = [&](std::vector<std::int64_t> shape) {
    return named_tensor<std::int64_t>("tokens", DType::i64, std::move(shape), tokens);
  };
  EXPECT_EQ(message({state({1, 1, 2, 2, 2}), counts({1, 1})}), "no error");
  EXPECT_THAT(message({state({1, 1, 2, 2, 2}), counts({1, 1})}, "value-key"), HasSubstr("layout"));
  EXPECT_THAT(message({state({1, 2, 2, 2}), counts({1, 1})}), HasSubstr("expected 5 axes"));
  EXPECT_THAT(message({state({2, 1, 2, 2, 1}), counts({1, 1})}),
              HasSubstr("'tokens' has shape [1, 1]; expected [2, 1]"));
  EXPECT_THAT(message({state({1, 1, 2, 2, 2})}), HasSubstr("tokens"));
  EXPECT_THAT(message({counts({1, 1})}), HasSubstr("state"));
  EXPECT_THAT(message({named_tensor<float>("state", DType::f32, {1, 1, 0, 2, 2}, {}), counts({1, 1})}),
              HasSubstr("heads is 0"));
  const std::vector<float> bad{1, 2, 3, 4, 5, 6, 7, std::numeric_limits<float>::infinity()};
  EXPECT_THAT(message({named_tensor<float>("state", DType::f32, {1, 1, 2, 2, 2}, bad), counts({1, 1})}),
              HasSubstr("not finite"));
  const std::vector<std::int64_t> negative{-1};
  EXPECT_THAT(message({state({1, 1, 2, 2, 2}), named_tensor<std::int64_t>("tokens", DType::i64, {1, 1}, negative)}),
              HasSubstr("negative"));
  EXPECT_THAT(
      message({named_tensor<float>("tokens", DType::f32, {1, 1}, std::span(values).first(1)), state({1, 1, 2, 2, 2})}),
      testing::Not(HasSubstr("no error")));
}

}  // namespace
}  // namespace tessera
