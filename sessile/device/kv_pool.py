"""The KV pool: where K and V of every page lie. Whose page is whose is the core's knowledge, not the device's."""

import torch
from torch import Tensor

from sessile.contract.plan import Ints
from sessile.device.memory import readable
from sessile.errors import PlanError, StartupError
from sessile.kernels.native import advise_huge_pages
from sessile.model.config import ModelConfig
from sessile.units import ceil_div

_AUTO_SHARE = 0.25
_AUTO_BYTES_MAX = 8 << 30


class KvPool:
    """keys, values [layers, pages × page_size, kv_heads, head_dim]; memory is taken when a page is first written."""

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.layers, pages * page_size, config.kv_heads, config.head_dim)
        self.pages = pages
        self.page_size = page_size
        self.keys: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self.values: Tensor = torch.empty(shape, dtype=dtype, device=device)
        if device.type == "cpu":
            advise_huge_pages(self.keys)
            advise_huge_pages(self.values)

    @property
    def bytes(self) -> int:
        """Size of the whole pool."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def copy(self, copies: Ints) -> None:
        """Copy the KV of the first tokens of pages; copies int32[c, 3]: source page, target page, tokens."""
        for source, target, tokens in copies.tolist():
            if not (0 < source < self.pages and 0 < target < self.pages and 0 < tokens <= self.page_size):
                raise PlanError(f"copy of {tokens} tokens from page {source} to page {target} is out of bounds")
            source, target = source * self.page_size, target * self.page_size
            for pool in (self.keys, self.values):
                pool[:, target : target + tokens] = pool[:, source : source + tokens]


def auto_kv_bytes(available: int, context_bytes: int, rows_max: int) -> int:
    """Bytes for the pool where the user names none: a share of what is free, at least one context if that fits.

    More than a full context for every row is more than could run, and beyond that a pool only keeps old prefixes.
    """
    share = min(int(available * _AUTO_SHARE), _AUTO_BYTES_MAX, context_bytes * (rows_max + 1))
    return max(share, context_bytes)


def pool_pages(kv_bytes: int, available: int, token_bytes: int, page_size: int, context_tokens: int) -> int:
    """Pages that fit into kv_bytes, the scratch page included. Raises StartupError if they cannot hold one context."""
    if kv_bytes > available:
        raise StartupError(
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
