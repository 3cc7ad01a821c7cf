// Sizes and shared memory of the tensor-core kernel: one arena of dynamic shared memory with the tables of half pairs
// (a copy per lane, against bank conflicts), the queries, and a ring of code tiles for each warp. At the end the arena
// holds the warps' totals. gpu_plan.py computes the arena's bytes by the same formulas.
const int THREADS = 32 * WARPS;
const int K_PAIRS = 1 << (2 * KBITS);
const int V_PAIRS = 1 << (2 * VBITS);
const int TABLE_BYTES = 128 * (K_PAIRS + (KBITS == VBITS ? 0 : V_PAIRS));
const int Q_PITCH = D + 8;
const int K_BYTES = D * KBITS / 8;
const int V_BYTES = DV * VBITS / 8;
const int UNITS = TILE / 16;
// Two tokens' values with a gap, so that the four pairs that a lane group reads at once lie in different banks.
const int V_PITCH = 2 * V_BYTES + V_GAP;
const int K_UNIT = 16 * K_BYTES;
const int UNIT_BYTES = K_UNIT + 8 * V_PITCH + 64;  // of 16 tokens: keys, values, their scales
const int RING_BYTES = STAGES * UNITS * UNIT_BYTES;
extern __shared__ __align__(128) uchar arena[];
__half* shared_q = reinterpret_cast<__half*>(arena + TABLE_BYTES);
__shared__ float row_mean[8];
__shared__ float row_peak[8 * WARPS];
__shared__ float row_mass[8 * WARPS];
const int r = int(lane) >> 2, c = int(lane) & 3;

float o[DV / 16][4];
#pragma unroll
for (int j = 0; j < DV / 16; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.0f;
float m_0 = TQ_NO_PEAK, m_1 = TQ_NO_PEAK, l_0 = 0.0f, l_1 = 0.0f;
