"""What a file of texts holds: a .jsonl file a document a line, any other one document. All of them are UTF-8.

A line is a string, or an object whose "text" is one; what else is in the object is somebody else's.
"""

from pathlib import Path

import orjson

from sessile.contract.corpora import INDEX_SUFFIX, Source
from sessile.errors import InvalidRequest

LINE_BYTES_MAX = 64 * 2**20


class BadSource(InvalidRequest):
    """A file, or a line of one, that is not what its name says."""

    code = "bad_source"


def source_of(path: Path) -> Source:
    """A file as its name says what it is."""
    kinds = {".jsonl": "jsonl", INDEX_SUFFIX: "index"}
    return Source(str(path), kinds.get(path.suffix, "text"))


def document_of(line: bytes, place: str) -> str:
    """The document of one line of JSON. Raises BadSource that begins with the place."""
    if len(line) > LINE_BYTES_MAX:
        raise BadSource(f"{place}: longer than {LINE_BYTES_MAX} bytes; cut the document into several")
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadSource(f"{place}: not valid JSON: {error.msg}") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise BadSource(f'{place}: must be a string, or an object with a string "text"')
    if not text:
        raise BadSource(f"{place}: the document is empty")
    return text
