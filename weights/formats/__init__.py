"""One module per file format: reading and writing side by side."""
