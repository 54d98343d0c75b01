// Whether files of weights are mapped or copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include "io/file_bytes.h"
#include "tessera/model.h"

namespace tessera::model {

/// What is wanted, decided for files of so many bytes together where so much memory is available; nothing available:
/// the system does not say, and only who asks for a copy gets one. Throws Error when a copy is asked for that does not
/// fit, naming the first file.
FileMemory memory_of_weights(std::uintmax_t bytes, WeightMemory wanted, std::optional<std::size_t> available,
                             const std::filesystem::path& first);
/// The same for these files and this machine. A file that cannot be examined counts as empty: opening it says why.
FileMemory memory_of_weights(const std::vector<std::filesystem::path>& files, WeightMemory wanted);

}  // namespace tessera::model
