// Exact rows of 16 bits on tensor cores, 16 a warp at a time: sink [0, sink rows), then window [window position,
// + window rows). Keys and values go from memory to fragments as they are, the queries unscaled in their own type, so
// that products are exact; the scale is applied to the scores. Weights are two 16-bit parts for bfloat16, whose one
// would be too coarse.
const int sink_offset = plan[about + 3], num_sink = plan[about + 4];
const int window_offset = plan[about + 5], window_start = plan[about + 6], num_window = plan[about + 7];
const int num_exact = num_sink + num_window;
Exact* raw_q = reinterpret_cast<Exact*>(arena);
for (int i = int(tid); i < 8 * D; i += THREADS) {
  const int index = chunk * 8 + i / D, query = index % QROWS;
  const bool lives = index < GROUP_ROWS && query < num_queries;
  raw_q[i / D * Q_PITCH + i % D] =
      lives ? Exact(queries[sequence * queries_strides[0] + (head * G + index / QROWS) * queries_strides[1] +
                            query * queries_strides[2] + (i % D) * queries_strides[3]])
            : Exact(0.0f);
}
__syncthreads();
num_busy = max(1, min(WARPS, (num_exact + 15) / 16));
const int query_0 = q_start + (chunk * 8 + 2 * c) % QROWS, query_1 = q_start + (chunk * 8 + 2 * c + 1) % QROWS;
for (int start = int(warp) * 16; start < num_exact; start += 16 * WARPS) {
  uint key[2][D / 8], value[4][DV / 16];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = min(start + r + 8 * i, num_exact - 1);
    const Exact* row = token < num_sink
        ? sink_k + (head * sink_k_strides[0] + (sink_offset + token) * sink_k_strides[1])
        : window_k + (head * window_k_strides[0] + (window_offset + token - num_sink) * window_k_strides[1]);
    tq_device_words<D / 8>(row + c * (D / 4), key[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = min(start + 2 * c + (i & 1) + 4 * (i & 2), num_exact - 1);
    const Exact* row = token < num_sink
        ? sink_v + (head * sink_v_strides[0] + (sink_offset + token) * sink_v_strides[1])
        : window_v + (head * window_v_strides[0] + (window_offset + token - num_sink) * window_v_strides[1]);
    tq_device_words<DV / 16>(row + r * (DV / 8), value[i]);
  }
  float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const uint* q_row = reinterpret_cast<const uint*>(raw_q + r * Q_PITCH + c * (D / 4));
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    tq_mma_as<Exact>(s, key[0][2 * i], key[1][2 * i], key[0][2 * i + 1], key[1][2 * i + 1], q_row[2 * i], q_row[2 * i + 1]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = start + r + (i & 2 ? 8 : 0), query = i & 1 ? query_1 : query_0;
    const bool in_sink = token < num_sink;
    const int position = in_sink ? token : window_start + token - num_sink;
    // The window's tokens are exact for queries of their own page only; others see them through their codes.
    const bool seen = token < num_exact && position <= query && position > query - reach &&
        (in_sink || (query >= SINK && (position - SINK) / PAGE == (query - SINK) / PAGE));
    s[i] = seen ? s[i] * scale : TQ_MASKED;
  }
  float n_0 = fmaxf(m_0, fmaxf(s[0], s[2])), n_1 = fmaxf(m_1, fmaxf(s[1], s[3]));
#include "mma_raise.h"
  const float p_0 = tq_exp2(s[0] - m_0), p_1 = tq_exp2(s[1] - m_1);
  const float p_2 = tq_exp2(s[2] - m_0), p_3 = tq_exp2(s[3] - m_1);
  l_0 += p_0 + p_2;
  l_1 += p_1 + p_3;
  const uint b_0 = tq_transpose(tq_pair_as<Exact>(p_0, p_1)), b_1 = tq_transpose(tq_pair_as<Exact>(p_2, p_3));
  const uint rest_0 = tq_transpose(tq_pair_rest<Exact>(p_0, p_1)), rest_1 = tq_transpose(tq_pair_rest<Exact>(p_2, p_3));
#pragma unroll
  for (int j = 0; j < DV / 16; j++) {
    // A word is dims 2j and 2j + 1 of the lane's eighth of one token.
    const uint a_0 = __byte_perm(value[0][j], value[1][j], 0x5410), a_1 = __byte_perm(value[0][j], value[1][j], 0x7632);
    const uint a_2 = __byte_perm(value[2][j], value[3][j], 0x5410), a_3 = __byte_perm(value[2][j], value[3][j], 0x7632);
    tq_mma_as<Exact>(o[j], a_0, a_1, a_2, a_3, b_0, b_1);
    if (sizeof(Exact) == 2 && tq_needs_rest<Exact>()) tq_mma_as<Exact>(o[j], a_0, a_1, a_2, a_3, rest_0, rest_1);
  }
}
