"""The embedded default as transformers loads it from its GGUF file: the twin of parity tests."""

import functools

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sessile.gguf import default_gguf_path


def load_twin() -> PreTrainedModel:
    """In float32. transformers reads the file twice and makes the table of names anew for each tensor; once will do."""
    path = default_gguf_path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()
