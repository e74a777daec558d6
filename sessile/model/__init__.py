"""Models as plain modules with explicit inputs, their configuration, and the reading of their weights."""
