// GGUF headers, good and bad, and blocks against their definition.
#include "io/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "io/temporary_folder.h"
#include "tessera/core.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;

/// Writes the bytes of a file piece by piece.
class Writer {
 public:
  template <class T>
  Writer& number(T value) {
    const auto* p = reinterpret_cast<const std::byte*>(&value);
    bytes_.insert(bytes_.end(), p, p + sizeof value);
    return *this;
  }
  Writer& text(std::string_view value) {
    number<std::uint64_t>(value.size());
    const auto* p = reinterpret_cast<const std::byte*>(value.data());
    bytes_.insert(bytes_.end(), p, p + value.size());
    return *this;
  }
  Writer& header(std::uint64_t tensors, std::uint64_t values, std::uint32_t version = 3) {
    for (const char c : std::string_view("GGUF")) number(c);
    return number(version).number(tensors).number(values);
  }
  /// A tensor's entry: axes as the file has them, the contiguous one first.
  Writer& tensor(std::string_view name, const std::vector<std::uint64_t>& axes, std::uint32_t type,
                 std::uint64_t offset) {
    text(name).number(static_cast<std::uint32_t>(axes.size()));
    for (const std::uint64_t axis : axes) number(axis);
    return number(type).number(offset);
  }
  Writer& pad(std::size_t alignment, std::size_t data) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment + data);
    return *this;
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

