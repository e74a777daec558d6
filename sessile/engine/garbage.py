"""Garbage collection at chosen moments only: one collection over 100,000 sessions takes 250 ms (H69).

Almost everything here is freed by reference counts; the collector is needed for the few cycles that exceptions and
libraries leave behind, and those can wait until nobody waits for a token.
"""

import gc

FULL_COLLECTION_IDLE_NS = 60 * 10**9
"""Idle for so long, the engine can afford to look at everything it holds."""


class IdleCollector:
    """Collects when the loop is idle. Takes the process's collector over; `release` gives it back."""

    def __init__(self) -> None:
        self._used_since_young = False
        self._used_since_full = False
        self._last_used_ns = 0

    def take_over(self) -> None:
        """Set aside all that start-up made, so that no collection looks at it again, and stop automatic collection."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def release(self) -> None:
        """Automatic collection again, of everything."""
        gc.unfreeze()
        gc.enable()

    def note_use(self, now_ns: int) -> None:
        """The loop did some work at this time."""
        self._used_since_young = self._used_since_full = True
        self._last_used_ns = now_ns

    def note_idle(self, now_ns: int) -> None:
        """The loop has waited in vain: collect what is new; after a long idle time, everything, once."""
        if self._used_since_young:
            self._used_since_young = False
            gc.collect(1)
        if self._used_since_full and now_ns - self._last_used_ns >= FULL_COLLECTION_IDLE_NS:
            self._used_since_full = False
            gc.collect()
