"""Internals of `Molmo`: the shared engine, streaming, batches, drawing, notebooks."""
