// The rows' peaks over the whole warp; what was summed before fades if one rose.
#pragma unroll
for (int step = 4; step < 32; step <<= 1) {
  n_0 = fmaxf(n_0, __shfl_xor_sync(~0u, n_0, step));
  n_1 = fmaxf(n_1, __shfl_xor_sync(~0u, n_1, step));
}
if (__any_sync(~0u, n_0 > m_0 || n_1 > m_1)) {
  const float f_0 = tq_exp2(m_0 - n_0), f_1 = tq_exp2(m_1 - n_1);
  m_0 = n_0;
  m_1 = n_1;
  l_0 *= f_0;
  l_1 *= f_1;
#pragma unroll
  for (int j = 0; j < DV / 16; j++) {
    o[j][0] *= f_0;
    o[j][1] *= f_1;
    o[j][2] *= f_0;
    o[j][3] *= f_1;
  }
}
