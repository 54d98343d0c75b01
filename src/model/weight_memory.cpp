#include "model/weight_memory.h"

#include <array>
#include <limits>
#include <system_error>

#include "core/error.h"
#include "model/available_memory.h"

namespace tessera {

namespace {
constexpr std::array<std::string_view, 3> kNames{"auto", "mapped", "copied"};
}  // namespace

std::string_view name_of(WeightMemory memory) {
  return kNames.at(static_cast<std::size_t>(memory));
}

WeightMemory weight_memory_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<WeightMemory>(i);
  }
  fail("weights is '{}'; expected auto, mapped or copied", name);
}

namespace model {

FileMemory memory_of_weights(std::uintmax_t bytes, WeightMemory wanted, std::optional<std::size_t> available,
                             const std::filesystem::path& first) {
  if (wanted == WeightMemory::mapped) return FileMemory::mapped;
  if (wanted == WeightMemory::automatic) {
    // The other half is for caches and activations, and for whatever else runs.
    return available && bytes <= *available / 2 ? FileMemory::copied : FileMemory::mapped;
  }
  const std::size_t limit = available.value_or(std::numeric_limits<std::size_t>::max());
  require(bytes <= limit, "{}: the weights have {:.1f} GB and {:.1f} GB are available; map them instead of copying",
          first.string(), static_cast<double>(bytes) / 1e9, static_cast<double>(limit) / 1e9);
  return FileMemory::copied;
}

FileMemory memory_of_weights(const std::vector<std::filesystem::path>& files, WeightMemory wanted) {
  if (wanted == WeightMemory::mapped || files.empty()) return FileMemory::mapped;
  std::uintmax_t bytes = 0;
  for (const std::filesystem::path& file : files) {
    std::error_code error;
    const std::uintmax_t size = std::filesystem::file_size(file, error);
    if (!error) bytes += size;
  }
  return memory_of_weights(bytes, wanted, available_memory(), files.front());
}

}  // namespace model
}  // namespace tessera
