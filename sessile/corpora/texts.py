"""Files to documents of token ids, in bounded portions; what the files hold, sessile/text/documents.py says."""

import codecs
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from sessile.contract.corpora import Source
from sessile.text.documents import LINE_BYTES_MAX, BadSource, document_of
from sessile.text.tokenizer import Tokenizer

Ints = npt.NDArray[np.int32]

PIECE_CHARS = 1 << 18
"""A longer document is cut before it is encoded, behind a line's end where that is easy. The cut may show in a token or
two of the index, which costs a draft and never a wrong token; a whole book at once takes a hundred bytes a token."""
PORTION_CHARS = 1 << 20
"""About what is encoded in one call."""
READ_BYTES = 1 << 20


def read_pieces(source: Source, note_bytes: Callable[[int], None]) -> Iterator[tuple[bool, str]]:
    """(whether a document begins, a piece of its text) of a .jsonl or text file; note_bytes is told how much was read.

    The file is opened once and without following a link: whoever checked its path checked what is read. Raises
    BadSource, naming the place.
    """
    name = Path(source.path).name
    try:
        file = os.fdopen(os.open(source.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", READ_BYTES)
    except OSError as error:
        raise BadSource(f"{name} cannot be read: {error.strerror}") from error
    with file:
        yield from (_lines if source.kind == "jsonl" else _whole)(file, name, note_bytes)


def _lines(file: BinaryIO, name: str, note_bytes: Callable[[int], None]) -> Iterator[tuple[bool, str]]:
    number = 0
    while line := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        note_bytes(len(line))
        if line.strip():
            for index, piece in enumerate(cut(document_of(line, f"{name} line {number}"))):
                yield index == 0, piece


def _whole(file: BinaryIO, name: str, note_bytes: Callable[[int], None]) -> Iterator[tuple[bool, str]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, is_first = 0, True
    while True:
        raw = file.read(PIECE_CHARS)
        try:
            piece = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise BadSource(f"{name}: not UTF-8 near byte {done + error.start}") from None
        if piece:
            yield is_first, piece
            is_first = False
        if not raw:
            return
        done += len(raw)
        note_bytes(len(raw))


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[tuple[bool, str]]) -> Iterator[tuple[int, Ints]]:
    """(number of the document, token ids of a piece of it), in order; pieces without tokens are left out."""
    portion: list[tuple[int, str]] = []
    number, chars = -1, 0
    for begins, piece in pieces:
        number += begins
        portion.append((number, piece))
        chars += len(piece)
        if chars >= PORTION_CHARS:
            yield from _encoded(tokenizer, portion)
            portion, chars = [], 0
    yield from _encoded(tokenizer, portion)


def _encoded(tokenizer: Tokenizer, portion: Sequence[tuple[int, str]]) -> Iterator[tuple[int, Ints]]:
    texts = [text for _, text in portion]
    for (number, _), ids in zip(portion, tokenizer.encode_all(texts) if texts else [], strict=True):
        if ids:
            yield number, np.array(ids, np.int32)


def cut(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE_CHARS, cut behind the last line's end where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
