"""Where texts come from: files below the operator's directory, documents of a request, lines of an upload.

What can be told to be wrong without a tokenizer is refused here, before anything is built.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import orjson

from sessile.contract.corpora import INDEX_SUFFIX, Source
from sessile.errors import InvalidRequest
from sessile.server.corpora.budget import Size
from sessile.text.documents import LINE_BYTES_MAX, BadSource, document_of, source_of

FILES_MAX = 100_000
NAME_SHOWN = 100
STATE_FOLDER = ".sessile"
"""Ours, below the operator's directory; no path may lead into it."""


def files_below(root: Path | None, name: str) -> tuple[list[Source], Size]:
    """The files that a client's path stands for, one or a folder's, and the least that they amount to.

    Nothing outside root is touched, nor told of. Raises InvalidRequest.
    """
    try:
        return _files_below(root, name)
    except OSError as error:  # the name is too long, a folder may not be entered, a file has just gone
        raise _refused(f"{name[:NAME_SHOWN]!r} cannot be read: {error.strerror}") from error


def _files_below(root: Path | None, name: str) -> tuple[list[Source], Size]:
    if root is None:
        raise _refused("this server was started without --corpora-dir; send the documents instead")
    if "\0" in name or ".." in Path(name).parts:
        raise _refused("must not contain '..' or a zero byte")
    inside = Path(os.path.realpath(root))
    place = Path(os.path.realpath(inside / name))
    _check_inside(inside, place, name)
    if place.is_dir():
        paths = _files_of(inside, place, name)
    elif place.exists():
        paths = [place]
    else:
        raise _refused(f"there is no {name!r} below the corpora directory")
    for path in paths:
        _check_readable(inside, path)
        _check_name(path, name)
    sources = [source_of(path) for path in paths]
    if any(source.kind == "index" for source in sources) and len(sources) > 1:
        raise _refused(f"an index ({INDEX_SUFFIX}) is a corpus by itself; name it alone")
    total = sum(path.stat().st_size for path in paths)
    is_index = sources[0].kind == "index"
    return sources, Size.of_index(total) if is_index else Size.of_text(total)


def _files_of(inside: Path, folder: Path, name: str) -> list[Path]:
    """All files of a folder and those below it, in the order of their paths; our own are left out."""
    found: list[Path] = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if each != STATE_FOLDER)
        for each in (*folders, *files):
            place = Path(where) / each
            if place.is_symlink():
                _check_inside(inside, Path(os.path.realpath(place)), str(place.relative_to(inside)))
        found += [Path(os.path.realpath(Path(where) / each)) for each in files]
        if len(found) > FILES_MAX:
            raise _refused(f"{name!r} has more than {FILES_MAX} files; put the documents into .jsonl files")
    if not found:
        raise _refused(f"there are no files in {name!r}")
    return sorted(found)


def _check_inside(inside: Path, place: Path, name: str) -> None:
    if not place.is_relative_to(inside) or place.is_relative_to(inside / STATE_FOLDER):
        raise _refused(f"{name!r} is not below the corpora directory, or a link leads out of it")


def _check_readable(inside: Path, path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        raise _refused(f"{str(path.relative_to(inside))!r} is no file")
    if not os.access(path, os.R_OK):
        raise _refused(f"{str(path.relative_to(inside))!r} cannot be read")


def _check_name(path: Path, name: str) -> None:
    """The builder is told where to read, as text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise _refused(f"{name!r} has a file whose name is not UTF-8; rename it") from None


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(f"path: {message}", param="path")


def write_documents(file: BinaryIO, documents: Iterable[str]) -> int:
    """Documents as lines of JSON; how many bytes. Raises InvalidRequest, naming the first that is empty."""
    written = 0
    for index, text in enumerate(documents):
        if not text:
            raise InvalidRequest(f"documents.{index}: the document is empty", param=f"documents.{index}")
        written += file.write(orjson.dumps(text) + b"\n")
    if not written:
        raise InvalidRequest("documents: there are none", param="documents")
    return written


class LineCheck:
    """Checks an upload line by line as it comes, wherever its chunks are cut."""

    def __init__(self) -> None:
        self.documents = 0
        self._lines = 0
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> None:
        """More of the body. Raises BadSource that names the line."""
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            self._rest += line
            self._check()
        self._rest += rest
        if len(self._rest) > LINE_BYTES_MAX:
            raise BadSource(f"line {self._lines + 1}: longer than {LINE_BYTES_MAX} bytes")

    def end(self) -> None:
        """The body is over. Raises BadSource."""
        self._check()
        if not self.documents:
            raise BadSource("the upload has no documents")

    def _check(self) -> None:
        self._lines += 1
        if self._rest.strip():
            document_of(bytes(self._rest), f"line {self._lines}")
            self.documents += 1
        self._rest.clear()
