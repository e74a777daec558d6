"""Moving small arrays between host and device without making the host wait for the device."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


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


class Moment:
    """A point in the device's queue that the host can wait for; on a CPU it has always passed."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event:
            self._event.record()

    def wait(self) -> None:
        """Return when all that was queued before has been done. Raises what the device raised."""
        if self._event:
            self._event.synchronize()


class UploadRing:
    """A few pinned buffers that carry one packed plan a step into one buffer on the device, which graphs read.

    A buffer is written again only when the copy from it is done.
    """

    BUFFERS = 3

    def __init__(self, words: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.target: Tensor = torch.zeros(words, dtype=torch.int32, device=device)
        self._device = device
        self._buffers = [torch.zeros(words, dtype=torch.int32, pin_memory=on_gpu) for _ in range(self.BUFFERS)]
        self._done: list[Moment | None] = [None] * self.BUFFERS
        self._next = 0

    @property
    def words(self) -> int:
        """Most words that a plan may have."""
        return self.target.numel()

    def send(self, packed: npt.NDArray[np.int32]) -> None:
        """Queue the copy of a packed plan to the start of `target`."""
        index = self._next
        self._next = (index + 1) % self.BUFFERS
        if (done := self._done[index]) is not None:
            done.wait()
        buffer = self._buffers[index][: packed.size]
        buffer.numpy()[:] = packed
        self.target[: packed.size].copy_(buffer, non_blocking=True)
        self._done[index] = Moment(self._device)
