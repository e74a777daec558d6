"""The KV pool: where K and V of every page lie. Whose page is whose is the core's knowledge, not the device's."""

import torch
from torch import Tensor

from sessile.contract.plan import Ints
from sessile.device.memory import readable
from sessile.errors import MachineLacks, PlanError, StartupError
from sessile.kernels.attention import PagedCache
from sessile.kernels.native import advise_huge_pages
from sessile.model.config import ModelConfig
from sessile.units import ceil_div

_AUTO_SHARE = 0.25
_AUTO_BYTES_MAX = 8 << 30


class KvPool:
    """keys, values [layers, pages × page_size, kv_heads, head_dim]; memory is taken when a page is first written.

    dtype: of K and V. In int8, which the C++ kernels of the CPU read, key_scales and value_scales float32[layers,
    pages × page_size, kv_heads] say what to multiply a head with; else they are None.
    """

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.layers, pages * page_size, config.kv_heads, config.head_dim)
        self.pages = pages
        self.page_size = page_size
        self.keys: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self.values: Tensor = torch.empty(shape, dtype=dtype, device=device)
        scales = shape[:3] if dtype == torch.int8 else None
        self.key_scales = None if scales is None else torch.empty(scales, dtype=torch.float32, device=device)
        self.value_scales = None if scales is None else torch.empty(scales, dtype=torch.float32, device=device)
        parts = self.keys, self.values, self.key_scales, self.value_scales
        self._parts = [part for part in parts if part is not None]
        if device.type == "cpu":
            for part in self._parts:
                advise_huge_pages(part)

    @property
    def bytes(self) -> int:
        """Size of the whole pool."""
        return sum(part.numel() * part.element_size() for part in self._parts)

    def cache(self, table: Tensor) -> PagedCache:
        """What attention on the CPU reads and writes; table int32[rows_max, pages of a row]."""
        return PagedCache(self.keys, self.values, table, self.page_size, self.key_scales, self.value_scales)

    def copy(self, copies: Ints) -> None:
        """Copy the KV of the first tokens of pages; copies int32[c, 3]: source page, target page, tokens."""
        for source, target, tokens in copies.tolist():
            if not (0 < source < self.pages and 0 < target < self.pages and 0 < tokens <= self.page_size):
                raise PlanError(f"copy of {tokens} tokens from page {source} to page {target} is out of bounds")
            source, target = source * self.page_size, target * self.page_size
            for part in self._parts:
                part[:, target : target + tokens] = part[:, source : source + tokens]


def kv_token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of K and V of one token in all layers, in int8 with their scales."""
    scale_bytes = torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * config.layers * config.kv_heads * (config.head_dim * dtype.itemsize + scale_bytes)


def auto_kv_bytes(available: int, context_bytes: int, rows_max: int) -> int:
    """Bytes for the pool where the user names none: a share of what is free, at least one context if that fits.

    More than a full context for every row is more than could run, and beyond that a pool only keeps old prefixes.
    """
    share = min(int(available * _AUTO_SHARE), _AUTO_BYTES_MAX, context_bytes * (rows_max + 1))
    return max(share, context_bytes)


def pool_pages(kv_bytes: int, available: int, token_bytes: int, page_size: int, context_tokens: int) -> int:
    """Pages that fit into kv_bytes, the scratch page included. Raises StartupError if they cannot hold one context."""
    if kv_bytes > available:
        raise MachineLacks(
            f"too little memory: KV needs {readable(kv_bytes)} but only {readable(available)} is free. "
            "Lower --kv-memory or --context-tokens, or free memory."
        )
    pages = kv_bytes // (token_bytes * page_size)
    needed = ceil_div(context_tokens, page_size) + 1
    if pages < min(needed, 3):
        raise StartupError(
            f"--kv-memory of {readable(kv_bytes)} holds {pages} pages of {page_size} tokens; at least "
            f"{readable(3 * token_bytes * page_size)} is needed."
        )
    return pages