std::string message_of(const Writer& writer) {
  try {
    GgufFile::parse(writer.bytes(), "f");
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(GgufTest, MetadataConverts) {
  Writer writer;
  writer.header(0, 7);
  writer.text("u").number<std::uint32_t>(4).number<std::uint32_t>(7);
  writer.text("f").number<std::uint32_t>(6).number(0.5F);
  writer.text("b").number<std::uint32_t>(7).number<std::uint8_t>(1);
  writer.text("s").number<std::uint32_t>(8).text("hello");
  writer.text("l").number<std::uint32_t>(9).number<std::uint32_t>(5).number<std::uint64_t>(2);
  writer.number<std::int32_t>(-3).number<std::int32_t>(4);
  writer.text("t").number<std::uint32_t>(9).number<std::uint32_t>(8).number<std::uint64_t>(2).text("a").text("");
  writer.text("big").number<std::uint32_t>(10).number<std::uint64_t>(~std::uint64_t{0});
  const GgufFile file = GgufFile::parse(writer.bytes(), "f");
  EXPECT_EQ(file.get<std::int64_t>("u"), 7);
  EXPECT_EQ(file.get<double>("u"), 7.0);
  EXPECT_EQ(file.get<double>("f"), 0.5);
  EXPECT_TRUE(file.get<bool>("b"));
  EXPECT_EQ(file.get<std::string>("s"), "hello");
  EXPECT_EQ(file.get<std::vector<std::int64_t>>("l"), (std::vector<std::int64_t>{-3, 4}));
  EXPECT_EQ(file.get<std::vector<std::string>>("t"), (std::vector<std::string>{"a", ""}));
  EXPECT_EQ(file.get_or<std::int64_t>("absent", 5), 5);
  const auto message = [](const std::function<void()>& action) -> std::string {
    try {
      action();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_THAT(message([&] { file.get<std::int64_t>("f"); }), HasSubstr("f: 'f' has another type; expected an integer"));
  EXPECT_THAT(message([&] { file.get<std::int64_t>("big"); }), HasSubstr("'big' has another type"));
  EXPECT_THAT(message([&] { file.get<std::int64_t>("l"); }), HasSubstr("'l' has another type"));
  EXPECT_THAT(message([&] { file.get<std::vector<std::int64_t>>("u"); }), HasSubstr("expected a list"));
  EXPECT_THAT(message([&] { file.get<std::string>("none"); }), HasSubstr("the key 'none' is missing"));
  EXPECT_THAT(message([&] { file.tensor("x"); }), HasSubstr("tensor 'x' is missing"));
}

TEST(GgufTest, TensorsLieWhereTheTableSays) {
  for (const std::uint32_t version : {2U, 3U}) {
    Writer writer;
    writer.header(2, 1, version).text("general.alignment").number<std::uint32_t>(4).number<std::uint32_t>(64);
    writer.tensor("a", {4, 3}, 0, 64).tensor("q", {32, 2}, 8, 128).pad(64, 196);
    const GgufFile file = GgufFile::parse(writer.bytes(), "f");
    const GgufTensor& a = file.tensor("a");
    EXPECT_EQ(a.shape, (std::vector<std::int64_t>{3, 4}));
    EXPECT_EQ(file.bytes(a).size(), 48U);
    EXPECT_EQ(file.bytes(file.tensor("q")).data(), writer.bytes().data() + writer.bytes().size() - 68);
    EXPECT_EQ(file.tensor("q").type, GgmlType::q8_0);
  }
}

TEST(GgufTest, RefusalsNameWhatIsWrong) {
  const auto with_tensor = [](const std::vector<std::uint64_t>& axes, std::uint32_t type, std::uint64_t offset) {
    Writer writer;
    writer.header(1, 0).tensor("w", axes, type, offset).pad(32, 1024);
    return message_of(writer);
  };
  EXPECT_EQ(with_tensor({16, 16}, 0, 0), "no error");
  EXPECT_THAT(with_tensor({16, 17}, 0, 0), HasSubstr("tensor 'w' lies at bytes 0 to 1088 of the data, which has 1024"));
  EXPECT_THAT(with_tensor({16, 16}, 0, 32), HasSubstr("lies at bytes 32"));
  EXPECT_THAT(with_tensor({16, 16}, 0, ~std::uint64_t{31}), HasSubstr("lies at bytes"));
  EXPECT_THAT(with_tensor({4}, 0, 5), HasSubstr("no multiple of the alignment 32"));
  EXPECT_THAT(with_tensor({33}, 8, 0), HasSubstr("rows of 33 numbers; Q8_0 has blocks of 32"));
  EXPECT_THAT(with_tensor({4}, 16, 0), HasSubstr("type 16, which is not supported; supported: F32"));
  EXPECT_THAT(with_tensor({0}, 0, 0), HasSubstr("axis of 0"));
  EXPECT_THAT(with_tensor({std::uint64_t{1} << 40, std::uint64_t{1} << 40}, 0, 0), HasSubstr("fewer than 2^62"));
  EXPECT_THAT(with_tensor({std::uint64_t{1} << 61}, 0, 0), HasSubstr("blocks of 4 bytes; the file has"));
  EXPECT_THAT(with_tensor({1, 1, 1, 1, 1}, 0, 0), HasSubstr("has 5 axes"));
  EXPECT_THAT(with_tensor({}, 0, 0), HasSubstr("has 0 axes"));
  EXPECT_THAT(message_of(Writer().header(2, 0).tensor("w", {8}, 0, 0).tensor("v", {8}, 0, 0).pad(32, 64)),
              HasSubstr("overlap"));
  EXPECT_THAT(message_of(Writer().header(2, 0).tensor("w", {8}, 0, 0).tensor("w", {8}, 0, 32).pad(32, 64)),
              HasSubstr("tensor 'w' is there twice"));
  EXPECT_THAT(message_of(Writer().header(1, 0).tensor("w", {8}, 0, 0)), HasSubstr("ends before the data"));
  EXPECT_THAT(message_of(Writer().number<std::uint64_t>(0)), HasSubstr("is no GGUF file"));
  EXPECT_THAT(message_of(Writer().number<std::uint16_t>(0)), HasSubstr("ends within the magic number"));
  EXPECT_THAT(message_of(Writer().header(0, 0, 1)), HasSubstr("version 1 is not supported; supported: 2, 3"));
  EXPECT_THAT(message_of(Writer().header(~std::uint64_t{0}, 0)), HasSubstr("expected at most"));
  EXPECT_THAT(message_of(Writer().header(0, 1)), HasSubstr("ends within the name of a metadata entry"));
  EXPECT_THAT(message_of(Writer().header(0, 1).text("k").number<std::uint32_t>(99).number<std::uint64_t>(0)),
              HasSubstr("'k' has values of type 99"));
  EXPECT_THAT(message_of(Writer().header(0, 1).text("k").number<std::uint32_t>(8).number(~std::uint64_t{0})),
              HasSubstr("ends within k"));
  for (const std::uint32_t type : {4U, 8U}) {
    Writer writer;
    writer.header(0, 1).text("k").number<std::uint32_t>(9).number(type).number(std::uint64_t{1} << 60);
    EXPECT_THAT(message_of(writer), HasSubstr("'k' says that it holds 1152921504606846976"));
  }
  Writer twice;
  twice.header(0, 2).text("k").number<std::uint32_t>(0).number<std::uint8_t>(1);
  twice.text("k").number<std::uint32_t>(0).number<std::uint8_t>(1);
  EXPECT_THAT(message_of(twice), HasSubstr("'k' is there twice"));
  Writer odd;
  odd.header(0, 1).text("general.alignment").number<std::uint32_t>(4).number<std::uint32_t>(48);
  EXPECT_THAT(message_of(odd), HasSubstr("'general.alignment' is 48; expected a power of two"));
}

TEST(GgufTest, EveryCutIsAnError) {
  Writer writer;
  writer.header(1, 2).text("a").number<std::uint32_t>(8).text("text");
  writer.text("l").number<std::uint32_t>(9).number<std::uint32_t>(2).number<std::uint64_t>(3);
  writer.number<std::uint16_t>(1).number<std::uint16_t>(2).number<std::uint16_t>(3);
  writer.tensor("w", {8}, 0, 0).pad(32, 32);
  for (std::size_t size = 0; size < writer.bytes().size(); ++size) {
    EXPECT_THROW(GgufFile::parse(std::span(writer.bytes()).first(size), "f"), Error) << size;
  }
  EXPECT_EQ(message_of(writer), "no error");
}

TEST(GgufTest, FilesAreMappedOrCopied) {
  Writer writer;
  writer.header(1, 1).text("a").number<std::uint32_t>(8).text("text");
  writer.tensor("w", {2}, 0, 0).pad(32, 0).number(1.5F).number(-2.5F);
  const std::string content(reinterpret_cast<const char*>(writer.bytes().data()), writer.bytes().size());
  const testing::TemporaryFolder folder;
  const auto whole = folder.file("whole.gguf", content);
  const auto cut = folder.file("cut.gguf", std::string_view(content).substr(0, content.size() - 4));
  for (const FileMemory memory : {FileMemory::mapped, FileMemory::copied}) {
    GgufFile first = GgufFile::open(whole, memory);
    const GgufFile file = std::move(first);
    EXPECT_EQ(file.name(), whole.string());
    EXPECT_EQ(file.get<std::string>("a"), "text");
    float numbers[2];
    ASSERT_EQ(file.bytes(file.tensor("w")).size(), sizeof numbers);
    std::memcpy(numbers, file.bytes(file.tensor("w")).data(), sizeof numbers);
    EXPECT_THAT(numbers, ::testing::ElementsAre(1.5F, -2.5F));
    EXPECT_EQ(file.copied_bytes() > 0, memory == FileMemory::copied);
    try {
      GgufFile::open(cut, memory);
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("cut.gguf: tensor 'w' lies at bytes 0 to 8 of the data, which has 4"));
    }
  }
}

TEST(GgmlBlocksTest, SmallBlocksByHand) {
  std::vector<float> out(256);
  const auto widen = [&](GgmlType type, const std::vector<std::uint8_t>& bytes) {
    dequantise(type, reinterpret_cast<const std::byte*>(bytes.data()), block_of(type).numbers, out.data());
  };
  std::vector<std::uint8_t> q8(34);
  q8[1] = 0x38;  // 0.5
  q8[2] = 0x80;
  q8[33] = 3;
  widen(GgmlType::q8_0, q8);
  EXPECT_EQ(out[0], -64.0F);
  EXPECT_EQ(out[31], 1.5F);
  std::vector<std::uint8_t> q5(24);
  q5[1] = 0x3C;  // 1
  q5[3] = 0xC0;  // -2
  q5[4] = 1;     // the fifth bit of the first number
  q5[8] = 0x9F;
  widen(GgmlType::q5_1, q5);
  EXPECT_EQ(out[0], 29.0F);
  EXPECT_EQ(out[16], 7.0F);
  // Scales of group 5: low bits in byte 9, high bits in byte 1; minima in bytes 9 and 5.
  std::vector<std::uint8_t> q4(144);
  q4[1] = 0x3C;
  q4[3] = 0x3C;
  q4[4 + 1] = 0x80;        // high bits of the scale: 2
  q4[4 + 5] = 0x40;        // high bits of the minimum: 1
  q4[4 + 9] = 0x21;        // low bits: scale 1, minimum 2
  q4[16 + 64 + 0] = 0x30;  // the first number of group 5 is 3
  widen(GgmlType::q4_k, q4);
  EXPECT_EQ(out[160], 33.0F * 3 - 18.0F);
}

}  // namespace
}  // namespace tessera
