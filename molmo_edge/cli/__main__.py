"""`python -m molmo_edge.cli`, where the `molmo-edge` script is not on the PATH."""

from molmo_edge.cli import main

main()
