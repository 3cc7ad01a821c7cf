"""The CPU backend over compiled kernels."""
