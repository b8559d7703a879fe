"""How nano is made, in stages on the one trainer: `python -m recipes.nano --help`."""
