// Compressed tokens [low, limit) that the query rows from first_row on may see: the pages before a row's own, as far as its
// window reaches. Rows that do not exist see nothing.
int limits[NUM_ROWS], lows[NUM_ROWS];
for (int i = 0; i < NUM_ROWS; i++) {
  const int row = chunk * ROWS + first_row + i;
  const int position = q_start + row % QROWS;
  int page = position < SINK ? 0 : (position - SINK) / PAGE;
  if (page > num_pages) page = num_pages;
  lows[i] = position - SINK + 1 - reach;
  limits[i] = (row < GROUP_ROWS && row % QROWS < num_queries) ? page * PAGE : 0;
}
