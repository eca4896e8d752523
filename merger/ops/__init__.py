"""Arithmetic on tensors: questions, selection, linear algebra, rounding and the compiled kernels."""
