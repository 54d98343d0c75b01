// Bytes inside a page: deflated (zlib, RFC 1950) and in base64, as browsers can unpack them without a library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace tessera {

/// Base64 with padding (RFC 4648).
std::string base64(std::span<const std::byte> bytes);

/// base64(zlib(bytes)): what `new DecompressionStream("deflate")` reads. Throws Error when memory runs out.
std::string packed(std::span<const std::byte> bytes);

}  // namespace tessera
