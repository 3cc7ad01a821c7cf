// The BLAS that blas_shim.c found, for threads that share out a product themselves.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tq {

// cblas_sgemm, computed on the calling thread alone.
using BlasProduct = void (*)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
                             float beta, float* c, int ldc);

// Null: there is none. Set before the first product.
void set_blas(std::uintptr_t address);
BlasProduct blas();

// c (rows, outputs), rows c_stride apart, becomes or is increased by x (rows, inputs), rows x_stride apart, times w (outputs, inputs)
// transposed. There is a BLAS.
void multiply_rows(const float* x, int x_stride, int rows, const float* w, int outputs, int inputs, float* c, std::size_t c_stride, bool add);

} // namespace tq
