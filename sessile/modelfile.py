"""Read the text files of a model folder. Whatever is wrong with one is a StartupError: one line with the remedy.

A model is a download: its files may be cut, damaged or made to do harm. So a file's size is looked at before it is
read, and what is repeated of its content in a message is short and on one line.
"""

import json
import stat
from pathlib import Path
from typing import Any

from sessile.errors import StartupError

TEXT_BYTES_MAX = 1 << 28
"""The largest tokenizer.json that we know of has 35 MB."""
SHOWN_CHARS_MAX = 100


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file. Raises StartupError if there is none, or too much of it."""
    try:
        found = path.stat()  # before it is opened: opening a pipe would wait for its other end
        if not stat.S_ISREG(found.st_mode) or found.st_size > TEXT_BYTES_MAX:
            raise StartupError(f"cannot use {path}: it is not a file of at most {TEXT_BYTES_MAX} bytes. Replace it.")
        return path.read_bytes().decode()
    except OSError as error:
        raise StartupError(
            f"cannot read {path}: {error.strerror or error}. Is {path.parent} a complete model folder?"
        ) from error
    except UnicodeDecodeError as error:
        raise StartupError(f"cannot use {path}: it is not UTF-8 text. Download it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises StartupError for anything else."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise StartupError(f"cannot use {path}: it is not JSON ({error}). Download it again.") from error
    except RecursionError:
        raise StartupError(f"cannot use {path}: its JSON is nested too deeply. Download it again.") from None
    if not isinstance(content, dict):
        raise StartupError(f"cannot use {path}: it is not a JSON object. Download it again.")
    return content


def shown(value: object) -> str:
    """A value from a file as it may be repeated in a message: short, on one line, without control characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 1] + "…"
