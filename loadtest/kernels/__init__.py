"""``quire bench kernels``: every operation of quire.kernels, timed against MLX's own."""
