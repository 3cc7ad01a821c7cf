// Helpers of the prefill kernel: where a tile's rows lie in shared memory, and who holds what of a fragment.
//
// Rows are CHUNKS pieces of 16 bytes (a multiple of 8). A piece lies at its number XOR the low bits of its row, so that
// the eight rows of an 8x8 matrix, of one piece each, never meet in a bank.
template <int CHUNKS> TQ_FN uint tq_piece(uint row, uint chunk) { return 16 * (row * CHUNKS + (chunk ^ (row & 7))); }

// The same for a lane that reads piece number `chunk` (even, known when compiled), or its neighbour, of many rows with
// the same low bits: from where the first row begins, with bits = 16 * (neighbour ^ low bits). Few addresses are
// computed, all others differ from them by constants.
TQ_FN const uchar* tq_lane_piece(const uchar* row, uint bits, int chunk) {
  return row + (bits ^ (16 * (chunk & 7))) + 128 * (chunk >> 3);
}
