// Files as memory, mapped and copied.
#include "io/file_bytes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <random>
#include <string>

#include "io/temporary_folder.h"
#include "tessera/core.h"

namespace tessera {
namespace {

using ::testing::HasSubstr;
using testing::TemporaryFolder;

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::string random_bytes(std::size_t size) {
  std::mt19937_64 random(size);
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

std::string_view text_of(const FileBytes& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

std::string message_of(const std::filesystem::path& path, FileMemory memory) {
  try {
    const FileBytes file(path, memory);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(FileBytes, BothWaysGiveTheSameBytes) {
  const TemporaryFolder folder;
  // Sizes about a page, a huge page, and the pieces that threads read.
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, kPage - 1, kPage, kPage + 1, kHugePage - 1, kHugePage, kHugePage + 1,
        4 * kHugePage - 1, 4 * kHugePage, 4 * kHugePage + 1, 9 * kHugePage + 12345}) {
    const std::string content = random_bytes(size);
    const auto path = folder.file("bytes", content);
    const FileBytes mapped(path);
    EXPECT_TRUE(text_of(mapped) == content) << size;
    EXPECT_EQ(mapped.copied_bytes(), 0U);
    for (const int threads : {0, 1, 3, 1000}) {
      const FileBytes copied(path, FileMemory::copied, threads);
      EXPECT_TRUE(text_of(copied) == content) << size;
      EXPECT_GE(copied.copied_bytes(), size);
      EXPECT_LT(copied.copied_bytes(), size + (size < kHugePage ? kPage : kHugePage));
      const auto address = reinterpret_cast<std::uintptr_t>(copied.bytes().data());
      EXPECT_EQ(address % (size < kHugePage ? kPage : kHugePage), 0U) << size;
    }
  }
}

TEST(FileBytes, ACopyOutlivesTheFile) {
  const TemporaryFolder folder;
  const std::string content = random_bytes(kHugePage + 7);
  const auto path = folder.file("bytes", content);
  FileBytes copied(path, FileMemory::copied);
  std::filesystem::resize_file(path, 3);
  std::filesystem::remove(path);
  EXPECT_TRUE(text_of(copied) == content);
  const std::byte* data = copied.bytes().data();
  FileBytes moved = std::move(copied);
  EXPECT_EQ(moved.bytes().data(), data);
  EXPECT_GT(moved.copied_bytes(), 0U);
  FileBytes assigned;
  assigned = std::move(moved);
  EXPECT_TRUE(text_of(assigned) == content);
}

TEST(FileBytes, RefusesWhatIsNoRegularFile) {
  const TemporaryFolder folder;
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  for (const FileMemory memory : {FileMemory::mapped, FileMemory::copied}) {
    EXPECT_THAT(message_of(folder.path(), memory), HasSubstr("is not a regular file"));
    EXPECT_THAT(message_of(folder / "pipe", memory), HasSubstr("is not a regular file"));
    EXPECT_THAT(message_of(folder / "missing", memory), HasSubstr("missing: cannot be opened"));
  }
}

TEST(FileBytes, RefusesACopyForWhichThereIsNoMemory) {
  const TemporaryFolder folder;
  const auto path = folder.file("holes", "");
  constexpr std::uintmax_t size = std::uintmax_t{1} << 33;
  std::error_code error;
  std::filesystem::resize_file(path, size, error);  // takes no disk
  std::size_t pages = 0;
  if (error || !(std::ifstream("/proc/self/statm") >> pages)) GTEST_SKIP() << "this system has no such files";
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &before), 0);
  const rlimit tight{std::min<rlim_t>(before.rlim_max, pages * kPage + size / 2), before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_AS, &tight), 0);
  // Emulators take the limit and do not keep it.
  void* too_much = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const std::string message = too_much == MAP_FAILED ? message_of(path, FileMemory::copied) : "";
  ASSERT_EQ(setrlimit(RLIMIT_AS, &before), 0);
  if (too_much != MAP_FAILED) {
    munmap(too_much, size);
    GTEST_SKIP() << "this system does not limit memory";
  }
  EXPECT_THAT(message, HasSubstr("holes: there is no memory for a copy (8589934592 bytes)"));
}

TEST(FileBytes, SaysWhereAFileEndsThatIsCutWhileItIsRead) {
  // Files of the kernel that claim a page and hold less are cut from the start.
  const std::filesystem::path path = "/sys/kernel/mm/transparent_hugepage/enabled";
  if (!std::filesystem::is_regular_file(path)) GTEST_SKIP() << "this system has no such file";
  EXPECT_THAT(message_of(path, FileMemory::copied), HasSubstr("before its end when it was opened"));
}

}  // namespace
}  // namespace tessera
