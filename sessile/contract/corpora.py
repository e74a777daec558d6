"""Messages about corpora: server ⇄ engine, and server ⇄ the process that builds their indexes.

A corpus goes by tenant and id. Tenant "" is everybody's: its corpora may be looked up for any request. Texts never
reach the engine: the builder turns them into an index file, and the engine maps the file.
"""

import struct
from typing import Any, BinaryIO

import msgspec

INDEX_SUFFIX = ".corpus"
"""Ends the name of every index file, and is how one is told from a text."""

# -- server ⇄ engine ------------------------------------------------------------------------------------------------


class AddCorpus(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Map an index file and put it on the shelf between two steps, in place of one of the same name.

    Reply: Outcome {"tokens", "documents", "bytes"}, bytes as resident; 422 bad_index for a file that is not one.
    """

    op: int
    corpus: str
    path: str
    checksum: str
    """That the file must have, in hexadecimal."""
    tenant: str = ""


class RemoveCorpus(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Take a corpus off the shelf between two steps. Reply: Outcome {"removed": bool}; its file may go then."""

    op: int
    corpus: str
    tenant: str = ""


class GetCorpora(msgspec.Struct, frozen=True, tag=True):
    """Reply: CorpusUses of all corpora on the shelf."""

    op: int


CorpusOperation = AddCorpus | RemoveCorpus | GetCorpora
"""What the engine answers beside its core."""


class CorpusUse(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What drafts from one corpus have come to since it was put on the shelf."""

    corpus: str
    tenant: str = ""
    drafts_offered: int = 0
    """Tokens that the model was asked to verify."""
    drafts_accepted: int = 0
    accepted_by_length: tuple[int, ...] = ()
    """[n]: steps of a request in which n tokens of this corpus were accepted, 0 among them."""


class CorpusUses(msgspec.Struct, frozen=True, tag=True):
    """One for each corpus on the shelf, by tenant and id."""

    uses: list[CorpusUse]


# -- server ⇄ builder -----------------------------------------------------------------------------------------------


class Source(msgspec.Struct, frozen=True):
    """A file to read. kind: "jsonl", "text" (one document), or "index" (built before)."""

    path: str
    kind: str


class Build(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Read the sources, count their tokens, then wait for Proceed; make the index file `target` whole or not at all.

    Answered by any number of Progress, one Counted, and one Built or BuildFailed.
    """

    build: int
    sources: list[Source]
    target: str
    tokens_max: int
    """Give up as soon as it is clear that there are more."""


class Proceed(msgspec.Struct, frozen=True, tag=True):
    """Room for the counted tokens is reserved: build."""

    build: int


class CancelBuild(msgspec.Struct, frozen=True, tag=True):
    """Give a build up, wherever it is. Answered by BuildFailed, unless it has ended."""

    build: int


ToBuilder = Build | Proceed | CancelBuild


class BuilderReady(msgspec.Struct, frozen=True, tag=True):
    """First message of a builder. tokenizer: fingerprint of the one that it uses."""

    tokenizer: str


class Progress(msgspec.Struct, frozen=True, tag=True):
    """stage: "reading" or "indexing"; share of it that is done, 0 to 1."""

    build: int
    stage: str
    share: float


class Counted(msgspec.Struct, frozen=True, tag=True):
    """All sources were read and are as they should be. bytes: what the index will take."""

    build: int
    tokens: int
    documents: int
    bytes: int


class Built(msgspec.Struct, frozen=True, tag=True):
    """The file is at its target and on the disk. checksum: as its header has it, in hexadecimal."""

    build: int
    checksum: str


class BuildFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """There is no file at the target. code: "bad_source", "over_budget", "cancelled" or "failed"."""

    build: int
    code: str
    message: str


FromBuilder = BuilderReady | Progress | Counted | Built | BuildFailed

FRAME_HEAD = struct.Struct("<I")
FRAME_BYTES_MAX = 64 * 2**20


def write_frame(pipe: BinaryIO, message: msgspec.Struct) -> None:
    """One message on a pipe: its length as uint32, then msgpack."""
    packed = msgspec.msgpack.encode(message)
    pipe.write(FRAME_HEAD.pack(len(packed)) + packed)
    pipe.flush()


def read_frame(pipe: BinaryIO, kind: Any) -> Any:
    """The next message of a pipe, of the union `kind`; None at its end, also in the middle of a message."""
    head = pipe.read(FRAME_HEAD.size)
    if len(head) < FRAME_HEAD.size:
        return None
    (size,) = FRAME_HEAD.unpack(head)
    assert size <= FRAME_BYTES_MAX, f"a frame of {size} bytes is none of ours"
    packed = pipe.read(size)
    return msgspec.msgpack.decode(packed, type=kind) if len(packed) == size else None
