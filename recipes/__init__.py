"""How the models that this project ships were made. Run from the repository's root; not part of the package."""
