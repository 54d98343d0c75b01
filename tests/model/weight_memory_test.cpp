// Weights mapped and copied.
#include "model/weight_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "model/available_memory.h"
#include "model/random_model.h"
#include "tessera/model.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;
using testing::RandomModel;
using testing::TemporaryFolder;

std::vector<float> logits_of(const Model& model) {
  Session session(model, {});
  const auto row = session.prefill(testing::random_tokens(20, 260, 1));
  std::vector<float> logits(row.begin(), row.end());
  const auto next = session.decode(7);
  logits.insert(logits.end(), next.begin(), next.end());
  return logits;
}

template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(WeightMemoryTest, LogitsAreTheSame) {
  for (const DType storage : {DType::f32, DType::bf16}) {
    const TemporaryFolder folder;
    const RandomModel random({.vocab = 9000, .hidden = 64, .storage = storage});  // more than a huge page
    random.write(folder);
    const auto size = std::filesystem::file_size(folder / "model.safetensors");
    const Model mapped = Model::load(folder.path(), {.weights = WeightMemory::mapped});
    const auto expected = logits_of(mapped);
    for (const int threads : {0, 1, 3}) {
      const Model copied = Model::load(folder.path(), {.weights = WeightMemory::copied, .threads = threads});
      EXPECT_EQ(expected, logits_of(copied));
      // The copy counts once, and mapped pages do not.
      EXPECT_GE(copied.weight_bytes(), mapped.weight_bytes() + size);
      EXPECT_LT(copied.weight_bytes(), mapped.weight_bytes() + size + (std::size_t{2} << 20));
      EXPECT_EQ(Session(copied, {}).memory_needed(100), Session(mapped, {}).memory_needed(100));
    }
    const Model chosen = Model::load(folder.path());
    EXPECT_EQ(expected, logits_of(chosen));
    const auto available = model::available_memory();
    EXPECT_EQ(chosen.weight_bytes() > mapped.weight_bytes(), available && size <= *available / 2);
  }
}

TEST(WeightMemoryTest, ShardsAreCopiedToo) {
  const TemporaryFolder folder;
  const RandomModel random({});
  random.write(folder);
  const auto expected = logits_of(Model::load(folder.path()));
  std::filesystem::remove(folder / "model.safetensors");
  Json map = Json::object();
  for (const bool even : {false, true}) {
    const std::string file = even ? "even.safetensors" : "odd.safetensors";
    const auto chosen = [&](const std::string& name) { return (name.size() % 2 == 0) == even; };
    for (const std::string& name : random.write_tensors(folder / file, chosen)) map[name] = file;
  }
  folder.file("model.safetensors.index.json", Json{{"weight_map", map}}.dump());
  for (const WeightMemory weights : {WeightMemory::mapped, WeightMemory::copied}) {
    EXPECT_EQ(expected, logits_of(Model::load(folder.path(), {.weights = weights})));
  }
  std::filesystem::resize_file(folder / "odd.safetensors", 5000);
  for (const WeightMemory weights : {WeightMemory::mapped, WeightMemory::copied}) {
    EXPECT_THAT(message_of([&] { Model::load(folder.path(), {.weights = weights}); }), HasSubstr("odd.safetensors"));
  }
}

TEST(WeightMemoryTest, HalfOfTheMemoryIsForWeights) {
  const auto choose = [](std::uintmax_t bytes, WeightMemory wanted, std::optional<std::size_t> available) {
    return model::memory_of_weights(bytes, wanted, available, "w.gguf");
  };
  EXPECT_EQ(choose(500, WeightMemory::automatic, 1000), FileMemory::copied);
  EXPECT_EQ(choose(501, WeightMemory::automatic, 1000), FileMemory::mapped);
  EXPECT_EQ(choose(1, WeightMemory::automatic, {}), FileMemory::mapped);
  EXPECT_EQ(choose(1, WeightMemory::mapped, 1000), FileMemory::mapped);
  EXPECT_EQ(choose(1000, WeightMemory::copied, 1000), FileMemory::copied);
  EXPECT_EQ(choose(1000, WeightMemory::copied, {}), FileMemory::copied);
  EXPECT_THAT(message_of([&] { choose(30'000'000'000, WeightMemory::copied, 20'000'000'000); }),
              HasSubstr("w.gguf: the weights have 30.0 GB and 20.0 GB are available; map them"));
}

TEST(WeightMemoryTest, AllShardsCountTogether) {
  const auto available = model::available_memory();
  if (!available) GTEST_SKIP() << "this system does not say";
  const TemporaryFolder folder;
  std::vector<std::filesystem::path> files;
  for (const char* name : {"a", "b", "c"}) {
    files.push_back(folder.file(name, ""));
    std::error_code error;
    std::filesystem::resize_file(files.back(), *available / 4, error);  // holes
    if (error) GTEST_SKIP() << "this file system has no such files";
  }
  EXPECT_EQ(model::memory_of_weights({files[0]}, WeightMemory::automatic), FileMemory::copied);
  EXPECT_EQ(model::memory_of_weights(files, WeightMemory::automatic), FileMemory::mapped);
  EXPECT_EQ(model::memory_of_weights({folder / "missing"}, WeightMemory::automatic), FileMemory::copied);
  std::filesystem::resize_file(files[0], *available * 4);
  EXPECT_THAT(message_of([&] { model::memory_of_weights(files, WeightMemory::copied); }), HasSubstr("are available"));
}

TEST(WeightMemoryTest, Names) {
  for (const WeightMemory memory : {WeightMemory::automatic, WeightMemory::mapped, WeightMemory::copied}) {
    EXPECT_EQ(weight_memory_from_name(name_of(memory)), memory);
  }
  EXPECT_EQ(name_of(WeightMemory::automatic), "auto");
  EXPECT_THAT(message_of([] { weight_memory_from_name("huge"); }),
              HasSubstr("weights is 'huge'; expected auto, mapped or copied"));
}

}  // namespace
}  // namespace tessera
