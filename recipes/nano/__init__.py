"""How nano is made, in stages of the trainer: `python -m recipes.nano --help`."""
