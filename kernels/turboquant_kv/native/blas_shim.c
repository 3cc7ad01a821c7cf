/* Matrix products of mlx's CPU wheel, answered by OpenBLAS.
 *
 * The wheel's libmlx.so asks the dynamic linker for cblas_sgemm, cblas_dgemm and cblas_cgemm and normally gets
 * the reference BLAS shipped beside it. Loaded with RTLD_GLOBAL before libmlx.so, this library comes first in the
 * linker's search order and forwards to an OpenBLAS whose symbols carry the prefix `scipy_`.
 *
 * It owns the function pointers, a call counter and how many threads a product deserves. Finding the library, the
 * upper bound of threads and whether to do any of this is Python's business (turboquant_kv/blas.py). The LAPACK
 * symbols stay with the wheel.
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef void (*sgemm_fn)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                         int);
typedef void (*dgemm_fn)(int, int, int, int, int, int, double, const double *, int, const double *, int, double,
                         double *, int);
typedef void (*cgemm_fn)(int, int, int, int, int, int, const void *, const void *, int, const void *, int,
                         const void *, void *, int);
typedef void (*sgemv_fn)(int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

typedef void (*set_num_threads_fn)(int);

static sgemm_fn sgemm;
static dgemm_fn dgemm;
static cgemm_fn cgemm;
static sgemv_fn sgemv;
static set_num_threads_fn set_num_threads;
static int max_threads = 1;
static atomic_int num_threads_set;
static atomic_ulong num_calls;
static char open_error[512];

/* On a busy machine OpenBLAS waits up to a scheduler slice (4 ms and more) for each helper thread: measured, a decode
 * step's product took 100 times as long with two threads as with one. So a helper must be worth it: 2^24
 * multiplications are 0.3 ms of one core, and prompts are read 1.2 times as fast as with 2^27. */
enum { LOG2_WORK_PER_THREAD = 24 };

/* Products of fewer rows than this take as long as reading the matrix does. */
enum { MIN_ROWS = 16 };

static int resolve(void *library, const char *name, void **out) {
    *out = dlsym(library, name);
    if (*out == NULL) snprintf(open_error, sizeof open_error, "no symbol %s", name);
    return *out != NULL;
}

/* Returns NULL, or why the library at `path` cannot serve. Call once, before publishing this library.
 * No product uses more than `num_threads` threads. */
EXPORT const char *turboquant_blas_open(const char *path, int num_threads) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *reason = dlerror();
        snprintf(open_error, sizeof open_error, "%s", reason != NULL ? reason : "dlopen failed");
        return open_error;
    }
    /* POSIX guarantees that dlsym's void * holds a function address. */
    int is_complete = resolve(library, "scipy_cblas_sgemm", (void **)&sgemm) &&
                      resolve(library, "scipy_cblas_dgemm", (void **)&dgemm) &&
                      resolve(library, "scipy_cblas_cgemm", (void **)&cgemm) &&
                      resolve(library, "scipy_cblas_sgemv", (void **)&sgemv) &&
                      resolve(library, "scipy_openblas_set_num_threads", (void **)&set_num_threads);
    if (num_threads > 1) max_threads = num_threads;
    return is_complete ? NULL : open_error;
}

/* How often a product was answered here: the proof that libmlx.so really calls this library. */
EXPORT unsigned long turboquant_blas_calls(void) { return atomic_load_explicit(&num_calls, memory_order_relaxed); }

static void begin(int m, int n, int k) {
    atomic_fetch_add_explicit(&num_calls, 1, memory_order_relaxed);
    double work = (double)(m < MIN_ROWS ? MIN_ROWS : m) * n * k / (1 << LOG2_WORK_PER_THREAD);
    int num_threads = work >= max_threads ? max_threads : work > 1 ? (int)work : 1;
    /* Setting is cheap but global: two products at once may swap their counts, which costs time, not correctness. */
    if (atomic_exchange(&num_threads_set, num_threads) != num_threads) set_num_threads(num_threads);
}

EXPORT void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                        const float *b, int ldb, float beta, float *c, int ldc) {
    begin(m, n, k);
    /* One output row, which is every decode step: c = alpha * op(B)^T a + beta * c. OpenBLAS would first repack all
     * of B for its gemm kernel, which costs more than the product itself. */
    if (order == ROW_MAJOR && m == 1 && n > 0 && k > 0) {
        int a_step = trans_a == NO_TRANS ? 1 : lda;
        /* beta = 0 means that c is write-only; some gemv kernels multiply it, and 0 * NaN is NaN. */
        if (beta == 0.0f) memset(c, 0, (size_t)n * sizeof *c);
        if (trans_b == NO_TRANS)
            sgemv(ROW_MAJOR, TRANS, k, n, alpha, b, ldb, a, a_step, beta, c, 1);
        else
            sgemv(ROW_MAJOR, NO_TRANS, n, k, alpha, b, ldb, a, a_step, beta, c, 1);
        return;
    }
    sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* cblas_sgemm on the calling thread alone, for callers whose own threads share out a product. Not counted: it says nothing
 * about libmlx.so. */
EXPORT void turboquant_blas_sgemm_alone(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a,
                                        int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    if (atomic_exchange(&num_threads_set, 1) != 1) set_num_threads(1);
    sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double *a,
                        int lda, const double *b, int ldb, double beta, double *c, int ldc) {
    begin(m, n, k);
    dgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a,
                        int lda, const void *b, int ldb, const void *beta, void *c, int ldc) {
    begin(m, n, k);
    cgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
