"""FlashAttention-3 for prompts on Hopper, where a package that brings it is installed; ours serve without it.

Three packages carry the same kernels behind one operator of nearly the same arguments, which torch's dispatcher knows
by name. So the operator is called by the names of its arguments, and a package's own Python is never imported: that
of the two servers would bring in a server.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sessile.units import ceil_div

HEAD_DIMS = (64, 96, 128, 192, 256)
"""Sizes of heads that the packages compile. Others they would pad."""
DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY_MAJOR = 9
"""Hopper's. The kernels are written for its matrix units; later GPUs have others."""
FILLED_SHARE = 0.8
"""With tiles for this share of the multiprocessors it splits no history."""
TILE_QUERIES = 128
"""Tokens × query heads of a KV head that one tile holds."""
FEW_ROWS, FEW_ROWS_TOKENS_MIN = 8, 128
"""Steps with fewer tiles are faster by it if they have at most so many rows and at least so many tokens."""


@dataclass(frozen=True)
class Package:
    """Where a library with the operator may lie. file_pattern: of its file, within the Python package."""

    name: str
    python: str
    file_pattern: str
    namespace: str


PACKAGES = (
    Package("flash-attn-3", "flash_attn_3", "_C*.so", "flash_attn_3"),
    Package("sglang-kernel", "sgl_kernel", "flash_ops*.so", "sgl_kernel"),
    Package("vllm", "vllm", "vllm_flash_attn/_vllm_fa3_C*.so", "_vllm_fa3_C"),
)
"""In the order in which they are tried: whoever installed the first did so for it."""


@dataclass(frozen=True)
class ListedRows:
    """The rows of a step with many query tokens, side by side; the device writes the lists, zeros behind the last row.

    rows, counts, lengths int32[n], firsts int32[n + 1]: batch row, query tokens, KV tokens with this step's own, and
    index of the first query in the step's tokens. pads int32[n]: zeros. tokens: no row has more query tokens. splits:
    parts that a history may be cut into; 0: as many as the operator finds best for the sizes that it is given.
    """

    rows: Tensor
    counts: Tensor
    lengths: Tensor
    firsts: Tensor
    pads: Tensor
    tokens: int
    splits: int = 0

    @classmethod
    def empty(cls, rows: int, tokens: int, device: torch.device, splits: int = 0) -> "ListedRows":
        """Room for so many rows, none of which has more query tokens than that. Until lists are written, for none."""
        together = torch.zeros(5 * rows + 1, dtype=torch.int32, device=device)
        listed, counts, lengths, pads, firsts = together.split([rows] * 4 + [rows + 1])
        return cls(listed, counts, lengths, firsts, pads, tokens, splits)

    @property
    def pieces(self) -> int:
        """Length of the lists; 0 if there is nothing to do."""
        return self.rows.numel()


