// Threadgroup memory of the matrix kernel beside decode_shared.h's: pairs of centroids by pairs of codes, single ones of 8
// bits. The queries' memory is used again for each simdgroup's scores, 8 rows FLIP_PITCH floats apart: a multiple of four,
// for wide accesses, that is none of 32, so that rows begin in different banks.
const int FLIP_PITCH = 36;
const int Q_FLOATS = ROWS * D > 4 * 8 * FLIP_PITCH ? ROWS * D : 4 * 8 * FLIP_PITCH;
typedef vec<Piece, 2> Pair;
TQ_SHARED_ARRAY(Pair, k_pairs, tq_num_pairs(KBITS));
TQ_SHARED_ARRAY(Pair, own_v_pairs, KBITS == VBITS ? 1 : tq_num_pairs(VBITS));
const TQ_SHARED Pair* v_pairs = KBITS == VBITS ? k_pairs : own_v_pairs;
for (int i = int(tid); i < tq_num_pairs(KBITS); i += 128) {
  k_pairs[i] = tq_two(Piece(tq_k_book[i & ((1 << KBITS) - 1)]), Piece(tq_k_book[i >> (KBITS & 7)]));
}
if (KBITS != VBITS) {
  for (int i = int(tid); i < tq_num_pairs(VBITS); i += 128) {
    own_v_pairs[i] = tq_two(Piece(tq_v_book[i & ((1 << VBITS) - 1)]), Piece(tq_v_book[i >> (VBITS & 7)]));
  }
}
