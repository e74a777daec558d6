"""Files of a model that were cut, damaged or made to do harm: refused in one line, or read within bounds.

Whatever is done to a file, reading tokenizer, configuration and weights ends in a StartupError of one line or in a
model that is what its configuration says; never in another exception, a hang, or memory beyond what the file is worth.
"""

import contextlib
import json
import os
import resource
import struct
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sessile.errors import InvalidRequest, StartupError
from sessile.gguf import GgufFile
from sessile.model.layers import WeightFormat
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model
from sessile.text.load import load_tokenizer
from sessile.text.template import check_messages
from tests.unit.tiny_files import gguf_metadata, write_tiny_folder, write_tiny_gguf

FORM = WeightFormat(torch.float32, torch.device("cpu"))
MEMORY_BYTES = 1 << 30
"""What reading a file of a few kilobytes may take of the address space: libraries allocate in large pieces."""
MESSAGE_CHARS_MAX = 1000
FOLDER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                "model.safetensors.index.json", "model.safetensors")  # fmt: skip
within_time = settings(deadline=timedelta(seconds=30), max_examples=max(300, settings().max_examples))
"""Milliseconds on a quiet machine; a hang is told from a slow machine, and no more."""

Spoil = Callable[[bytes], bytes]
LENGTHS = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
ODD_VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**32 - 1, 2**63, 2**70, 0.5, -1e300, 1e300, float("inf"), float("nan"), "",
    "x", "\ud800", "$A", "a:1", "../../etc/passwd", "\n\x1b[2J", "x" * 5000, [], [[]], {}, [None], [1, 2], {"a": 1},
    {"type": "Sequence"}, {"type": "Sequence", "decoders": 3}, {"type": "Strip"}, [{"name": []}], "{{ 9 ** 9 ** 9 }}",
    "{% for x in y %}",
]  # fmt: skip


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Let what is allocated inside fail beyond a bound, whichever library allocates it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def is_served_or_refused(path: Path) -> tuple[bool, bool]:
    """Whether tokenizer and weights were read; what was not was refused as it should be."""
    with bounded_memory():
        return tokenizer_is_usable(path), weights_are_usable(path)


def tokenizer_is_usable(path: Path) -> bool:
    try:
        tokenizer = load_tokenizer(path)
    except StartupError as refusal:
        assert_one_line(refusal)
        return False
    tokenizer.facts(vocab_size=260, context_tokens=64)
    tokenizer.decode(tokenizer.encode("abcd ef\n"))
    with contextlib.suppress(InvalidRequest):  # what the template says against the messages
        tokenizer.encode_chat(check_messages([{"role": "user", "content": "ab"}]))
    return True


def weights_are_usable(path: Path) -> bool:
    try:
        decoder = load_model(ModelOptions(str(path)), FORM, lambda stage, done: None).decoder
    except StartupError as refusal:
        assert_one_line(refusal)
        return False
    config = decoder.config
    assert decoder.embedding.shape == (config.vocab_size, config.hidden_size)
    assert config.serving_context_tokens(None) >= 1
    return True


def assert_one_line(refusal: StartupError) -> None:
    message = str(refusal)
    assert message.isprintable() and len(message) <= MESSAGE_CHARS_MAX, message


@st.composite
def spoiled_bytes(draw: st.DrawFn) -> Spoil:
    """Something done to the bytes of a file: cut, bits flipped, bytes put in, a length or an end overwritten."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "length", "repeat"]))
    place = draw(st.floats(0, 1, exclude_max=True))
    bit, some = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=12))
    length = struct.pack("<Q", draw(st.sampled_from(LENGTHS)))
    times = draw(st.integers(2, 200))

    def spoil(raw: bytes) -> bytes:
        at = int(place * len(raw))
        if kind == "cut":
            return raw[:at]
        if kind == "flip":
            return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
        if kind == "insert":
            return raw[:at] + some + raw[at:]
        if kind == "length":
            return raw[:at] + length + raw[at + 8 :]
        return raw[:at] + raw[at : at + 8] * times + raw[at:]

    return spoil


def places_of(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document, containers before what they hold; of long lists, both ends."""
    yield path
    if isinstance(content, dict):
        keys = list(content)
        for key in keys[:12] + keys[12:][-3:]:
            yield from places_of(content[key], (*path, key))
    elif isinstance(content, list):
        for index in sorted({*range(min(3, len(content))), *range(max(0, len(content) - 2), len(content))}):
            yield from places_of(content[index], (*path, index))


