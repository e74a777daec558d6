"""Log-probabilities of output and prompt tokens, for the rows and positions that ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sessile.contract.plan import NO_FLOATS, NO_INTS, Floats, Ints
from sessile.kernels.sampling import top_candidates

_POSITIONS_AT_ONCE = 64
"""Bounds the memory of a prompt's scores: this many positions × vocabulary × 4 bytes, a few times over."""


@dataclass(frozen=True)
class Logprobs:
    """chosen float32[n]; top_ids int32 and tops float32: for each of the n, as many as were asked for, flat."""

    chosen: Floats
    top_ids: Ints
    tops: Floats


NO_LOGPROBS = Logprobs(NO_FLOATS, NO_INTS, NO_FLOATS)


def token_logprobs(logits: Tensor, tokens: Tensor, top_counts: Ints) -> Logprobs:
    """Log-probability of tokens int64[n] under raw logits float32[n, vocab], and of the top_counts[i] most likely."""
    if not top_counts.size:
        return NO_LOGPROBS
    log_probabilities = logits.log_softmax(dim=-1)
    chosen = log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    most = int(top_counts.max())
    if not most:
        return Logprobs(chosen.cpu().numpy(), NO_INTS, NO_FLOATS)
    tops, ids = top_candidates(log_probabilities, most)
    wanted = np.arange(most) < top_counts[:, None]
    return Logprobs(chosen.cpu().numpy(), ids.cpu().numpy()[wanted].astype(np.int32), tops.cpu().numpy()[wanted])


def chunked_logprobs(hidden: Tensor, head: torch.nn.Module, tokens: Tensor, top_counts: Ints) -> Logprobs:
    """`token_logprobs` of head.logits(hidden), a few positions at a time."""
    return joined(
        [
            token_logprobs(head.logits(hidden[start:end]), tokens[start:end], top_counts[start:end])
            for start in range(0, top_counts.size, _POSITIONS_AT_ONCE)
            for end in [start + _POSITIONS_AT_ONCE]
        ]
    )


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    """The log-probabilities of all parts, first to last."""
    if not parts:
        return NO_LOGPROBS
    return Logprobs(
        np.concatenate([part.chosen for part in parts]),
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate([part.tops for part in parts]),
    )
