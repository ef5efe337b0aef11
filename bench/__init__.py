"""Benchmarks: every figure of the README is measured here (``python -m bench``)."""
