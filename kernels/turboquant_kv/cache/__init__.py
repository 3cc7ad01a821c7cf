"""Pages, sequences and the caches that mlx-lm sees."""
