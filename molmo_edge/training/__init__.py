"""Training data for the nano model: sprites with names, drawn scenes, annotated photos, and questions about them."""
