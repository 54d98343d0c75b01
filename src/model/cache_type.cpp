#include <array>

#include "core/error.h"
#include "tessera/model.h"

namespace tessera {

namespace {
constexpr std::array<std::string_view, 4> kNames{"f32", "bf16", "f16", "i8"};
}  // namespace

std::string_view name_of(CacheType type) {
  return kNames.at(static_cast<std::size_t>(type));
}

CacheType cache_type_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<CacheType>(i);
  }
  fail("kv_dtype is '{}'; expected f32, bf16, f16 or i8", name);
}

}  // namespace tessera
