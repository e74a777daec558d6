"""How long a client that was refused for a limit should wait: what Retry-After says."""

import math
import time

WAIT_S_MIN, WAIT_S_MAX = 1, 60
_NEWEST_SHARE = 0.1
"""Weight of the newest gap between two ends in the running mean, which so follows the last ten or twenty."""


class RetryAdvice:
    """Learns how fast requests end. Its only writer is the event loop."""

    def __init__(self) -> None:
        self._gap_s = 0.0
        self._last_end_s = time.monotonic()

    def note_start(self, in_flight: int) -> None:
        """A request starts beside so many others. Time in which nothing was in flight says nothing."""
        if not in_flight:
            self._last_end_s = time.monotonic()

    def note_end(self) -> None:
        """A request that ran has ended."""
        now_s = time.monotonic()
        self._gap_s += _NEWEST_SHARE * (now_s - self._last_end_s - self._gap_s)
        self._last_end_s = now_s

    def seconds(self, in_flight: int) -> int:
        """Half of the time in which, at the rate of late, all that is in flight will have ended; whole seconds.

        By then half of the line has gone, so that clients that come back find room, and not all of it, so that the
        line does not run dry meanwhile.
        """
        return max(WAIT_S_MIN, min(WAIT_S_MAX, math.ceil(in_flight * self._gap_s / 2)))
