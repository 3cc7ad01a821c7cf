"""The fused kernels of Metal and CUDA."""
