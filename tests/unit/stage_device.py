"""A small device with random weights for tests of the device layer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.device.worker import Worker
from sessile.model.options import ModelOptions

VOCAB = 128
CONFIG: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


@contextmanager
def small_device(
    folder: Path, *, rows_max: int = 8, page_size: int = 4, kernels: str = "auto", **model: Any
) -> Iterator[Worker]:
    """Open a device on dummy weights, and close it."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    options = ModelOptions(**{"model": str(folder), "load_format": "dummy", "dtype": "float32", **model})
    device = open_device(
        options, DeviceOptions(kv_memory="2M", threads=1, cpu_kernels=kernels), page_size=page_size,
        context_tokens=256, rows_max=rows_max, drafts_max=8, progress=lambda stage, done: None,
    )  # fmt: skip
    try:
        yield device
    finally:
        device.close()
