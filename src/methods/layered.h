// A method per range of layers, from a JSON configuration.
#pragma once

#include <memory>
#include <string_view>

#include "io/json.h"
#include "tessera/method.h"

namespace tessera {

/// {"method": name, "parameters": {...}} as a method; `where` begins the messages.
std::unique_ptr<const Method> make_method_of(const Json& object, std::string_view where);

/// {"layers": [{"layers": RANGE, "method": name, "parameters": {...}}, ...]} as one method that hands every call on by
/// its layer. RANGE is "3", "0-1" (inclusive) or "2-" (to the last layer). Throws Error naming the file and the layers
/// that are covered twice or not at all; whether the last layer of a model is covered is checked by check_model() and
/// by every call.
std::unique_ptr<const Method> make_layered_method(const Json& object, std::string_view file);

}  // namespace tessera
