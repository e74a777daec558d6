"""The file of a corpus: a header of 128 bytes, then tokens and positions as they lie in memory, to be mapped.

offset  bytes
     0      8  magic, "sessile" and a newline
     8      4  version of the format
    12      4  DEPTH_TOKENS that the positions were sorted by
    16      8  documents
    24      8  tokens, separators included
    32      8  positions
    40     24  label: what whoever saved it wants to know again, here of the tokenizer that the ids are of
    64     32  checksum: BLAKE2b of the 64 bytes before it and of both sections
   128         tokens int32, then positions int32, each at a multiple of 64 bytes

All numbers are little-endian. A file appears under its name only when it is whole.
"""

import hashlib
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sessile.draft.suffixes import DEPTH_TOKENS, SEPARATOR, TOKEN_ID_MAX
from sessile.errors import CorpusFileError

Ints = npt.NDArray[np.int32]

MAGIC = b"sessile\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQ24s")
LABEL_BYTES = 24
CHECKSUM_BYTES = 32
HEADER_BYTES = 128
ALIGNMENT = 64
HASHED_AT_ONCE = 1 << 22


def section_offsets(tokens: int, positions: int) -> tuple[int, int, int]:
    """Where tokens and positions begin, and where the file ends."""
    second = HEADER_BYTES + -(-4 * tokens // ALIGNMENT) * ALIGNMENT
    return HEADER_BYTES, second, second + 4 * positions


def checksum(header: bytes, *sections: Ints) -> bytes:
    """Of the header's numbers and of the sections."""
    digest = hashlib.blake2b(header, digest_size=CHECKSUM_BYTES)
    for section in sections:
        octets = section.view(np.uint8)
        for start in range(0, len(octets), HASHED_AT_ONCE):
            digest.update(octets[start : start + HASHED_AT_ONCE].data)
    return digest.digest()


def write_corpus(path: Path, tokens: Ints, positions: Ints, documents: int, label: bytes = b"") -> None:
    """Write the file beside its place, then move it there: a reader sees the old one or the whole new one.

    label: at most LABEL_BYTES.
    Raises OSError; no part of the file is left then.
    """
    assert len(label) <= LABEL_BYTES, f"a label has at most {LABEL_BYTES} bytes"
    header = HEADER.pack(MAGIC, VERSION, DEPTH_TOKENS, documents, len(tokens), len(positions), label)
    first, second, end = section_offsets(len(tokens), len(positions))
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header + checksum(header, tokens, positions))
            for offset, section in ((first, tokens), (second, positions)):
                file.seek(offset)
                section.astype("<i4", copy=False).tofile(file)
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def read_corpus(path: Path, *, verify: bool) -> tuple[Ints, Ints, int, bytes]:
    """(tokens, positions, documents, label) of a file, mapped read-only. Raises CorpusFileError, or OSError.

    verify: read it all, compare the checksum, and see that what compiled code reckons with lies within the file;
    without it only header and length are looked at.
    """
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise CorpusFileError(f"{path} is no corpus of Sessile's: it does not begin with a header. Build it again.")
    _, version, depth, documents, tokens, positions, label = HEADER.unpack_from(header)
    if (version, depth) != (VERSION, DEPTH_TOKENS):
        raise CorpusFileError(
            f"{path} has format {version} and depth {depth}; this Sessile reads {VERSION} and {DEPTH_TOKENS}. "
            "Build it again."
        )
    first, second, end = section_offsets(tokens, positions)
    if size != end:
        raise CorpusFileError(f"{path} has {size:,} bytes where its header tells of {end:,}. Copy or build it again.")
    arrays = _mapped(path, first, tokens), _mapped(path, second, positions)
    if verify:
        expected = header[HEADER.size : HEADER.size + CHECKSUM_BYTES]
        if checksum(header[: HEADER.size], *arrays) != expected:
            raise CorpusFileError(f"{path} is damaged: its checksum is another. Copy or build it again.")
        _check_content(path, *arrays, documents)
    return arrays[0], arrays[1], documents, label


def _check_content(path: Path, tokens: Ints, positions: Ints, documents: int) -> None:
    """Raise CorpusFileError unless tokens are some and positions lie among them.

    A right checksum says that a file is as it was written, not that an index was written: anybody can reckon one, and
    whoever searches reads wherever a position says.
    """
    is_framed = len(tokens) > documents and tokens[0] == tokens[-1] == SEPARATOR
    has_tokens = is_framed and SEPARATOR <= int(tokens.min()) and int(tokens.max()) <= TOKEN_ID_MAX
    if not has_tokens or (len(positions) and not 1 <= int(positions.min()) <= int(positions.max()) < len(tokens)):
        raise CorpusFileError(f"{path} is no index: its tokens or positions are none. Build it again.")


def stored_checksum(path: Path) -> bytes:
    """The checksum that a file's header has, which tells it from every other. Raises OSError."""
    with path.open("rb") as file:
        file.seek(HEADER.size)
        return file.read(CHECKSUM_BYTES)


def _mapped(path: Path, offset: int, count: int) -> Ints:
    """A section of the file; an empty one cannot be mapped."""
    if count == 0:
        return np.empty(0, np.int32)
    return np.asarray(np.memmap(path, dtype="<i4", mode="r", offset=offset, shape=(count,)))
