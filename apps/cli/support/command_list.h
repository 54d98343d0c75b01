// The commands of this build.
#pragma once

#include <span>

#include "command.h"

namespace tessera::cli {

/// One per file apps/cli/<name>.cpp, in the order of the names. Written by the build (apps/cli/CMakeLists.txt).
std::span<const AddCommand> commands();

}  // namespace tessera::cli
