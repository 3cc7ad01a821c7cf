// Shared memory of the portable kernel.
TQ_SHARED_ARRAY(float, shared_q, ROWS * D);
TQ_SHARED_ARRAY(float, work, ROWS * (D > DV ? D : DV));
TQ_SHARED_ARRAY(float, row_mean, ROWS);
TQ_SHARED_ARRAY(float, row_peak, 4 * ROWS);
TQ_SHARED_ARRAY(float, row_mass, 4 * ROWS);
TQ_SHARED_ARRAY(float, k_table, 1 << KBITS);
TQ_SHARED_ARRAY(float, v_table, 1 << VBITS);
for (int i = int(tid); i < (1 << KBITS); i += 128) k_table[i] = tq_k_book[i];
for (int i = int(tid); i < (1 << VBITS); i += 128) v_table[i] = tq_v_book[i];