def with_value(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with one value exchanged."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = with_value(content[path[0]], path[1:], value)
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("gguf")
    return {kind: write_tiny_gguf(where / f"{kind}.gguf", gguf_metadata(kind)) for kind in ("gpt2", "llama")}


@contextlib.contextmanager
def holding(path: Path, raw: bytes) -> Iterator[None]:
    """The file with other content for a while."""
    whole = path.read_bytes()
    # A new file each time: what a reader has mapped of the old one stays as it was.
    path.unlink()
    path.write_bytes(raw)
    try:
        yield
    finally:
        path.unlink()
        path.write_bytes(whole)


def test_the_files_are_served_as_they_are(folder: Path, ggufs: dict[str, Path]) -> None:
    for path in (folder, *ggufs.values()):
        assert is_served_or_refused(path) == (True, True)


@within_time
@given(name=st.sampled_from(FOLDER_FILES), spoil=spoiled_bytes())
def test_a_file_of_a_folder_whose_bytes_were_changed_is_refused_or_read(
    folder: Path, name: str, spoil: Spoil
) -> None:
    with holding(folder / name, spoil((folder / name).read_bytes())):
        outcome = is_served_or_refused(folder)
    if name in ("config.json", "model.safetensors.index.json", "model.safetensors"):
        assert outcome[0], "the tokenizer does not hang on the weights"


@within_time
@given(name=st.sampled_from(FOLDER_FILES[:-1]), value=st.sampled_from(ODD_VALUES), choice=st.integers(0, 10**6))
def test_a_json_file_with_an_odd_value_anywhere_is_refused_or_read(
    folder: Path, name: str, value: Any, choice: int
) -> None:
    content = json.loads((folder / name).read_text())
    places = list(places_of(content))
    odd = with_value(content, places[choice % len(places)], value)
    with holding(folder / name, json.dumps(odd).encode()):
        assert len(is_served_or_refused(folder)) == 2


@within_time
@given(value=st.sampled_from(ODD_VALUES), choice=st.integers(0, 10**6))
def test_a_safetensors_header_with_an_odd_value_anywhere_is_refused_or_read(
    folder: Path, value: Any, choice: int
) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    places = list(places_of(header))
    odd = json.dumps(with_value(header, places[choice % len(places)], value)).encode()
    with holding(folder / "model.safetensors", struct.pack("<Q", len(odd)) + odd + raw[8 + length :]):
        assert is_served_or_refused(folder)[0]


@within_time
@given(kind=st.sampled_from(["gpt2", "llama"]), spoil=spoiled_bytes())
def test_a_gguf_file_whose_bytes_were_changed_is_refused_or_read(
    ggufs: dict[str, Path], kind: str, spoil: Spoil
) -> None:
    path = ggufs[kind]
    raw = path.read_bytes()
    header_bytes = len(raw) - sum(tensor.raw.size for tensor in GgufFile(path).tensors.values())
    with holding(path, spoil(raw[:header_bytes]) + raw[header_bytes:]):
        assert len(is_served_or_refused(path)) == 2


IN_GGUF = [value for value in ODD_VALUES if value is not None and not isinstance(value, dict) and value != "\ud800"]


@within_time
@given(
    kind=st.sampled_from(["gpt2", "llama"]),
    key=st.sampled_from(list(gguf_metadata("llama"))),
    value=st.sampled_from(IN_GGUF) | st.lists(st.integers(-2, 300), max_size=30) | st.lists(st.text(max_size=3)),
)
def test_gguf_metadata_with_an_odd_value_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, kind: str, key: str, value: Any
) -> None:
    if isinstance(value, list) and any(isinstance(each, list | dict | type(None)) for each in value):
        value = []
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = 2**62
    if isinstance(value, float) and abs(value) > 3e38:
        value = float("inf")
    path = write_tiny_gguf(tmp_path_factory.getbasetemp() / "odd.gguf", {**gguf_metadata(kind), key: value})
    assert len(is_served_or_refused(path)) == 2


def test_json_nested_too_deeply_is_refused(folder: Path) -> None:
    for name in FOLDER_FILES[:-1]:
        with holding(folder / name, b'{"a":' * 100_000):
            assert False in is_served_or_refused(folder), name


def test_a_sparse_file_of_a_terabyte_is_refused_unread(folder: Path) -> None:
    for name in FOLDER_FILES[:-1]:
        with holding(folder / name, b"{}"):
            with (folder / name).open("r+b") as file:
                file.truncate(1 << 40)
            assert False in is_served_or_refused(folder), name


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(StartupError, match="not a file of at most"):
        load_model(ModelOptions(str(folder)), FORM, lambda stage, done: None)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..", ""])
def test_an_index_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path, place: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    folder = write_tiny_folder(inside)
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
    with pytest.raises(StartupError, match="files of its folder"):
        load_model(ModelOptions(str(folder)), FORM, lambda stage, done: None)


def test_a_token_with_a_huge_id_is_refused_before_a_table_is_made_for_it(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 4_000_000_000
    with (
        holding(folder / "tokenizer.json", json.dumps(content).encode()),
        bounded_memory(),
        pytest.raises(StartupError, match="id 4000000000"),
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize(("field", "name"), [
    ("num_hidden_layers", "layers"), ("hidden_size", "hidden_size"), ("head_dim", "head_dim"),
    ("vocab_size", "vocab_size"), ("max_position_embeddings", "context_tokens"), ("num_attention_heads", "heads"),
])  # fmt: skip
def test_a_size_that_no_model_has_is_refused_before_anything_is_built_for_it(
    folder: Path, field: str, name: str
) -> None:
    content = {**json.loads((folder / "config.json").read_text()), "head_dim": 4, field: 1 << 33}
    with (
        holding(folder / "config.json", json.dumps(content).encode()),
        bounded_memory(),
        pytest.raises(StartupError, match=f"{name} is"),
    ):
        load_model(ModelOptions(str(folder), "dummy"), FORM, lambda stage, done: None)
