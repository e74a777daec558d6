"""A toy drafter: it knows the right tokens and is wrong as often as its world wants."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sessile.sim import hashing
from sessile.sim.books import Books
from sessile.sim.world import World


class ToyDrafter:
    """Implements the core's Drafter. Deterministic: the same request at the same length gets the same drafts."""

    def __init__(self, world: World, books: Books) -> None:
        self._world = world
        self._books = books

    def limit(self, key: int) -> int:
        """0 to drafts_max, differing from step to step."""
        request = self._books.requests[key]
        return self._dice(key, len(request.output)) % (self._world.limits.drafts_max + 1)

    def draft(self, key: int, context: npt.NDArray[np.int32], limit: int) -> Sequence[int]:
        """Up to `limit` next tokens of the request, each wrong by chance."""
        request = self._books.requests[key]
        speaker = request.speaker.copy()
        known = [*request.prompt, *request.output][-len(context) :]
        # The client may not have got the newest tokens yet: run ahead until the text is the one we were shown.
        for _ in range(2 + self._world.limits.drafts_max):
            if known[-len(context) :] == context.tolist():
                break
            known.append(speaker.peek())
            speaker.push(known[-1])
        drafts = []
        for _ in range(limit):
            token = speaker.peek()
            speaker.push(token)
            is_wrong = self._dice(key, speaker.chain.length) % 1000 >= self._world.temper.draft_rate * 1000
            drafts.append((token + is_wrong) % self._world.facts.vocab_size)
        return drafts[: self._dice(key, -speaker.chain.length) % (limit + 1)] if limit > 1 else drafts

    def _dice(self, key: int, length: int) -> int:
        return hashing.mix(hashing.mix(self._world.seed + (key << 24)) + length)
