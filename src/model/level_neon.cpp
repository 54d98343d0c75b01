// The kernel text of products with weights built for neon; see products-inl.h.
#define TESSERA_LEVEL_NEON

#if defined(__aarch64__)
#include "kernels/cpu/level_headers.h"
#include "model/products.h"

namespace tessera::kernels {
namespace {
#include "model/products-inl.h"
}  // namespace
}  // namespace tessera::kernels

namespace tessera::model {

const ProductLevel& products_neon() {
  static constexpr ProductLevel level{kernels::dots, kernels::panel, nullptr, kernels::gated};
  return level;
}

}  // namespace tessera::model
#endif
