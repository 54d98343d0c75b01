// The kernel text of products with weights built for avx512; see products-inl.h.
#define TESSERA_LEVEL_AVX512

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"
#include "model/products.h"

namespace tessera::kernels {
namespace {
#include "model/products-inl.h"
}  // namespace
}  // namespace tessera::kernels

namespace tessera::model {

const ProductLevel& products_avx512() {
  static constexpr ProductLevel level{kernels::dots, kernels::panel, nullptr, kernels::gated};
  return level;
}

}  // namespace tessera::model
#endif
