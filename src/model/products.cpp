#include "model/products.h"

namespace tessera::model {

const ProductLevel& products_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return products_avx2();
    case Isa::avx512:
      return products_avx512();
    case Isa::avx512_bf16:
      return products_avx512_bf16();
#elif defined(__aarch64__)
    case Isa::neon:
      return products_neon();
#endif
    default:
      return products_portable();
  }
}

}  // namespace tessera::model
