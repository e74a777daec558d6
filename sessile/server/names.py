"""Names and labels that clients give to what they open."""

import secrets
from typing import Annotated

from fastapi import Path
from pydantic import Field

from sessile.server.body import says

METADATA_KEYS_MAX = 16
ID_CHARS_MAX = 128

ID_PATTERN = r"\A\.*[A-Za-z0-9_:@=+-][A-Za-z0-9_.:@=+-]*\z"
"""Of a session or a corpus. Dots alone are a way up in a path, which many clients go before they ask."""

GivenId = Annotated[
    str,
    Field(pattern=ID_PATTERN, max_length=ID_CHARS_MAX),
    says(f"must be 1 to {ID_CHARS_MAX} letters, digits or characters of _.:@=+-, not dots alone"),
]
SessionId = GivenId
SessionPath = Annotated[str, Path(max_length=ID_CHARS_MAX)]
"""Of a session that may be open: whatever is in it, it cannot be longer than an id."""
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=METADATA_KEYS_MAX),
]


def new_session_id() -> str:
    """An id that cannot be guessed: who has it may use the session (H55)."""
    return secrets.token_hex(16)
