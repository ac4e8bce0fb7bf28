"""Micro-expression recognition and variance studies on JAX/Flax."""

__version__ = "0.1.0"
