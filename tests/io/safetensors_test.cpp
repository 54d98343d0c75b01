// safetensors: what is written is read back; every way a file can lie is refused with an Error.
#include "io/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <functional>

#include "io/temporary_folder.h"

namespace tessera {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// A file from a header text and data; the length field tells the truth unless given.
std::string file_of(const std::string& header, std::size_t data_bytes,
                    std::optional<std::uint64_t> claimed = std::nullopt) {
  const std::uint64_t length = claimed.value_or(header.size());
  std::string file;
  for (int i = 0; i < 8; ++i) file.push_back(static_cast<char>(length >> (8 * i) & 0xFF));
  return file + header + std::string(data_bytes, '\x01');
}

SafetensorsFile parse(const std::string& file) {
  return SafetensorsFile::parse(std::as_bytes(std::span(file)), "test.safetensors");
}

TEST(Safetensors, ReadsBackWhatWasWritten) {
  const testing::TemporaryFolder folder;
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  const std::vector<float> floats = {1.5F, -2.0F, 3.25F, 0.0F, 5.0F, 6.0F};
  const std::vector<std::int64_t> scalar = {-7};
  const std::vector<std::uint16_t> halves = {0x3F80};
  const std::vector<std::uint8_t> nothing;
  const std::vector<NamedTensor> tensors = {
      named_tensor<std::uint8_t>("mask", DType::u8, {3}, mask),
      named_tensor<float>("weights", DType::f32, {2, 3}, floats),
      named_tensor<std::int64_t>("scalar", DType::i64, {}, scalar),
      named_tensor<std::uint16_t>("half", DType::bf16, {1, 1}, halves),
      named_tensor<std::uint8_t>("nothing", DType::u8, {4, 0, 2}, nothing),
  };
  write_safetensors(folder / "a.safetensors", tensors, {{"format", "pt"}, {"note", "two\nlines, \"quoted\""}});

  const SafetensorsFile file = SafetensorsFile::open(folder / "a.safetensors");
  EXPECT_THAT(file.names(), ElementsAre("half", "mask", "nothing", "scalar", "weights"));
  EXPECT_EQ(file.metadata().at("note"), "two\nlines, \"quoted\"");
  EXPECT_EQ(file.copy<float>("weights"), floats);
  EXPECT_EQ(file.copy<std::uint8_t>("mask"), mask);
  EXPECT_EQ(file.copy<std::int64_t>("scalar"), scalar);
  EXPECT_EQ(file.copy<std::uint16_t>("half"), halves);
  EXPECT_EQ(file.copy<std::uint8_t>("nothing"), nothing);
  EXPECT_THAT(file.info("weights").shape, ElementsAre(2, 3));
  EXPECT_TRUE(file.info("scalar").shape.empty());
  EXPECT_EQ(file.info("weights").elements(), 6);
  std::vector<float> storage;
  EXPECT_THAT(file.values<float>("weights", storage), ::testing::ElementsAreArray(floats));
  EXPECT_TRUE(storage.empty()) << "our own files are aligned: no copy";
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1) << "no temporary file stays";
}

TEST(Safetensors, StaysReadableAfterItIsMoved) {
  const testing::TemporaryFolder folder;
  const std::vector<float> floats = {1, 2};
  const std::vector<NamedTensor> tensors = {named_tensor<float>("x", DType::f32, {2}, floats)};
  write_safetensors(folder / "a.safetensors", tensors);
  for (const FileMemory memory : {FileMemory::mapped, FileMemory::copied}) {
    SafetensorsFile first = SafetensorsFile::open(folder / "a.safetensors", memory);
    const SafetensorsFile second = std::move(first);
    EXPECT_EQ(second.copy<float>("x"), floats);
    EXPECT_EQ(second.copied_bytes() > 0, memory == FileMemory::copied);
  }
}

TEST(Safetensors, ReadsUnalignedData) {
  const std::string header = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})";
  std::string file = file_of(header, 9);
  const float numbers[2] = {0.5F, -4.0F};
  std::memcpy(file.data() + file.size() - 8, numbers, 8);
  // Whatever the buffer's own alignment, one of the four shifts leaves the floats unaligned and one aligned.
  bool copied = false;
  bool viewed = false;
  for (std::size_t shift = 0; shift < 4; ++shift) {
    std::string shifted = std::string(shift, ' ') + file;
    const auto bytes = std::as_bytes(std::span(shifted)).subspan(shift);
    const SafetensorsFile read = SafetensorsFile::parse(bytes, "shifted");
    std::vector<float> storage;
    EXPECT_THAT(read.values<float>("b", storage), ElementsAre(0.5F, -4.0F));
    (storage.empty() ? viewed : copied) = true;
  }
  EXPECT_TRUE(copied && viewed);
}

