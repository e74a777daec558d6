"""Choosing tokens from logits: filters, seeded noise, and the most likely few. Pure functions, on any device.

Noise is a function of (seed, output index, token id) and of nothing else: not of the batch, the row, or the filters.
"""

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

_MASK_32 = 0xFFFFFFFF
_ODD_64 = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio in 64 bits, as a signed number
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24

CANDIDATES = (128, 2048)
"""How many of the most likely tokens are looked at first, and next; rows that may keep more are sorted whole."""

_BLOCK = 32
"""Tokens whose largest value stands for them when a few are sought among many."""


def gumbel_noise(seeds: Tensor, output_indices: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32[m, k], for seeds and output_indices int64[m] and token_ids int64[m, k] or [k].

    Adding it to log-probabilities and taking the maximum draws from them (Gumbel-max). The uniform numbers beneath
    come from a counter: two rounds of MurmurHash3's finaliser on the token id, keyed by a hash of the other two.
    """
    low, high = noise_keys(seeds, output_indices)
    hashed = _mix_32((_mix_32(token_ids ^ low.unsqueeze(-1)) + high.unsqueeze(-1)) & _MASK_32)
    # Small numbers are exact in float32 and give the large noise that decides; 1 would give minus infinity.
    uniform = ((hashed.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=_LARGEST_BELOW_ONE)
    return -(-torch.log1p(-uniform)).log_()


def noise_keys(seeds: Tensor, output_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high half, int64[m] each, of the key under which token ids are hashed."""
    key = _mix_64(_mix_64(seeds + _ODD_64) + output_indices * _ODD_64)
    return key & _MASK_32, _shifted(key, 32)


@cache
def _compiled() -> ModuleType | None:
    """The compiled kernel of the CPU, or None where numba or torch's OpenMP is not usable."""
    try:
        importlib.import_module("sessile.kernels.compiled").check_openmp()
        return importlib.import_module("sessile.kernels.sampling_cpu")
    except (ImportError, OSError, AttributeError):
        return None


def prepare_sampling() -> None:
    """Compile the kernel that a step may need, so that no step waits for it."""
    kernels = _compiled()
    if kernels is not None:
        kernels.prepare()


def free_draw(scaled: Tensor, seeds: Tensor, output_indices: Tensor) -> Tensor:
    """Draw from the softmax of whole rows, int64[m]; scaled float32[m, vocab], seeds and output_indices int64[m]."""
    kernels = _compiled() if scaled.device.type == "cpu" else None
    if kernels is None:
        ids = torch.arange(scaled.shape[-1], device=scaled.device)
        return (scaled + gumbel_noise(seeds, output_indices, ids)).argmax(dim=-1)
    ids = kernels.finalists(scaled.contiguous(), *noise_keys(seeds, output_indices)).T
    # A part of the vocabulary a thread: which of their winners is first must not hang on how many there were.
    ids = ids.sort(dim=-1).values
    finals = scaled.gather(-1, ids) + gumbel_noise(seeds, output_indices, ids)
    return ids.gather(-1, finals.argmax(dim=-1, keepdim=True)).squeeze(-1)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    seeds: Tensor,
    output_indices: Tensor,
) -> Tensor:
    """Draw a token for each row, int64[m].

    logits float32[m, vocab], penalties and bias included; temperatures, top_ps (1 = off), min_ps (0 = off)
    float32[m]; top_ks (0 = off), seeds, output_indices int64[m]. Temperature first, then top-k, then top-p of what is
    left, then min-p against the most likely. Temperature 0 takes the most likely; the lowest id wins a tie.
    """
    greedy = temperatures == 0
    scaled = logits / torch.where(greedy, 1.0, temperatures).unsqueeze(-1)
    filtered = ((top_ks > 0) | (top_ps < 1) | (min_ps > 0)) & ~greedy
    tokens = logits.argmax(dim=-1)
    free = (~filtered & ~greedy).nonzero().flatten()
    if free.numel():
        tokens[free] = free_draw(scaled[free], seeds[free], output_indices[free])
    rows = filtered.nonzero().flatten()
    if rows.numel():
        parts = (scaled, top_ks, top_ps, min_ps, seeds, output_indices)
        tokens[rows] = _sample_filtered(*(part[rows] for part in parts))
    return tokens


