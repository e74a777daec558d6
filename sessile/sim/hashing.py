"""The toy model as pure functions on 64-bit integers: what a KV cell holds and which token follows.

A cell depends on its token, its position and the digest of every cell before it, as KV in a real model does; a digest
is a sum of terms that depend on cell and position. So any page that is aliased, stale, freed early or read at the wrong
length changes all tokens after it. All numbers are Python ints < 2**64.
"""

import hashlib
from collections.abc import Collection
from functools import lru_cache

import numpy as np

MASK = (1 << 64) - 1
_MULTIPLY_1, _MULTIPLY_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_TOKEN, _POSITION, _TERM, _INDEX = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB


def mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of splitmix64)."""
    value &= MASK
    value = (value ^ (value >> 30)) * _MULTIPLY_1 & MASK
    value = (value ^ (value >> 27)) * _MULTIPLY_2 & MASK
    return value ^ (value >> 31)


def cell_of(digest: int, token: int, position: int) -> int:
    """What the model writes for a token at a position, given the digest of all cells before it."""
    return mix(digest + (token + 1) * _TOKEN + position * _POSITION)


def term_of(cell: int, position: int) -> int:
    """What a cell adds to the digest when it is read at a position."""
    return mix(cell ^ (position * _TERM & MASK))


def extend(digest: int, token: int, position: int) -> int:
    """The digest of positions 0..position, given that of the positions before and the token there."""
    return (digest + term_of(cell_of(digest, token, position), position)) & MASK


@lru_cache(1024)
def flavour_of(settings: tuple[float, ...], biases: tuple[tuple[int, float], ...]) -> int:
    """Digest of sampling parameters as float32 bits, so that a row bound with another's parameters shows."""
    packed = np.array([*settings, *(value for _, value in biases)], np.float32).tobytes()
    packed += np.array([token for token, _ in biases], np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def noise_of(flavour: int, seed: int, output_index: int) -> int:
    """Noise of one sampled token; greedy rows use their flavour alone."""
    return mix(flavour + mix(seed) + output_index * _INDEX)


def seen_term(token: int, *, is_output: bool) -> int:
    """What a token adds to the record that penalties look at; order does not matter, counts and side do."""
    return mix(2 * token + is_output + 1)


def token_of(digest: int, noise: int, vocab_size: int, banned: Collection[int]) -> int:
    """The next token; `banned` ones are never chosen (there must be another)."""
    value = mix(digest ^ noise)
    while value % vocab_size in banned:
        value = mix(value + 1)
    return value % vocab_size


def logprob_of(digest: int, token: int) -> float:
    """Made-up log-probability of a token after the text with this digest; exact in float32."""
    return -(mix(digest ^ mix(token)) % 4096) / 64


@lru_cache(1024)
def top_of(digest: int, count: int, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens with their log-probabilities, most likely first, ties by lower id."""
    if not count:
        return ()
    scored = sorted([(-logprob_of(digest, token), token) for token in range(vocab_size)])
    return tuple([(token, -score) for score, token in scored[:count]])
