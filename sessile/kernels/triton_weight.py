"""How the kernels of a GPU see a weight: plain, or quantised with its scales beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sessile.kernels import reference

GROUP = 32
"""int4 weights of one row that share a scale and a minimum."""


@dataclass(frozen=True)
class Quantised:
    """A weight [out, in] whose numbers are widened where they are multiplied.

    numbers: int8 or float8_e4m3fn [out, in], with scales float32[out]; or int4 as uint8[out, in / 2], where byte i of
    a group of 32 holds weights i and i + 16, with scales int32[out, in / 32]: a bfloat16 scale in the lower half, a
    bfloat16 minimum in the upper one.
    """

    numbers: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        rows, columns = self.shape
        expected = (rows, columns // GROUP) if self.is_int4 else (rows,)
        assert tuple(self.scales.shape) == expected and self.numbers.is_contiguous() and self.scales.is_contiguous()
        assert not self.is_int4 or (columns % GROUP == 0 and self.scales.dtype == torch.int32)

    @property
    def is_int4(self) -> bool:
        """Whether a byte holds two weights."""
        return self.numbers.dtype == torch.uint8

    def widened(self) -> Tensor:
        """float32[out, in] that the numbers stand for: the kernels' twin."""
        if not self.is_int4:
            return self.numbers.float() * self.scales[:, None]
        pairs = self.scales.view(torch.bfloat16).unflatten(1, (-1, 2))
        return reference.unpack_int4(self.numbers, pairs)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.numbers.shape
        return rows, columns * 2 if self.is_int4 else columns


Weight = Tensor | Quantised
"""[out, in]."""
