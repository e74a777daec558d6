"""Markers in text that comes in pieces: what of it may still become one."""

from collections.abc import Sequence

SPACE = " \t\r\n"
"""What counts as white space here: JSON's, no more."""


def space_at_front(text: str) -> int:
    """How many characters of white space a text begins with."""
    return len(text) - len(text.lstrip(SPACE))


def begun_marker(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of a text are the beginning of a marker, the most for any of them.

    A whole marker within the text does not count; whoever asks has looked for those.
    """
    longest = min(max(map(len, markers)) - 1, len(text))
    for count in range(longest, 0, -1):
        if any(marker.startswith(text[-count:]) for marker in markers):
            return count
    return 0


def first_marker(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Where the first marker in a text begins, and which it is; (-1, "") if there is none."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    return min(found) if found else (-1, "")
