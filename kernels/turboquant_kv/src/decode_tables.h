// Centroids in shared memory, for the portable kernel.
const int Q_FLOATS = ROWS * D;
TQ_SHARED_ARRAY(float, k_table, 1 << KBITS);
TQ_SHARED_ARRAY(float, v_table, 1 << VBITS);
for (int i = int(tid); i < (1 << KBITS); i += 128) k_table[i] = tq_k_book[i];
for (int i = int(tid); i < (1 << VBITS); i += 128) v_table[i] = tq_v_book[i];
