// The walk over the tiles, STAGES - 1 copies ahead: scores, online softmax in base 2, weighted sums. Queries stay in
// shared memory, because registers are full of sums: a lane holds rows r and r + 8 of M_TILES fragments, dims 8 j + 2 c
// and the next.
const auto slot_of = [](int tile) { return STAGES == 2 ? tile & 1 : tile % STAGES; };
const auto copy_tile = [&](int tile) {
  const int column = column_of(tile), last = walk.num_columns - 1 - column;
  const ulong first_row = ulong(walk.first_row + column);
  uchar* to_keys = arena + Q_BYTES + slot_of(tile) * K_BYTES;
  uchar* to_values = arena + Q_BYTES + STAGES * K_BYTES + slot_of(tile) * V_BYTES;
  const In *from_keys = keys + first_row * D, *from_values = values + first_row * DV;
  if (last >= COLUMNS - 1) {
    tq_copy_rows<true, K_CHUNKS, COLUMNS, THREADS>(to_keys, from_keys, last, int(tid));
    tq_copy_rows<true, V_CHUNKS, COLUMNS, THREADS>(to_values, from_values, last, int(tid));
  } else {  // the history's end
    tq_copy_rows<false, K_CHUNKS, COLUMNS, THREADS>(to_keys, from_keys, last, int(tid));
    tq_copy_rows<false, V_CHUNKS, COLUMNS, THREADS>(to_values, from_values, last, int(tid));
  }
};
for (int i = int(tid); i < ROWS * K_CHUNKS; i += THREADS) {
  const int row = i / K_CHUNKS, chunk = i % K_CHUNKS, query = block_start + row - q_start;
  uchar* to = arena + tq_piece<K_PITCH>(row, chunk);
  if (query >= 0 && query < num_queries) tq_copy<16>(to, queries + (head * num_rows + query) * D + 8 * chunk);
  else *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
}
#pragma unroll
for (int tile = 0; tile < STAGES - 1; tile++) {
  if (tile < walk.num_tiles) copy_tile(tile);
  tq_copies_end();
}

float o[M_TILES][DV / 8][4], peak[M_TILES][2], mass[M_TILES][2];  // peaks are scores before the scale
#pragma unroll
for (int m = 0; m < M_TILES; m++) {
#pragma unroll
  for (int j = 0; j < DV / 8; j++) o[m][j][0] = o[m][j][1] = o[m][j][2] = o[m][j][3] = 0.0f;
  peak[m][0] = peak[m][1] = TQ_NO_PEAK;
  mass[m][0] = mass[m][1] = 0.0f;
}

// Which row and which of two pieces a lane's address names to an instruction that loads four 8x8 matrices: in queries
// and values the four are two by two rows first, in keys pieces first.
const int tall_row = int(lane) & 15, wide_row = (int(lane) & 7) + int(lane >> 4) * 8;
const uint tall_bits = 16 * ((lane >> 4) ^ (lane & 7)), wide_bits = 16 * (((lane >> 3) & 1) ^ (lane & 7));
const uchar* lane_queries = arena + (int(warp) * WARP_ROWS + tall_row) * (16 * K_PITCH);

for (int tile = 0; tile < walk.num_tiles; tile++) {
  tq_copies_wait<STAGES - 2>();
  __syncthreads();  // the tile is there for all, and nobody reads the one that the next copy replaces
  if (tile + STAGES - 1 < walk.num_tiles) copy_tile(tile + STAGES - 1);
  tq_copies_end();
  const bool plain = tile >= walk.tokens_from && tile < plain_until[warp];
  if (!plain) {
    const int first = first_of(warp_start), last = last_of(warp_start, WARP_ROWS);
    const int section = section_of(tile), column = column_of(tile);
    if (first > last || column >= high_of(section, last) || column + COLUMNS <= low_of(section, first)) continue;
  }

  // Scores.
  const uchar* lane_keys = arena + Q_BYTES + slot_of(tile) * K_BYTES + wide_row * (16 * K_PITCH);
  float s[M_TILES][COLUMNS / 8][4];
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    uint a[M_TILES][4];
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
      tq_load_matrices(a[m], tq_lane_piece(lane_queries, tall_bits, 2 * i) + 16 * m * (16 * K_PITCH));
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 16; j++) {
      uint b[4];
      tq_load_matrices(b, tq_lane_piece(lane_keys, wide_bits, 2 * i) + 16 * j * (16 * K_PITCH));
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        tq_mma_as<In>(s[m][2 * j], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
        tq_mma_as<In>(s[m][2 * j + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
      }
    }
  }
  if (!plain) {
    const int section = section_of(tile), column = column_of(tile) + 2 * c;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int position = warp_start + 16 * m + 8 * h + r;
        const int low = low_of(section, position) - column;
        const uint span = max(0, high_of(section, position) - column - low);
#pragma unroll
        for (int j = 0; j < COLUMNS / 4; j++) {
          if (uint(j / 2 * 8 + j % 2 - low) >= span) s[m][j / 2][2 * h + j % 2] = TQ_MASKED;
        }
      }
    }
  }

  // Weights. Sums fade only when a peak of the warp rises, which late tiles seldom do.
  uint p[M_TILES][COLUMNS / 8][2];
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
    float next[2], offset[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      next[h] = peak[m][h];
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j++) next[h] = fmaxf(next[h], fmaxf(s[m][j][2 * h], s[m][j][2 * h + 1]));
      next[h] = fmaxf(next[h], __shfl_xor_sync(~0u, next[h], 1));
      next[h] = fmaxf(next[h], __shfl_xor_sync(~0u, next[h], 2));
      offset[h] = next[h] * scale;
    }
    if (__any_sync(~0u, next[0] > peak[m][0] || next[1] > peak[m][1])) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float fade = tq_exp2((peak[m][h] - next[h]) * scale);
        peak[m][h] = next[h];
        mass[m][h] *= fade;
#pragma unroll
        for (int j = 0; j < DV / 8; j++) {
          o[m][j][2 * h] *= fade;
          o[m][j][2 * h + 1] *= fade;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float x = tq_exp2(s[m][j][2 * h] * scale - offset[h]);
        const float y = tq_exp2(s[m][j][2 * h + 1] * scale - offset[h]);
        mass[m][h] += x + y;
        p[m][j][h] = tq_pair_as<In>(x, y);
      }
    }
  }

  // Sums: two neighbouring fragments of weights are one of the next product. The row goes through a shuffle, because a
  // compiler that knows which of its bits are zero computes more addresses than it needs.
  const int value_row = int(tq_shuffle(uint(tall_row) * 16 * V_PITCH, lane));
  const uchar* lane_values = arena + Q_BYTES + STAGES * K_BYTES + slot_of(tile) * V_BYTES + value_row;
#pragma unroll
  for (int i = 0; i < COLUMNS / 16; i++) {
#pragma unroll
    for (int j = 0; j < DV / 16; j++) {
      uint b[4];
      tq_load_matrices_transposed(b, tq_lane_piece(lane_values, tall_bits, 2 * j) + 16 * i * (16 * V_PITCH));
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        const uint *low = p[m][2 * i], *high = p[m][2 * i + 1];
        tq_mma_as<In>(o[m][2 * j], low[0], low[1], high[0], high[1], b[0], b[1]);
        tq_mma_as<In>(o[m][2 * j + 1], low[0], low[1], high[0], high[1], b[2], b[3]);
      }
    }
  }
}
