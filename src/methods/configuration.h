// Parameters that are JSON documents: what searches write and methods read.
#pragma once

#include <string>

#include "io/json.h"
#include "methods/parameters.h"

namespace tessera {

/// The document of a parameter: of the file it names, or as it stands in the parameter. Throws Error naming the file.
Json read_configuration(const Configuration& configuration);

}  // namespace tessera
