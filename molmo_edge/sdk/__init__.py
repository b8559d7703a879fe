"""The parts of `Molmo` that an app does not import by itself: streaming, batches, notebooks, drawing."""
