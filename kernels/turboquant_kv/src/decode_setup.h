// What each row of a portable block may see, and its empty running softmax.
const int first_row = 0, NUM_ROWS = LIVE;
#include "decode_limits.h"

// The running softmax: every lane knows its rows' peaks; masses are sums over lanes; a lane owns dims 2*lane + 64*i.
const int PAIRS = (DV + 63) / 64;
float peak[LIVE], mass[LIVE], total[LIVE][PAIRS * 2];
for (int r = 0; r < LIVE; r++) {
  peak[r] = TQ_NO_PEAK;
  mass[r] = 0.0f;
  for (int i = 0; i < PAIRS * 2; i++) total[r][i] = 0.0f;
}