def _sample_filtered(
    scaled: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, seeds: Tensor, output_indices: Tensor
) -> Tensor:
    """Draw among the most likely few; rows whose few do not reach far enough are done again over the vocabulary."""
    vocab = scaled.shape[-1]
    log_total = scaled.logsumexp(dim=-1, keepdim=True)
    tokens = torch.empty(scaled.shape[0], dtype=torch.int64, device=scaled.device)
    rows = torch.arange(scaled.shape[0], device=scaled.device)
    for count in (*(count for count in CANDIDATES if count < vocab), vocab):
        values, ids = top_candidates(scaled[rows], count)
        probabilities = (values - log_total[rows]).exp()
        keep, short = _kept(probabilities, top_ks[rows], top_ps[rows], min_ps[rows], vocab)
        noisy = (values + gumbel_noise(seeds[rows], output_indices[rows], ids)).masked_fill_(~keep, float("-inf"))
        tokens[rows] = ids.gather(-1, noisy.argmax(dim=-1, keepdim=True)).squeeze(-1)
        rows = rows[short]
        if not rows.numel():
            break
    return tokens


def _kept(
    probabilities: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """Which candidates pass the filters, bool[m, k], and which rows might keep candidates beyond these, bool[m].

    probabilities float32[m, k]: of the k most likely, descending.
    """
    count = probabilities.shape[-1]
    rank = torch.arange(count, device=probabilities.device)
    top_ks = torch.where(top_ks > 0, top_ks, vocab).unsqueeze(-1)
    top_ps, min_ps = top_ps.unsqueeze(-1), min_ps.unsqueeze(-1)
    first_k = probabilities * (rank < top_ks)
    # Without top-k the mass that top-p is a share of is that of the whole vocabulary, not of these candidates.
    mass = torch.where(top_ks < vocab, first_k.sum(dim=-1, keepdim=True), 1.0)
    before = first_k.cumsum(dim=-1) - first_k
    keep = (rank < top_ks) & ((before < top_ps * mass) | (top_ps >= 1)) & (first_k >= min_ps * first_k[:, :1])
    keep[:, 0] = True
    return keep, keep[:, -1] & (top_ks.squeeze(-1) > count)


def top_candidates(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values and their ids, descending, lowest id first on ties: float32[m, count], int64[m, count].

    A few among many are sought in the blocks with the largest maxima: each of the count largest lies in one of the
    count first blocks, as every block before its own holds a value that comes before it.
    """
    size = values.shape[-1]
    if count * _BLOCK * 4 > size:
        ids = torch.arange(size, device=values.device).expand(values.shape)
        return _ordered(values, ids, count)
    padded = functional.pad(values, (0, -size % _BLOCK), value=float("-inf")).unflatten(-1, (-1, _BLOCK))
    blocks = top_candidates(padded.amax(dim=-1), count)[1]
    within = torch.arange(_BLOCK, device=values.device)
    ids = (blocks.unsqueeze(-1) * _BLOCK + within).flatten(-2)
    return _ordered(padded.flatten(-2).gather(-1, ids), ids, count)


def _ordered(values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first of values float32[m, k] with ids int64[m, k], by value descending, then by id ascending.

    torch.topk leaves the order of ties open, so value and id go into one integer whose order is total.
    """
    bits = values.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys = (ordered << 32) | (_MASK_32 - ids)
    places = torch.topk(keys, count, dim=-1).indices
    return values.gather(-1, places), ids.gather(-1, places)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014), on int64 with wrap-around."""
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _mix_32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby) on 32 bits kept in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK_32
    return x ^ (x >> 16)
