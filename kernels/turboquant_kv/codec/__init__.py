"""What one vector becomes: formats, codebooks, rotation, packing, and the float64 twin of every operation."""
