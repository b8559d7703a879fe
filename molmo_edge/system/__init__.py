"""The machine and the process: cores, memory, temporary directories, files, optional packages, logging, privacy."""
