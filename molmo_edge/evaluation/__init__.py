"""Tasks and metrics: how good an answer is."""
