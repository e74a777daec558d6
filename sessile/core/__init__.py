"""The state machine: pure and deterministic. No clock, no threads, no I/O, no randomness, no iteration over sets."""
