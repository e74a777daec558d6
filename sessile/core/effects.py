"""What the machine tells the world, gathered during a step and handed out once, after it."""

import numpy as np

from sessile.contract.messages import Batch, Done, Reply, Scores, SessionGone, TokenDetail
from sessile.contract.plan import Ints
from sessile.core.rows import Column


class Effects:
    """Collects deltas, ends and replies until `take`."""

    def __init__(self) -> None:
        self._keys: list[Column] = []
        self._counts: list[Ints] = []
        self._tokens: list[Ints] = []
        self._single: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._details: list[TokenDetail] = []
        self._scores: list[Scores] = []
        self._done: list[Done] = []
        self._replies: list[Reply] = []
        self._gone: list[SessionGone] = []

    def deltas(self, keys: Column, counts: Ints, tokens: Ints) -> None:
        """New tokens of many requests: int64 keys [d], int32 counts [d], int32 tokens [sum counts]."""
        if len(keys):
            self._keys.append(keys)
            self._counts.append(counts)
            self._tokens.append(tokens)

    def delta(self, key: int, tokens: list[int]) -> None:
        """New tokens of one request."""
        keys, counts, flat = self._single
        keys.append(key)
        counts.append(len(tokens))
        flat.extend(tokens)

    def detail(self, detail: TokenDetail) -> None:
        """Log-probabilities beside a delta of this batch."""
        self._details.append(detail)

    def scores(self, scores: Scores) -> None:
        """Log-probabilities of prompt tokens."""
        self._scores.append(scores)

    def done(self, done: Done) -> None:
        """The one end of a request."""
        self._done.append(done)

    def reply(self, reply: Reply) -> None:
        """The answer to an operation."""
        self._replies.append(reply)

    def gone(self, gone: SessionGone) -> None:
        """A session ended by itself."""
        self._gone.append(gone)

    def take(self, step: int) -> Batch | None:
        """Everything since the last call, as one message; None if there is nothing."""
        keys, counts, flat = self._single
        if keys:
            self.deltas(np.array(keys, np.int64), np.array(counts, np.int32), np.array(flat, np.int32))
        if not (self._keys or self._scores or self._done or self._replies or self._gone):
            return None
        batch = Batch(
            step=step,
            delta_keys=_joined(self._keys, np.int64),
            delta_counts=_joined(self._counts, np.int32),
            delta_tokens=_joined(self._tokens, np.int32),
            details=self._details,
            scores=self._scores,
            done=self._done,
            replies=self._replies,
            gone=self._gone,
        )
        self.__init__()  # type: ignore[misc]
        return batch


def _joined(parts: "list[Column] | list[Ints]", dtype: type) -> bytes:
    if not parts:
        return b""
    return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0], dtype).tobytes()
