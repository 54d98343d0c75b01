// The kernel text of products with weights built for avx512_bf16; see products-inl.h.
#define TESSERA_LEVEL_AVX512
#define TESSERA_LEVEL_BF16

#if defined(__x86_64__)
#include "kernels/cpu/level_headers.h"
#include "model/products.h"

namespace tessera::kernels {
namespace {
#include "model/products-inl.h"
}  // namespace
}  // namespace tessera::kernels

namespace tessera::model {

const ProductLevel& products_avx512_bf16() {
  static constexpr ProductLevel level{kernels::dots, kernels::panel, kernels::round_pairs, kernels::gated};
  return level;
}

}  // namespace tessera::model
#endif
