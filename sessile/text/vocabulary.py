"""The vocabulary as bytes: what each token adds to the text. Handed to the core as facts, used here to detokenise."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sessile.contract.model import ModelFacts


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token → bytes, indexed by id; ids that no token has add nothing.

    special_ids: tokens that count as no bytes where special tokens are skipped. token_bytes has their literal text.
    """

    token_bytes: tuple[bytes, ...]
    special_ids: frozenset[int]

    @classmethod
    def build(cls, pieces: Mapping[int, bytes], special_ids: Iterable[int]) -> "Vocabulary":
        """From bytes by id; gaps are filled with tokens of no bytes."""
        size = max(pieces, default=-1) + 1
        return cls(tuple(pieces.get(token, b"") for token in range(size)), frozenset(special_ids))

    def join(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        """The bytes that tokens add to the text, in order; ids outside the vocabulary add nothing."""
        table, size = self.token_bytes, len(self.token_bytes)
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        return b"".join([table[token] for token in tokens if token < size and token not in skipped])

    def facts(
        self, *, vocab_size: int, context_tokens: int, eos_ids: tuple[int, ...], bos_id: int | None
    ) -> ModelFacts:
        """Facts for the core: the table cut or padded to the model's vocabulary, which may be larger or smaller."""
        padding = (b"",) * (vocab_size - len(self.token_bytes))
        return ModelFacts(
            vocab_size=vocab_size,
            context_tokens=context_tokens,
            eos_ids=eos_ids,
            bos_id=bos_id,
            token_bytes=self.token_bytes[:vocab_size] + padding,
            special_ids=frozenset(token for token in self.special_ids if token < vocab_size),
        )


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level BPE token, which spells each byte as one printable character (as GPT-2 does).

    A token with a character outside that alphabet stands for its own text.
    """
    try:
        return token.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def byte_fallback_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token: "▁" is a space, "<0x0A>" one byte, anything else its own text."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token.encode()
    return token.replace("▁", " ").encode()


def _byte_level_table() -> dict[int, int]:
    """Character → the byte it spells: printable Latin-1 spells itself, the other 68 bytes are shifted to 256 and on.

    Latin-1 characters that spell no byte map outside Latin-1, so that encoding a token with one of them fails.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {byte: 0xFFFF for byte in others}
    table.update({byte: byte for byte in plain})
    table.update({256 + rank: byte for rank, byte in enumerate(others)})
    return table


_BYTE_LEVEL = _byte_level_table()
