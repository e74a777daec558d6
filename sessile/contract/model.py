"""What the core needs to know of a model: facts and the bytes of its tokens, as data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of a model and its tokenizer that decide where a turn starts and ends.

    vocab_size: ids are 0 ≤ id < vocab_size. context_tokens: longest sequence, prompt and output together.
    eos_ids: tokens that end an output unless ignore_eos. bos_id: stripped from the start of input that is appended to
    a session with history; None if the model has none. token_bytes: bytes each token adds to the text, indexed by id
    (special tokens: their literal text); empty in tests without stop strings. special_ids: tokens that count as no
    bytes when skip_special_tokens is set.
    """

    vocab_size: int
    context_tokens: int
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    token_bytes: tuple[bytes, ...] = ()
    special_ids: frozenset[int] = frozenset()
