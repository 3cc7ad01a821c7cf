"""Storage in the canonical layout and attention tile by tile, written once for NumPy and for MLX arrays."""
