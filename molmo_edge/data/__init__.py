"""Data sets: PixMo, academic sets, folders with points, drawn pictures, and how each becomes questions."""