class FlashAttention3:
    """The operator of one package, behind the signature of our own kernels. Owns nothing.

    Raises ValueError if the operator has arguments that we know no value for.
    """

    def __init__(self, name: str, operator: Any) -> None:
        self.name = name
        self._operator = operator
        arguments = operator._schema.arguments
        unknown = [argument.name for argument in arguments if not _has_value(argument)]
        missing = {"page_table", "seqused_q", "kv_batch_idx", "out"} - {argument.name for argument in arguments}
        if unknown or missing:
            raise ValueError(f"it is of another version (arguments {', '.join([*unknown, *sorted(missing)])})")
        self._defaults = [(argument.name, _constant(argument)) for argument in arguments]

    def splits(self, tokens: int, rows: int, heads: int, kv_heads: int) -> int | None:
        """ListedRows.splits for the prompts in steps of this size; None: our own kernels are faster.

        tokens, rows: of the bucket. By measurement on an H100 (docs/BENCHMARKS.md). Where prompts make tiles for the
        whole GPU they need no splitting. Where they do not, histories must be split, and merging them costs the
        operator something for each row that a step might have.
        """
        # Most rows beside a prompt decode one token. Those that the bucket has room for make no tiles.
        tiles = kv_heads * ceil_div(max(tokens - rows, 0) * heads // kv_heads, TILE_QUERIES)
        if tiles >= FILLED_SHARE * torch.cuda.get_device_properties().multi_processor_count:
            return 1
        return 0 if rows <= FEW_ROWS and tokens >= FEW_ROWS_TOKENS_MIN else None

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        listed: ListedRows,
        page_size: int,
        out: Tensor,
    ) -> None:
        """Attend with the queries of the listed rows; writes their part of out [t, heads, head_dim] and nothing else.

        query [t, heads, head_dim]; keys, values [slots, kv_heads, head_dim], this step's own included; table
        int32[rows_max, pages]. All lengths are read on the device, so a CUDA graph may hold the call.
        """
        paged = (keys.shape[0] // page_size, page_size, *keys.shape[1:])
        given = {
            "q": query,
            "k": keys.view(paged),
            "v": values.view(paged),
            "out": out,
            # Rows of few queries lie between these: without a count of its own a row would reach to the next one.
            "cu_seqlens_q": listed.firsts,
            "seqused_q": listed.counts,
            "seqused_k": listed.lengths,
            "max_seqlen_q": listed.tokens,
            # With the batch row of each the whole table serves as it lies, and nothing is gathered.
            "page_table": table,
            "kv_batch_idx": listed.rows,
            # Whole pages of 128 tokens would be copied with what lies behind a row's end, which may be no numbers, and
            # nothing times that is no number. With padding on the left, be it none, only the row's tokens are read.
            "leftpad_k": listed.pads,
            "softmax_scale": query.shape[-1] ** -0.5,
            "num_splits": listed.splits,
        }
        self._operator(*[given.get(name, default) for name, default in self._defaults])


_CONSTANTS: dict[str, Any] = {
    "is_causal": True,
    "window_size_left": -1,
    "window_size_right": -1,
    "attention_chunk": 0,
    "softcap": 0.0,
    "is_rotary_interleaved": False,
    "sm_margin": 0,
    "only_qv": False,
    "cp_world_size": 1,
    "cp_rank": 0,
}
_GIVEN = frozenset({"q", "k", "v", "softmax_scale", "num_splits"})


def _has_value(argument: Any) -> bool:
    is_optional = argument.type.kind() == "OptionalType"
    return argument.name in _GIVEN | _CONSTANTS.keys() or is_optional or argument.has_default_value()


def _constant(argument: Any) -> Any:
    """What an argument gets that a call says nothing of."""
    return _CONSTANTS.get(argument.name, argument.default_value)


@dataclass(frozen=True)
class Availability:
    """Whether FlashAttention-3 is usable here, what was found, and what to do to have it."""

    kernels: FlashAttention3 | None
    found: str
    remedy: str = ""


@cache
def available_flash_attention3() -> Availability:
    """The first of the packages whose library can be loaded. Loading takes a moment, so it is done once."""
    faults = []
    for package in PACKAGES:
        for path in _libraries(package):
            try:
                torch.ops.load_library(str(path))
                operator = getattr(torch.ops, package.namespace).fwd.default
                return Availability(FlashAttention3(package.name, operator), f"FlashAttention-3 of {package.name}")
            except (OSError, AttributeError, ValueError) as error:  # of another torch or CUDA, or of another version
                faults.append(f"{package.name}: {next(iter(str(error).splitlines()), type(error).__name__)}")
    if faults:
        return Availability(None, f"FlashAttention-3 cannot be loaded ({'; '.join(faults)})", f"Install {_OFFERS}.")
    return Availability(None, "FlashAttention-3 is not installed", f"For faster prompts install {_OFFERS}.")


_OFFERS = "a flash-attn-3, sglang-kernel or vllm that is built for this torch and CUDA"


def _libraries(package: Package) -> Iterator[Path]:
    """Its library, if the Python package is installed; the package is not imported."""
    spec = importlib.util.find_spec(package.python)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob(package.file_pattern))


def unsuited(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> str:
    """Why FlashAttention-3 cannot attend for such a model on such a GPU, and what to do; "" if it can.

    capability: of the GPU, None for a CPU. Asked before its kernels run, which end the process where they were not
    compiled for what they are given.
    """
    if capability is None or capability[0] != CAPABILITY_MAJOR:
        return "it is for Hopper GPUs alone (H100, H200). Use --attention triton."
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"it does not compute in {name}. Use --dtype bfloat16 or --attention triton."
    if head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"it has no kernels for heads of {head_dim} dimensions, only of {sizes}. Use --attention triton."
    return ""
