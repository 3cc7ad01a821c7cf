"""The portable MLX backend."""
