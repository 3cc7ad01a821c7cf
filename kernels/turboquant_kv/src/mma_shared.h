// Shared memory of the tensor-core kernel: one arena, first the queries and their scratch, then the tables of half
// pairs (a copy per lane, against bank conflicts), at the end the block's totals.
const int K_PAIRS = 1 << (2 * KBITS);
const int V_PAIRS = 1 << (2 * VBITS);
const int TABLE_WORDS = 32 * (K_PAIRS + (KBITS == VBITS ? 0 : V_PAIRS));
const int WIDEST = D > DV ? D : DV;
const int SCRATCH_WORDS = ROWS * (D + WIDEST + 4);
__shared__ __align__(16) uint arena[TABLE_WORDS > SCRATCH_WORDS ? TABLE_WORDS : SCRATCH_WORDS];
float* shared_q = reinterpret_cast<float*>(arena);
float* work = shared_q + ROWS * D;
__shared__ float row_mean[ROWS];
__shared__ float row_peak[4 * ROWS];
__shared__ float row_mass[4 * ROWS];
