"""A pattern that ends an output, as data: the automaton that finds it, so that the core parses nothing."""

import msgspec


class StopPattern(msgspec.Struct, frozen=True):
    """Glushkov's automaton of a regular expression over bytes, without ε-moves: a set of positions is its state.

    A run of positions is a match if it begins with one of `first`, each is one of the `follow` of the one before, ends
    with one of `last`, and each byte is in its position's set. No match is empty. Sets of positions are integers as
    little-endian bytes, bit p for position p; the sets of bytes have 32 bytes a position.
    """

    source: str
    """What the client sent."""
    byte_sets: bytes
    follow: tuple[bytes, ...]
    first: bytes
    last: bytes
