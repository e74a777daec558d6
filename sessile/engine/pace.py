"""Pace: choose the token budget of a step so that steps stay under a time limit.

A stream's next token waits for the step that is running, so the longest step is the longest stall. On a GPU a chunk of
prompt takes milliseconds; on a CPU 512 tokens of a model of 8 billion parameters take half a minute. How fast the
device is shows only while it runs: start low, double while steps are short, cut when one was too long.

A step costs something fixed (reading the weights) and something a token. Where the fixed part alone exceeds the limit,
no budget keeps to it, and the smallest one would only multiply the fixed part: then half of a step goes to tokens.
"""

START = 4
"""The first budget, in smallest ones."""
HEADROOM = 0.8
"""Aim at this share of the limit: attention makes later chunks of a long prompt dearer than earlier ones."""
MEMORY = 0.9
"""Weight of the past in the cost estimate, a step."""


class StepCost:
    """Least squares of step_ms = fixed_ms + token_ms × tokens over the recent past."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._ms = self._tokens_squared = self._tokens_ms = 0.0

    def observe(self, tokens: int, step_ms: float) -> None:
        """Take a step into account and let older ones fade."""
        self._weight = MEMORY * self._weight + 1
        self._tokens = MEMORY * self._tokens + tokens
        self._ms = MEMORY * self._ms + step_ms
        self._tokens_squared = MEMORY * self._tokens_squared + tokens**2
        self._tokens_ms = MEMORY * self._tokens_ms + tokens * step_ms

    def estimate(self) -> tuple[float, float]:
        """(fixed_ms, token_ms), neither negative. While all steps were alike, everything is put down to tokens."""
        mean_tokens, mean_ms = self._tokens / self._weight, self._ms / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens**2
        if variance < 1:
            return 0.0, mean_ms / mean_tokens
        covariance = self._tokens_ms / self._weight - mean_tokens * mean_ms
        token_ms = min(max(covariance / variance, 0.0), mean_ms / mean_tokens)
        return mean_ms - token_ms * mean_tokens, token_ms


class Pace:
    """Token budget of the next step, from the times of the last ones.

    limit_ms: longest step aimed at, > 0. chunk_tokens_max: the configured budget, never exceeded. chunk_tokens_min: the
    smallest that is useful on the device.
    """

    def __init__(self, limit_ms: float, chunk_tokens_max: int, chunk_tokens_min: int) -> None:
        assert limit_ms > 0 and chunk_tokens_max >= 1 and chunk_tokens_min >= 1
        self._limit_ms = limit_ms
        self._tokens_max = chunk_tokens_max
        self._tokens_min = min(chunk_tokens_min, chunk_tokens_max)
        self._cost = StepCost()
        self.chunk_tokens = min(START * chunk_tokens_min, chunk_tokens_max)

    def observe(self, step_tokens: int, step_ms: float) -> int:
        """Learn from a settled step and return the budget for the next one to be planned.

        Only a step that used most of the budget says that the budget may grow: others were short for lack of work.
        """
        if step_tokens == 0:
            return self.chunk_tokens
        self._cost.observe(step_tokens, step_ms)
        fixed_ms, token_ms = self._cost.estimate()
        used = step_tokens >= HEADROOM * self.chunk_tokens
        if fixed_ms >= self._limit_ms:
            wanted = self._tokens_max if token_ms == 0 else int(fixed_ms / token_ms)
            self.chunk_tokens = self._within(min(wanted, 2 * self.chunk_tokens) if used else self.chunk_tokens)
            return self.chunk_tokens
        # In proportion, as if nothing were fixed: a cut is too small then, but the next step shows it; a rise is safe.
        fitting = int(step_tokens * HEADROOM * self._limit_ms / max(step_ms, 1e-3))
        if step_ms > self._limit_ms:
            self.chunk_tokens = self._within(min(fitting, self.chunk_tokens))
        elif used:
            self.chunk_tokens = self._within(max(min(fitting, 2 * self.chunk_tokens), self.chunk_tokens))
        return self.chunk_tokens

    def _within(self, tokens: int) -> int:
        return max(self._tokens_min, min(tokens, self._tokens_max))
