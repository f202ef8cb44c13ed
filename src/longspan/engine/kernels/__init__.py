"""Triton kernels; each is imported only where Triton is."""
