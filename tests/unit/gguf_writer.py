"""Write small GGUF files for tests."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TENSOR_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
ALIGNMENT = 32


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[Sequence[int], str, bytes]] | None = None,
    *,
    version: int = 3,
) -> Path:
    """Write metadata (str, bool, int, float, lists of one of them) and tensors: name → (shape, type, raw)."""
    tensors = tensors or {}
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        header += text(key) + typed(value)
    body = b""
    for name, (shape, kind, raw) in tensors.items():
        header += text(name) + struct.pack("<I", len(shape))
        header += b"".join(struct.pack("<Q", extent) for extent in reversed(shape))
        header += struct.pack("<IQ", TENSOR_TYPES[kind], len(body))
        body += raw + b"\0" * (-len(raw) % ALIGNMENT)
    path.write_bytes(header + b"\0" * (-len(header) % ALIGNMENT) + body)
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Any) -> bytes:
    """A metadata value with its type number in front; ints are int32 where they fit, else int64."""
    if isinstance(value, list):
        kinds = {typed(element)[:4] for element in value} or {struct.pack("<I", 5)}
        assert len(kinds) == 1, "an array has elements of one type"
        elements = b"".join(typed(element)[4:] for element in value)
        return struct.pack("<I", 9) + kinds.pop() + struct.pack("<Q", len(value)) + elements
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<Ii", 5, value) if -(2**31) <= value < 2**31 else struct.pack("<Iq", 11, value)
