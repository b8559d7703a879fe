"""Data sets to train on: PixMo, the academic sets of Molmo's mixture, folders of one's own, and generators."""
