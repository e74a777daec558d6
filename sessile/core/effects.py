"""What the machine tells the world, gathered during a step and handed out once, after it."""

import numpy as np

from sessile.contract.messages import Batch, Done, Reply, Scores, SessionGone, TokenDetail
from sessile.contract.plan import Ints
from sessile.core.rows import Column


class Effects:
    """Collects deltas, ends and replies until `take`."""

    def __init__(self) -> None:
        self._new = _Gathered()

    def deltas(self, keys: Column, counts: Ints, tokens: Ints) -> None:
        """New tokens of many requests: int64 keys [d], int32 counts [d], int32 tokens [sum counts]."""
        if len(keys):
            assert keys.itemsize == 8 and counts.itemsize == 4 == tokens.itemsize, "what is sent is the very bytes"
            self._new.keys.append(keys)
            self._new.counts.append(counts)
            self._new.tokens.append(tokens)

    def delta(self, key: int, tokens: list[int]) -> None:
        """New tokens of one request."""
        keys, counts, flat = self._new.single
        keys.append(key)
        counts.append(len(tokens))
        flat.extend(tokens)

    def detail(self, detail: TokenDetail) -> None:
        """Log-probabilities beside a delta of this batch."""
        self._new.details.append(detail)

    def scores(self, scores: Scores) -> None:
        """Log-probabilities of prompt tokens."""
        self._new.scores.append(scores)

    def done(self, done: Done) -> None:
        """The one end of a request."""
        self._new.done.append(done)

    def reply(self, reply: Reply) -> None:
        """The answer to an operation."""
        self._new.replies.append(reply)

    def gone(self, gone: SessionGone) -> None:
        """A session ended by itself."""
        self._new.gone.append(gone)

    def take(self, step: int) -> Batch | None:
        """Everything since the last call, as one message; None if there is nothing."""
        keys, counts, flat = self._new.single
        if keys:
            self.deltas(np.array(keys, np.int64), np.array(counts, np.int32), np.array(flat, np.int32))
        new = self._new
        if not (new.keys or new.scores or new.done or new.replies or new.gone):
            return None
        self._new = _Gathered()
        return Batch(
            step=step,
            delta_keys=_joined(new.keys),
            delta_counts=_joined(new.counts),
            delta_tokens=_joined(new.tokens),
            details=new.details,
            scores=new.scores,
            done=new.done,
            replies=new.replies,
            gone=new.gone,
        )


class _Gathered:
    """What was collected since the last call of `take`."""

    __slots__ = ("counts", "details", "done", "gone", "keys", "replies", "scores", "single", "tokens")

    def __init__(self) -> None:
        self.keys: list[Column] = []
        self.counts: list[Ints] = []
        self.tokens: list[Ints] = []
        self.single: tuple[list[int], list[int], list[int]] = ([], [], [])
        self.details: list[TokenDetail] = []
        self.scores: list[Scores] = []
        self.done: list[Done] = []
        self.replies: list[Reply] = []
        self.gone: list[SessionGone] = []


def _joined(parts: "list[Column] | list[Ints]") -> bytes:
    return parts[0].tobytes() if len(parts) == 1 else b"".join([part.tobytes() for part in parts])
