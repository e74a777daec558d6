"""Pace: choose the token budget of a step so that steps stay under a time limit.

A stream's next token waits for the step that is running, so the longest step is the longest stall. On a GPU a chunk of
prompt takes milliseconds; on a CPU 512 tokens of a model of 8 billion parameters take half a minute. How fast the
device is shows only while it runs: start low, double while steps are short, cut in proportion when one was too long.
"""

CHUNK_TOKENS_MIN = 16
"""Below this a step is mostly the reading of the weights, so that smaller chunks gain little time."""
CHUNK_TOKENS_START = 64
HEADROOM = 0.8
"""Aim at this share of the limit: attention makes later chunks of a long prompt dearer than earlier ones."""


class Pace:
    """Token budget of the next step, from the times of the last ones.

    limit_ms: longest step aimed at, > 0. chunk_tokens_max: the configured budget, never exceeded.
    """

    def __init__(self, limit_ms: float, chunk_tokens_max: int) -> None:
        assert limit_ms > 0 and chunk_tokens_max >= 1
        self._limit_ms = limit_ms
        self._tokens_max = chunk_tokens_max
        self._tokens_min = min(CHUNK_TOKENS_MIN, chunk_tokens_max)
        self.chunk_tokens = min(CHUNK_TOKENS_START, chunk_tokens_max)

    def observe(self, step_tokens: int, step_ms: float) -> int:
        """Learn from a settled step and return the budget for the next one to be planned.

        Only a step that used most of the budget says that the budget may grow: others were short for lack of work.
        """
        fitting = int(step_tokens * HEADROOM * self._limit_ms / max(step_ms, 1e-3))
        if step_ms > self._limit_ms:
            self.chunk_tokens = max(self._tokens_min, min(fitting, self.chunk_tokens))
        elif step_tokens >= HEADROOM * self.chunk_tokens:
            grown = min(fitting, 2 * self.chunk_tokens, self._tokens_max)
            self.chunk_tokens = max(grown, self.chunk_tokens)
        return self.chunk_tokens
