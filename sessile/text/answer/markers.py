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
    tail = text[len(text) - longest :]
    counts = [0]
    for marker in markers:
        at = tail.find(marker[0])
        while at >= 0 and not marker.startswith(tail[at:]):
            at = tail.find(marker[0], at + 1)
        counts.append(longest - at if at >= 0 else 0)
    return max(counts)


def first_marker(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Where the first marker in a text begins, and which it is; (-1, "") if there is none."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    return min(found) if found else (-1, "")
