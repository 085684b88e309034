"""The engine in plain torch: the reference, and the way to CUDA."""
