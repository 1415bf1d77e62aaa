"""The version, in a file that a build can read without importing JAX."""

__version__ = "0.2.0"
