"""GGUF's block formats are unpacked as the reference implementation of the format does."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as reference

from sessile.errors import StartupError
from sessile.gguf import GgufFile, GgufTensor
from sessile.model.dequantize import dequantize, dequantized_rows

BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q4_K": (256, 144),
          "Q6_K": (256, 210)}  # fmt: skip
# Where the float16 scales of a block lie: random bytes there would give NaN and infinity.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    generator = np.random.default_rng(5)
    raw = generator.integers(0, 256, (rows * blocks, BLOCKS[kind][1]), dtype=np.uint8)
    for start in HALVES[kind]:
        halves = generator.normal(0, 0.1, rows * blocks).astype("<f2")
        raw[:, start : start + 2] = halves[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_unpacked_like_the_reference(kind: str) -> None:
    rows, blocks = 6, 3
    raw = random_blocks(kind, rows, blocks)
    unpacked = dequantize(GgufTensor("w", (rows, blocks * BLOCKS[kind][0]), kind, raw.reshape(-1)))
    np.testing.assert_allclose(unpacked, reference(raw, GGMLQuantizationType[kind]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_that_are_unpacked_some_at_a_time_are_the_whole(kind: str) -> None:
    rows, blocks = 2500, 1
    tensor = GgufTensor("w", (rows, BLOCKS[kind][0]), kind, random_blocks(kind, rows, blocks).reshape(-1))
    parts = list(dequantized_rows(tensor))
    assert len(parts) > 1
    np.testing.assert_array_equal(np.concatenate(parts), dequantize(tensor))


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "<f4"), ("F16", "<f2")])
def test_plain_floats_are_read_as_they_are(kind: str, dtype: str) -> None:
    values = np.linspace(-2, 2, 12).astype(dtype)
    unpacked = dequantize(GgufTensor("w", (3, 4), kind, values.view(np.uint8)))
    np.testing.assert_array_equal(unpacked, values.reshape(3, 4).astype(np.float32))


def test_bfloat16_is_read_as_the_upper_half_of_float32() -> None:
    values = np.array([1.0, -2.5, 0.15625, 0.0], np.float32)
    raw = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    np.testing.assert_array_equal(dequantize(GgufTensor("w", (4,), "BF16", raw)), values)


def test_a_format_that_is_not_read_is_refused_by_name() -> None:
    with pytest.raises(StartupError, match="IQ2_XS"):
        dequantize(GgufTensor("w", (1, 256), "IQ2_XS", np.zeros(74, np.uint8)))


def test_the_embedded_model_is_read_without_copying_the_file(embedded: Path) -> None:
    file = GgufFile(embedded)
    tensor = file.tensors["blk.0.attn_q.weight"]
    assert tensor.raw.base is not None
    assert dequantize(tensor).shape == (576, 576)


@pytest.fixture
def embedded() -> Path:
    from sessile.gguf import default_gguf_path

    return default_gguf_path()
