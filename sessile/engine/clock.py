"""Engine time: the one place where the engine asks what time it is."""

import time
from typing import Protocol


class Clock(Protocol):
    """Nanoseconds since some fixed moment; never goes back."""

    def now_ns(self) -> int: ...


class MonotonicClock:
    """Nanoseconds since this clock was made. Not moved by changes of the wall clock."""

    def __init__(self) -> None:
        self._origin_ns = time.monotonic_ns()

    def now_ns(self) -> int:
        """Nanoseconds since the clock was made, ≥ 0."""
        return time.monotonic_ns() - self._origin_ns
