"""Twins: JAX worlds with an environment's own dynamics, in which branches run on the device."""
