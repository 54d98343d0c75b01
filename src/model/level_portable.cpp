// The kernel text of products with weights built for portable; see products-inl.h.

#include "kernels/cpu/level_headers.h"
#include "model/products.h"

namespace tessera::kernels {
namespace {
#include "model/products-inl.h"
}  // namespace
}  // namespace tessera::kernels

namespace tessera::model {

const ProductLevel& products_portable() {
  static constexpr ProductLevel level{kernels::dots, kernels::panel, nullptr, kernels::gated};
  return level;
}

}  // namespace tessera::model
