"""Moving small arrays between host and device without making the host wait for the device."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sessile.units import ceil_div

_PIECE_WORDS = 1024
"""A plan is copied in so many words or a multiple of them."""


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy of the array on the device; to a GPU queued from pinned memory, which torch keeps until it is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, to be read only when an event recorded after this call has passed."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Exchange:
    """Carries the packed plan of each step to `target` on the device, which graphs read, and what it left there back.

    Each step has pinned memory of its own, which is used again when what came back was taken: then the copy of its plan
    is done as well. All of it is queued on the stream that is current when the exchange is made.
    """

    def __init__(self, words: int, source: Tensor) -> None:
        """words: most that a plan may have. source int32[s]: where results are left."""
        self.target: Tensor = torch.zeros(words, dtype=torch.int32, device=source.device)
        self._source = source
        self._stream = torch.cuda.current_stream(source.device) if source.device.type == "cuda" else None
        self._idle: list[_Pinned] = []

    @property
    def words(self) -> int:
        """Most words that a plan may have."""
        return self.target.numel()

    def send(self, packed: npt.NDArray[np.int32]) -> "Crossing":
        """Queue the copy of a packed plan to the start of `target`; what follows it there is undefined."""
        pinned = self._idle.pop() if self._idle else _Pinned(self.target, self._source, self._stream)
        pinned.upload(packed)
        return Crossing(pinned, self._idle)


class Crossing:
    """One step's way to the device and back. One whose result is never taken keeps its memory to itself."""

    def __init__(self, pinned: "_Pinned", idle: "list[_Pinned]") -> None:
        self._pinned, self._idle = pinned, idle
        self._words = 0

    def fetch(self, words: int) -> None:
        """Queue the copy of the first words that the step left, maybe none; once."""
        self._words = words
        self._pinned.download(words)

    def take(self) -> npt.NDArray[np.int32]:
        """Wait for all that was queued before `fetch` and return the words, once. Raises what the device raised."""
        words = self._pinned.downloaded(self._words)
        self._idle.append(self._pinned)
        return words


class _Pinned:
    """Memory for one step at a time that a GPU copies from and to by itself.

    Views are kept by size, of which there are few: to make them takes as long as to queue the copy.
    """

    def __init__(self, target: Tensor, source: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._target, self._source, self._stream = target, source, stream
        on_gpu = stream is not None
        self._plan = torch.zeros(target.numel(), dtype=torch.int32, pin_memory=on_gpu)
        self._result = torch.zeros(source.numel(), dtype=torch.int32, pin_memory=on_gpu)
        self._passed = torch.cuda.Event() if on_gpu else None
        self._plan_words: npt.NDArray[np.int32] = self._plan.numpy()
        self._result_words: npt.NDArray[np.int32] = self._result.numpy()
        self._uploads: dict[int, tuple[Tensor, Tensor]] = {}
        self._downloads: dict[int, tuple[Tensor, Tensor]] = {}

    def upload(self, packed: npt.NDArray[np.int32]) -> None:
        """Queue the copy of a plan."""
        self._plan_words[: packed.size] = packed
        words = min(ceil_div(packed.size, _PIECE_WORDS) * _PIECE_WORDS, self._plan.numel())
        if words not in self._uploads:
            self._uploads[words] = self._target[:words], self._plan[:words]
        device_words, host_words = self._uploads[words]
        device_words.copy_(host_words, non_blocking=True)

    def download(self, words: int) -> None:
        """Queue the copy of the first words of a result, and note where the queue ends."""
        if words:
            if words not in self._downloads:
                self._downloads[words] = self._result[:words], self._source[:words]
            host_words, device_words = self._downloads[words]
            host_words.copy_(device_words, non_blocking=True)
        if self._passed is not None:
            self._passed.record(self._stream)

    def downloaded(self, words: int) -> npt.NDArray[np.int32]:
        """Wait for the end that was noted and return a copy of the first words."""
        if self._passed is not None:
            self._passed.synchronize()
        return self._result_words[:words].copy()
