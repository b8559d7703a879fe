"""`python -m molmo_edge`, where the `molmo-edge` script is not on the PATH."""

from molmo_edge.cli import main

if __name__ == "__main__":
    main()
