// Shared memory of a block, whichever way it multiplies; Q_FLOATS is at least ROWS * D.
TQ_SHARED_ARRAY(float, shared_q, Q_FLOATS);
TQ_SHARED_ARRAY(float, work, ROWS * (D > DV ? D : DV));
TQ_SHARED_ARRAY(float, row_mean, ROWS);
TQ_SHARED_ARRAY(float, row_peak, 4 * ROWS);
TQ_SHARED_ARRAY(float, row_mass, 4 * ROWS);
