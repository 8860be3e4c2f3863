"""Arrays in, arrays out: kernels for Metal and CUDA, and the same operations in MLX."""
