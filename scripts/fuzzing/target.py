"""What a target is, and what it means that one refuses."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import ClassVar

from scripts.fuzzing.mutations import mutated_bytes

MESSAGE_CHARS_MAX = 4096
"""Of a refusal: it goes into a reply, or onto one line of a terminal."""


class Target(ABC):
    """One reader or parser. folder: a place of its own for files, emptied by whoever made it.

    `run` returns where the input was taken or refused as documented; whatever it raises is a finding.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Inputs that are taken."""

    @abstractmethod
    def run(self, raw: bytes) -> None:
        """Take or refuse one input."""

    def mutated(self, raw: bytes, rng: Random) -> bytes:
        """Another input, made of one."""
        return mutated_bytes(raw, rng)

    def close(self) -> None:  # noqa: B027  (most have started nothing)
        """End what was started."""


@contextlib.contextmanager
def refusing(*kinds: type[Exception], is_sent: bool = True) -> Iterator[None]:
    """Let what is documented pass, if its message can be said. is_sent: over a socket, as UTF-8; else to a terminal."""
    try:
        yield
    except kinds as refusal:
        message = str(refusal)
        message.encode(errors="strict" if is_sent else "backslashreplace")
        assert len(message) <= MESSAGE_CHARS_MAX, f"a refusal of {len(message)} characters: {message[:200]}"


def place_file(path: Path, raw: bytes) -> Path:
    """A new file in the old one's place: what a reader has mapped of that one stays as it was."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    return path
