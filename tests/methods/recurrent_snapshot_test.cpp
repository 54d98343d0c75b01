// Snapshots of the states of recurrent methods: copies and files that continue exactly, and files of another kind.
#include "tessera/recurrent_snapshot.h"

#include <gmock/gmock.h>

#include <limits>

#include "io/safetensors.h"
#include "io/temporary_folder.h"
#include "methods/linear/linear_case.h"

namespace tessera {
namespace {

using test::LinearCase;
using test::message_of;
using ::testing::HasSubstr;

/// The first `keys` keys of a case with their queries, from `first` on.
std::vector<float> attend_rows(const LinearCase& input, const Method& method, MethodState& state, std::int64_t layer,
                               std::int64_t first, std::int64_t last) {
  Problem part = input.problem();
  part.q_len = last - first;
  part.kv_len = last;
  AttentionInputs inputs = input.input.inputs;
  const auto cut = [](TensorView& view, std::int64_t begin, std::int64_t end, std::size_t axis) {
    if (begin > 0) view.data = view.row(0, 0, begin);
    view.shape.at(axis) = end - begin;
  };
  cut(inputs.q, first, last, 2);
  cut(inputs.k, 0, last, 2);
  cut(inputs.v, 0, last, 2);
  for (SideTensor& side : inputs.side) {
    if (side.name == "g") cut(side.view, 0, last, side.view.shape[3] == input.problem().head_dim ? 2 : 3);
    if (side.name == "beta") cut(side.view, 0, last, 3);
  }
  std::vector<float> o(static_cast<std::size_t>(part.q_heads * part.q_len * part.value_dim));
  PlanContext context;
  context.layer = layer;
  context.layers = 8;
  context.state = &state;
  method.attend(part, inputs,
                {mutable_view_of(o.data(), DType::f32, {1, part.q_heads, part.q_len, part.value_dim}), {}}, context);
  return o;
}

TEST(RecurrentSnapshot, CopiesAndFilesContinueExactly) {
  const testing::TemporaryFolder folder;
  for (const std::string name : {"lightning2", "gated-deltanet", "kda"}) {
    LinearCase input({.name = "case", .q_heads = 4, .kv_heads = 2, .q_len = 120, .kv_len = 120});
    if (name != "lightning2") {
      input.add_gates(4, name == "kda" ? 16 : 0, -1, 0);
      // The tails of convolutions are part of the state.
      input.add("conv_q", {4, 4, 16}, input.draw(4 * 4 * 16, -1, 1));
      input.add("conv_k", {2, 4, 16}, input.draw(2 * 4 * 16, -1, 1));
      input.add("conv_v", {2, 3, 8}, input.draw(2 * 3 * 8, -1, 1));
    }
    const auto method = make_method(name);
    const auto state = method->new_state();
    for (const std::int64_t layer : {0, 5}) attend_rows(input, *method, *state, layer, 0, 70);
    const auto path = folder / (name + ".safetensors");
    save_recurrent_state(*state, path);
    const auto copy = copy_recurrent_state(*state);
    const auto loaded = load_recurrent_state(path);
    for (const std::int64_t layer : {0, 5}) {
      const auto expected = attend_rows(input, *method, *state, layer, 70, 120);
      // The original has moved on; a draft of 30 tokens is thrown away.
      const auto draft = copy_recurrent_state(*copy);
      attend_rows(input, *method, *draft, layer, 70, 100);
      EXPECT_EQ(attend_rows(input, *method, *copy, layer, 70, 120), expected) << name;
      EXPECT_EQ(attend_rows(input, *method, *loaded, layer, 70, 120), expected) << name;
    }
  }
}

TEST(RecurrentSnapshot, RefusesStatesOfOtherMethods) {
  const auto state = make_method("quest")->new_state();
  EXPECT_THAT(message_of([&] { copy_recurrent_state(*state); }), HasSubstr("not one of a recurrent method"));
  EXPECT_THAT(message_of([&] { save_recurrent_state(*state, "nowhere"); }), HasSubstr("not one of a recurrent method"));
}

TEST(RecurrentSnapshot, RefusesFilesOfAnotherKind) {
  const testing::TemporaryFolder folder;
  const auto path = folder / "hostile.safetensors";
  const std::vector<float> values(8, 1.0F);
  const std::vector<std::int64_t> tokens(2, 3);
  const auto message = [&](const std::vector<NamedTensor>& tensors,
                           const std::string& format = "tessera-recurrent-method") {
    write_safetensors(path, tensors, {{"format", format}});
    return message_of([&] { load_recurrent_state(path); });
  };
  const auto floats = [&](const std::string& name, std::vector<std::int64_t> shape) {
    return named_tensor<float>(name, DType::f32, std::move(shape), std::span<const float>(values));
  };
  const auto counts = [&](const std::string& name) {
    return named_tensor<std::int64_t>(name, DType::i64, {2}, std::span<const std::int64_t>(tokens));
  };
  EXPECT_EQ(message({floats("layer.0.state", {2, 1, 2, 2}), counts("layer.0.tokens")}), "no error");
  EXPECT_THAT(message({floats("layer.0.state", {2, 1, 2, 2}), counts("layer.0.tokens")}, "other"),
              HasSubstr("'format'"));
  EXPECT_THAT(message({floats("layer.0.state", {2, 2, 2}), counts("layer.0.tokens")}), HasSubstr("expected 4 axes"));
  EXPECT_THAT(message({floats("layer.0.state", {1, 2, 2, 2}), counts("layer.0.tokens")}),
              HasSubstr("'layer.0.tokens' has shape [2]; expected [1]"));
  EXPECT_THAT(message({floats("layer.0.state", {2, 1, 2, 2})}), HasSubstr("layer.0.tokens"));
  EXPECT_THAT(message({floats("layer.0.tail.conv_q", {8})}), HasSubstr("layer 0 has no tensor"));
  EXPECT_THAT(message({floats("layer.x.state", {2, 1, 2, 2})}), HasSubstr("unknown tensor 'layer.x.state'"));
  EXPECT_THAT(message({floats("layer.0.other", {8})}), HasSubstr("unknown tensor 'layer.0.other'"));
  const std::vector<float> undefined(8, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THAT(
      message({named_tensor<float>("layer.0.state", DType::f32, {2, 1, 2, 2}, std::span<const float>(undefined)),
               counts("layer.0.tokens")}),
      HasSubstr("not finite"));
  EXPECT_THROW(load_recurrent_state(folder / "missing.safetensors"), Error);
}

}  // namespace
}  // namespace tessera
