"""Plans on their way to a GPU and results on their way back, without a copy that the host would have to queue."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sessile.kernels.triton_mailbox import SLOTS, Mailbox, fetch_plan, leave_results


class Exchange:
    """Carries the packed plan of each step to `target` on the device, and back what the step has left in `source`.

    For each step: `send`, then on the device, in a graph or not, `fetch` and, if it has results, `leave`, and
    `Crossing.close`. Behind a step that did not get so far `lose_track` is called, and the device waited for before
    as many others are sent as there are slots. All of it is queued on the stream that is current when the exchange
    is made, and done before the exchange is given up: the device writes to its memory, and PyTorch does not know of
    it.
    """

    def __init__(self, words: int, source: Tensor) -> None:
        """words: most that a plan may have. source int32[s]: where results are left."""
        device = source.device
        self.words = words
        """Most words that a plan may have."""
        self.target: Tensor = torch.zeros(words, dtype=torch.int32, device=device)
        self._source = source
        self._mailbox = Mailbox.empty(words, source.numel(), device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._slots = [_Slot(self._mailbox, index, stream) for index in range(SLOTS)]
        self._next = 0
        self._is_lost = False

    def send(self, packed: npt.NDArray[np.int32]) -> "Crossing":
        """Lay out a packed plan for the device to fetch. Waits for the oldest step if too many are on their way."""
        if self._is_lost:
            self._mailbox.turns.fill_(self._next)
            self._is_lost = False
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        return slot.begin(packed)

    def lose_track(self) -> None:
        """A step may have failed before or after its plan was fetched: tell the device anew where the next one is."""
        self._is_lost = True

    def fetch(self) -> None:
        """On the device: bring the plan that was sent to `target`; what follows it there is undefined."""
        fetch_plan(self._mailbox, self.target)

    def leave(self, words: int) -> None:
        """On the device: hand over the first words of `source` as the results of the step whose plan was fetched."""
        assert words <= self._source.numel(), f"{words} words of results, and room for {self._source.numel()}"
        leave_results(self._mailbox, self._source, words)


class Crossing:
    """One step's way to the device and back, which has its slot until the result is there."""

    def __init__(self, slot: "_Slot") -> None:
        self._slot: _Slot | None = slot
        self._words = 0
        self._results: npt.NDArray[np.int32] | None = None

    def close(self, words: int) -> None:
        """All of the step is queued, and it leaves so many words, maybe none; once."""
        assert self._slot is not None and not self._slot.is_closed, "a step is closed once"
        self._words = words
        self._slot.close()

    def settle(self) -> None:
        """Wait for the device and bring the result out of the slot, unless that was done."""
        if self._slot is not None:
            self._results = self._slot.words(self._words)
            self._slot = None

    def is_done(self) -> bool:
        """Whether all that was queued before `close` is done."""
        return self._slot is None or self._slot.is_passed()

    def take(self) -> npt.NDArray[np.int32]:
        """Wait for all that was queued before `close` and return the words. Raises what the device raised."""
        self.settle()
        assert self._results is not None, "a step that was closed has results"
        return self._results


class _Slot:
    """The memory of one step at a time, as the host sees it."""

    def __init__(self, mailbox: Mailbox, index: int, stream: torch.cuda.Stream | None) -> None:
        self.is_closed = False
        self._plan: npt.NDArray[np.int32] = mailbox.plans[index].numpy()
        self._length: npt.NDArray[np.int32] = mailbox.lengths[index : index + 1].numpy()
        self._results: npt.NDArray[np.int32] = mailbox.results[index].numpy()
        self._stream = stream
        self._passed = torch.cuda.Event() if stream is not None else None
        self._crossing: Crossing | None = None

    def begin(self, packed: npt.NDArray[np.int32]) -> Crossing:
        """Take in a plan, once the step that had the slot before is done."""
        if self._crossing is not None and self.is_closed:
            self._crossing.settle()
        self._plan[: packed.size] = packed
        self._length[0] = packed.size
        self.is_closed = False
        self._crossing = Crossing(self)
        return self._crossing

    def close(self) -> None:
        """Note where the queue ends."""
        self.is_closed = True
        if self._passed is not None:
            self._passed.record(self._stream)

    def is_passed(self) -> bool:
        """Whether the device has passed the end that was noted."""
        return self._passed is None or bool(self._passed.query())

    def words(self, words: int) -> npt.NDArray[np.int32]:
        """Wait for the end that was noted and return a copy of the first words."""
        assert self.is_closed, "only a step that is queued as a whole can be waited for"
        assert words <= self._results.size, f"{words} words of results, and room for {self._results.size}"
        if self._passed is not None:
            self._passed.synchronize()
        return self._results[:words].copy()
