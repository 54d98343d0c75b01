// Memory that the system can still give.
#pragma once

#include <cstddef>
#include <optional>

namespace tessera::model {

/// Bytes that this process can take without swapping: the smaller of what the machine and what its control group have
/// left, file caches counted as free. Nothing where the system does not say.
std::optional<std::size_t> available_memory();

}  // namespace tessera::model
