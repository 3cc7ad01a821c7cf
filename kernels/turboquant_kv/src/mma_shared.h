// Sizes and shared memory of the tensor-core kernel: one arena of dynamic shared memory with the tables of half pairs (from
// K_TABLE, K_HIGH_TABLE, V_TABLE and V_HIGH_TABLE on, TABLE_BYTES in all; plan.py lays them out), the queries, and a
// ring of code tiles for each warp. At the end the arena holds the warps' totals.
const int THREADS = 32 * WARPS;
const int Q_PITCH = D + 8;
const int K_BYTES = D * KBITS / 8;
const int V_BYTES = DV * VBITS / 8;
const int UNITS = TILE / 16;
// A ring's tile: keys, values in four blocks of tokens, one for each lane column c and V_GAP bytes apart, so that the
// four rows that are read at once lie in different banks; key scales, value scales.
const int BLOCK_TOKENS = TILE / 4;
const int K_TILE = TILE * K_BYTES;
const int V_BLOCK = BLOCK_TOKENS * V_BYTES + V_GAP;
const int SCALES_AT = K_TILE + 4 * V_BLOCK;
const int STAGE_BYTES = SCALES_AT + 4 * TILE;
const int RING_BYTES = STAGES * STAGE_BYTES;
extern __shared__ __align__(128) uchar arena[];
__half* shared_q = reinterpret_cast<__half*>(arena + TABLE_BYTES);
__shared__ float row_mean[8];
__shared__ float row_peak[8 * WARPS];
__shared__ float row_mass[8 * WARPS];
const int r = int(lane) >> 2, c = int(lane) & 3;
int num_busy = 1;  // warps that have something to add

float o[DV / 16][4];
#pragma unroll
for (int j = 0; j < DV / 16; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.0f;
float m_0 = TQ_NO_PEAK, m_1 = TQ_NO_PEAK, l_0 = 0.0f, l_1 = 0.0f;