TEST(Safetensors, ReadsBooleansAndHeaderPadding) {
  const SafetensorsFile file = parse(file_of(R"({"m":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}      )", 2));
  EXPECT_EQ(file.info("m").dtype, DType::u8);
  EXPECT_EQ(file.info("m").dtype_name, "BOOL");
  EXPECT_TRUE(parse(file_of("{}", 0)).names().empty());
}

TEST(Safetensors, NamesTheNearestTensorAndTheTypeExpected) {
  const SafetensorsFile file = parse(file_of(R"({"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4));
  try {
    file.info("wieght");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("'weight'"));
  }
  try {
    file.copy<std::int32_t>("weight");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("is F32; expected i32"));
  }
}

struct BadFile {
  std::string what;
  std::string content;
  std::string message;  ///< part of the error
};

class BadSafetensors : public ::testing::TestWithParam<BadFile> {};

std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"x":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

std::string two(const std::string& first, const std::string& second) {
  return R"({"a":{"dtype":"F32","shape":[1],"data_offsets":)" + first +
         R"(},"b":{"dtype":"F32","shape":[1],"data_offsets":)" + second + "}}";
}

TEST_P(BadSafetensors, IsRefused) {
  // From memory and from a file, mapped or copied: the same checks, and never anything but Error.
  const testing::TemporaryFolder folder;
  const auto path = folder.file("bad.safetensors", GetParam().content);
  const std::vector<std::function<SafetensorsFile()>> ways = {
      [] { return parse(GetParam().content); }, [&] { return SafetensorsFile::open(path); },
      [&] { return SafetensorsFile::open(path, FileMemory::copied); }};
  for (const auto& open : ways) {
    try {
      open();
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr(GetParam().message));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Table, BadSafetensors,
    ::testing::Values(
        BadFile{"empty", "", "too few"}, BadFile{"only_length", std::string(8, '\0'), "does not start with"},
        BadFile{"seven_bytes", "1234567", "too few"},
        BadFile{"header_longer_than_file", file_of("{}", 0, 3), "claims 3"},
        BadFile{"header_length_overflows", file_of("{}", 0, ~std::uint64_t{0}), "claims 18446744073709551615"},
        BadFile{"header_length_wraps_addition", file_of("{}", 0, ~std::uint64_t{0} - 7), "claims"},
        BadFile{"not_json", file_of("{hello}", 0), "not valid JSON"},
        BadFile{"not_an_object", file_of("[1]", 0), "does not start with"},
        BadFile{"text_after_header", file_of("{} {}", 0), "not valid JSON"},
        BadFile{"invalid_utf8", file_of("{\"\xff\":1}", 0), "not valid JSON"},
        BadFile{"nested", file_of(R"({"x":)" + std::string(20, '[') + std::string(20, ']') + "}", 0), "deeper"},
        BadFile{"entry_not_object", file_of(R"({"x":3})", 0), "expected an object"},
        BadFile{"no_dtype", file_of(R"({"x":{"shape":[1],"data_offsets":[0,4]}})", 4), "'dtype' is missing"},
        BadFile{"unknown_dtype", file_of(tensor(R"("F4")", "[1]", "[0,1]"), 1), "dtype 'F4' is not known"},
        BadFile{"dtype_number", file_of(tensor("7", "[1]", "[0,1]"), 1), "expected a string"},
        BadFile{"no_shape", file_of(R"({"x":{"dtype":"F32","data_offsets":[0,4]}})", 4), "'shape' is missing"},
        BadFile{"negative_shape", file_of(tensor(R"("F32")", "[-1,-1]", "[0,4]"), 4), "negative"},
        BadFile{"fractional_shape", file_of(tensor(R"("F32")", "[1.5]", "[0,4]"), 4), "64-bit integers"},
        BadFile{"shape_not_list", file_of(tensor(R"("F32")", "1", "[0,4]"), 4), "64-bit integers"},
        BadFile{"shape_overflows", file_of(tensor(R"("F32")", "[4294967296,4294967296]", "[0,4]"), 4), "too large"},
        BadFile{"bytes_overflow", file_of(tensor(R"("F32")", "[4611686018427387905]", "[0,4]"), 4), "too large"},
        BadFile{"unsigned_shape", file_of(tensor(R"("F32")", "[18446744073709551615]", "[0,4]"), 4), "64-bit"},
        BadFile{"shape_too_small", file_of(tensor(R"("F32")", "[1]", "[0,8]"), 8), "needs 4 bytes"},
        BadFile{"shape_too_large", file_of(tensor(R"("F32")", "[3]", "[0,8]"), 8), "needs 12 bytes"},
        BadFile{"offsets_beyond_file", file_of(tensor(R"("F32")", "[2]", "[0,8]"), 4), "outside"},
        BadFile{"offsets_reversed", file_of(tensor(R"("F32")", "[1]", "[4,0]"), 4), "outside"},
        BadFile{"offsets_negative", file_of(tensor(R"("F32")", "[1]", "[-4,0]"), 4), "outside"},
        BadFile{"one_offset", file_of(tensor(R"("F32")", "[1]", "[0]"), 4), "expected 2"},
        BadFile{"no_offsets", file_of(R"({"x":{"dtype":"F32","shape":[1]}})", 4), "'data_offsets' is missing"},
        BadFile{"overlap", file_of(two("[0,4]", "[2,6]"), 6), "overlaps"},
        BadFile{"same_place", file_of(two("[0,4]", "[0,4]"), 4), "overlaps"},
        BadFile{"hole", file_of(two("[0,4]", "[8,12]"), 12), "belong to no tensor"},
        BadFile{"hole_at_start", file_of(tensor(R"("F32")", "[1]", "[4,8]"), 8), "belong to no tensor"},
        BadFile{"rest_at_end", file_of(tensor(R"("F32")", "[1]", "[0,4]"), 8), "belong to no tensor"},
        BadFile{"data_without_tensors", file_of("{}", 3), "belong to no tensor"},
        BadFile{"duplicate_name",
                file_of(R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                        R"("x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                        2),
                "twice"},
        BadFile{"metadata_not_object", file_of(R"({"__metadata__":[]})", 0), "__metadata__"},
        BadFile{"metadata_not_string", file_of(R"({"__metadata__":{"a":1}})", 0), "not a string"}),
    [](const auto& file) { return file.param.what; });

TEST(Safetensors, RefusesATruncatedFileAtEveryLength) {
  const std::string whole = file_of(two("[0,4]", "[4,8]"), 8);
  ASSERT_NO_THROW(parse(whole));
  for (std::size_t size = 0; size < whole.size(); ++size) EXPECT_THROW(parse(whole.substr(0, size)), Error) << size;
}

TEST(SafetensorsWriter, RefusesWhatItCannotWriteAndLeavesNothing) {
  const testing::TemporaryFolder folder;
  const std::vector<float> one = {1};
  const NamedTensor good = named_tensor<float>("x", DType::f32, {1}, one);
  const auto write = [&](const std::vector<NamedTensor>& tensors) { write_safetensors(folder / "x.st", tensors); };
  EXPECT_THROW(write({good, good}), Error);
  EXPECT_THROW(write({named_tensor<float>("x", DType::f32, {2}, one)}), Error);
  EXPECT_THROW(write({named_tensor<float>("x", DType::f32, {-1}, one)}), Error);
  EXPECT_THROW(write({named_tensor<float>("__metadata__", DType::f32, {1}, one)}), Error);
  EXPECT_THROW(write({named_tensor<float>("\xff", DType::f32, {1}, one)}), Error);
  EXPECT_THROW(write_safetensors(folder / "missing" / "x.st", std::vector{good}), Error);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(SafetensorsWriter, ReplacesAnEarlierFile) {
  const testing::TemporaryFolder folder;
  for (const float value : {1.0F, 2.0F}) {
    const std::vector<float> values = {value};
    write_safetensors(folder / "x.st", std::vector{named_tensor<float>("x", DType::f32, {1}, values)});
    EXPECT_EQ(SafetensorsFile::open(folder / "x.st").copy<float>("x"), values);
  }
}

}  // namespace
}  // namespace tessera
