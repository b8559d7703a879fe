"""Benchmarks, metrics, and what a smaller model loses. Needs the extra `eval`."""
