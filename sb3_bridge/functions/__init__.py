"""Functions that the user writes: rewards and transitions, in JAX, NumPy or torch."""
