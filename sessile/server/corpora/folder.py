"""The folder in which index files, uploads and the catalogue live: a private one, or one that outlives the server.

    lock            held while a server uses the folder
    catalogue.json  what there is: id, tenant, size, tokenizer and checksum of each corpus
    indexes/        a file a corpus, immutable, named at random
    uploads/        texts on their way to the builder; emptied at each start

A corpus exists when the catalogue says so. It is written when the index file is on the disk and before the file it
replaces goes; files that it does not name are remains of a crash, and go at the next start.
"""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

import msgspec

from sessile.contract.corpora import INDEX_SUFFIX
from sessile.errors import StartupError
from sessile.server.config import ServerOptions
from sessile.server.corpora.sources import STATE_FOLDER

CATALOGUE_VERSION = 1
OUR_FILE = re.compile(r"[0-9a-f]{24}" + re.escape(INDEX_SUFFIX))


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One corpus of the catalogue. file: name in indexes/. bytes: resident."""

    id: str
    tenant: str
    file: str
    tokens: int
    documents: int
    bytes: int
    tokenizer: str
    checksum: str
    created_s: int


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """What catalogue.json holds."""

    version: int
    corpora: list[Entry]


class StateFolder:
    """Owns the folder while it is open: nobody else may use it. is_kept: it outlives the server."""

    def __init__(self, path: Path, *, is_kept: bool) -> None:
        """Make the folder where it is missing, and take it. Raises StartupError with the remedy."""
        self.is_kept = is_kept
        self._path = path
        self._lock: int | None = None
        try:
            for folder in (path, path / "indexes", path / "uploads"):
                folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise StartupError(
                f"another server uses {path}: give this one a --corpora-dir of its own, or stop the other"
            ) from None
        except OSError as error:
            self.close()
            raise StartupError(
                f"cannot keep indexes of corpora in {path}: {error.strerror}. See --corpora-dir."
            ) from error
        try:
            self.entries = self._read()
            """What the catalogue had when the folder was opened."""
        except StartupError:
            self.close()
            raise

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read(self) -> list[Entry]:
        """The catalogue, after removing what it does not name. Raises StartupError if it is damaged."""
        path = self._path / "catalogue.json"
        try:
            catalogue = msgspec.json.decode(path.read_bytes(), type=Catalogue)
        except FileNotFoundError:
            catalogue = Catalogue(version=CATALOGUE_VERSION, corpora=[])
        except (OSError, ValueError, RecursionError) as error:
            raise StartupError(f"{path} cannot be read: {error}. Move it away to start without its corpora.") from error
        if catalogue.version != CATALOGUE_VERSION:
            raise StartupError(f"{path} was written by another version of Sessile; move it away to start without it")
        named = {entry.file for entry in catalogue.corpora}
        if not all(OUR_FILE.fullmatch(file) for file in named):
            raise StartupError(f"{path} names files that are none of ours. Move it away to start without its corpora.")
        for file in (self._path / "indexes").iterdir():
            if file.name not in named:
                file.unlink()
        for file in (self._path / "uploads").iterdir():
            file.unlink()
        return catalogue.corpora

    def write(self, entries: Iterable[Entry]) -> None:
        """Replace the catalogue, whole or not at all. Raises OSError."""
        if not self.is_kept:
            return
        packed = msgspec.json.encode(Catalogue(version=CATALOGUE_VERSION, corpora=list(entries)))
        part = self._path / "catalogue.part"
        with part.open("wb") as file:
            file.write(msgspec.json.format(packed))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path / "catalogue.json")
        handle = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def new_index(self) -> Path:
        """A place for an index file that nobody has had before."""
        return self.index(secrets.token_hex(12) + INDEX_SUFFIX)

    def index(self, file: str) -> Path:
        """The index file of that name."""
        return self._path / "indexes" / file

    def new_upload(self) -> Path:
        """A place for a text that comes in, as lines of JSON."""
        return self._path / "uploads" / (secrets.token_hex(12) + ".jsonl")

    def discard(self, path: Path) -> None:
        """Remove a file of ours, and what its making may have left beside it. Without effect if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        for part in path.parent.glob(f".{path.name}.*"):
            with contextlib.suppress(FileNotFoundError):
                part.unlink()


def open_folder(options: ServerOptions, private: str) -> StateFolder:
    """The folder for indexes: below the operator's, if there is one, else below a private one that goes with us.

    Raises StartupError with the remedy.
    """
    if options.corpora_dir is None:
        return StateFolder(Path(private) / "corpora", is_kept=False)
    directory = Path(options.corpora_dir).expanduser()
    if not directory.is_dir():
        raise StartupError(f"--corpora-dir {directory} is no folder: make it, or leave the setting out")
    return StateFolder(directory / STATE_FOLDER, is_kept=True)
