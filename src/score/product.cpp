#include "score/product.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>

#include "core/error.h"

namespace tessera::score {

namespace {

/// oneDNN takes every OpenMP thread outside a parallel region and may then split sums differently.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) {
    if (before_ != 1) omp_set_num_threads(1);
  }
  ~OneThread() {
    if (before_ != 1) omp_set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

}  // namespace

void multiply_transposed(const float* a, std::int64_t rows, std::int64_t a_stride, const float* b, std::int64_t columns,
                         std::int64_t b_stride, std::int64_t depth, float scale, float* out, std::int64_t out_stride) {
  const OneThread one_thread;
  const dnnl_status_t status =
      dnnl_sgemm('N', 'T', rows, columns, depth, scale, a, a_stride, b, b_stride, 0.0F, out, out_stride);
  require(status == dnnl_success, "matrix product of {} x {} x {} failed (oneDNN status {})", rows, columns, depth,
          static_cast<int>(status));
}

void multiply(const float* a, std::int64_t rows, std::int64_t a_stride, const float* b, std::int64_t columns,
              std::int64_t b_stride, std::int64_t depth, float* out, std::int64_t out_stride) {
  const OneThread one_thread;
  const dnnl_status_t status =
      dnnl_sgemm('N', 'N', rows, columns, depth, 1.0F, a, a_stride, b, b_stride, 0.0F, out, out_stride);
  require(status == dnnl_success, "matrix product of {} x {} x {} failed (oneDNN status {})", rows, columns, depth,
          static_cast<int>(status));
}

}  // namespace tessera::score
