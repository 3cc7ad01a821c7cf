// Sums to outputs (heads, rows, DV): the attention sink joins the mass, rows past the queries are zeros.
const float logit = sinks[head] * 1.4426950408889634f;
#pragma unroll
for (int m = 0; m < M_TILES; m++) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float total = mass[m][h];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const float mine = peak[m][h] * scale, top = fmaxf(mine, logit), share = tq_exp2(mine - top);
    const float factor = share / (total * share + tq_exp2(logit - top));
    const int query = warp_start + 16 * m + 8 * h + r - q_start;
    if (query < 0 || query >= num_rows) continue;
    In* to = out + (head * num_rows + query) * DV + 2 * c;
#pragma unroll
    for (int j = 0; j < DV / 8; j++) {
      const float x = o[m][j][2 * h] * factor, y = o[m][j][2 * h + 1] * factor;
      *reinterpret_cast<uint*>(to + 8 * j) = query < num_queries ? tq_pair_as<In>(x, y) : 0u;
    }
  }
}
