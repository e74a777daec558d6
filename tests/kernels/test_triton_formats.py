"""A model with quantised weights on a GPU computes what its numbers stand for, in steps of every size."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from sessile.device import gpu_factory
from sessile.device.config import DeviceOptions
from sessile.device.gpu_factory import open_gpu
from sessile.kernels import triton_few, triton_plan, triton_sampling
from sessile.kernels.linear import Fp8Weight, Int4Weight, Int8Weight
from sessile.kernels.triton_weight import Quantised
from sessile.model import gpu_linear
from sessile.model.gpu_linear import as_kernels_see_it
from sessile.model.layers import Linear, RMSNorm, WeightFormat
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model
from tests.kernels.layouts import DEVICE
from tests.parity.driver import Driver, Run
from tests.parity.tiny_models import Tiny, save_tiny

FORMATS = {"int8": Int8Weight, "int4": Int4Weight, "fp8": Fp8Weight}
SHAPE: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "initializer_range": 0.15,
}  # fmt: skip
PROMPT = [*range(3, 157)]


@dataclass(frozen=True)
class Rounded:
    """A model with a tied head, and the one in transformers that has the same weights after rounding."""

    name: str
    folder: Path
    twin: Tiny


def rounded_weight(name: str, weight: Tensor) -> Tensor:
    seen = as_kernels_see_it(FORMATS[name](weight))
    assert isinstance(seen, Quantised)
    return seen.widened()


@pytest.fixture(scope="module", params=FORMATS)
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    """Every layer is rounded by itself, which is the same as with its neighbours: scales belong to rows."""
    torch.manual_seed(3)
    plain = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True))
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(plain, folder)
    twin = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)).float().eval()
    with torch.no_grad():
        twin.load_state_dict(plain.state_dict())
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear):
                is_fp8_head = name == "lm_head" and request.param == "fp8"
                module.weight.copy_(rounded_weight("int8" if is_fp8_head else request.param, module.weight))
    return Rounded(request.param, folder, Tiny(folder, twin))


@pytest.fixture(scope="module", autouse=True)
def small_things() -> Iterator[None]:
    """The interpreter runs programs one after the other; and a small scratch takes several rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_linear, "_SCRATCH_ELEMENTS", 64 * 50)
        patch.setattr(triton_few, "FEW_TOKENS_EIGHT_BITS", 128)
        if DEVICE.type == "cpu":
            patch.setattr(triton_sampling, "PROGRAMS_WANTED", 4)
            patch.setattr(triton_plan, "STATE_PROGRAMS", 2)
            patch.setattr(gpu_factory, "warm_up", lambda *_: None)
        yield


def opened(rounded: Rounded, dtype: str) -> Any:
    options = ModelOptions(model=str(rounded.folder), dtype=dtype, quantize=rounded.name)
    return open_gpu(
        options, DeviceOptions(kv_memory="2M"), page_size=16, context_tokens=192, rows_max=4, drafts_max=0,
        progress=lambda stage, done: None, device=DEVICE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def device(rounded: Rounded) -> Iterator[Any]:
    device = opened(rounded, "float32")
    yield device
    device.close()


def differences(device: Any, rounded: Rounded, prompt: list[int], chunk_tokens: int) -> Tensor:
    """Between our log-probabilities of a prompt's tokens and those of transformers."""
    run = Run(prompt, 1, score_top=0)
    Driver(device, chunk_tokens=chunk_tokens).run_all([run])
    expected = rounded.twin.logits(prompt).log_softmax(dim=-1)[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])
    return (torch.tensor(run.scores) - expected[:, 0]).abs()


@pytest.mark.parametrize(
    ("prompt_tokens", "chunk_tokens"),
    [pytest.param(4, 1, marks=pytest.mark.long), (20, 20), (60, 60), pytest.param(150, 150, marks=pytest.mark.long)],
)
def test_log_probabilities_are_those_of_the_rounded_weights(
    device: Any, rounded: Rounded, prompt_tokens: int, chunk_tokens: int
) -> None:
    """Steps of one token, of few, of more, and of so many that weights are widened in memory."""
    assert differences(device, rounded, PROMPT[:prompt_tokens], chunk_tokens).max() < 1e-3


def test_in_float16_log_probabilities_are_off_by_roundings_alone(rounded: Rounded) -> None:
    device = opened(rounded, "float16")
    found = differences(device, rounded, PROMPT[:40], 40)
    device.close()
    assert found.mean() < 0.02 and found.max() < 0.5


def test_facts_tell_the_format_and_fewer_bytes(device: Any, rounded: Rounded) -> None:
    assert device.facts.quantize == rounded.name
    plain = load_model(ModelOptions(model=str(rounded.folder)), WeightFormat(torch.float32, DEVICE), lambda *_: None)
    assert device.facts.weight_bytes < plain.weight_bytes


def test_bytes_held_are_those_of_all_tensors(rounded: Rounded) -> None:
    form = WeightFormat(torch.float16, DEVICE, rounded.name)
    loaded = load_model(ModelOptions(model=str(rounded.folder)), form, lambda *_: None)
    tensors = [loaded.decoder.embedding]
    for part in loaded.decoder.modules():
        if isinstance(part, RMSNorm):
            tensors.append(part.weight)
        if isinstance(part, Linear):
            weight = as_kernels_see_it(part.weight)
            assert isinstance(weight, Quantised), "every linear layer is quantised"
            tensors += [weight.numbers, weight.scales, *([] if part.bias is None else [part.bias])]
    assert loaded.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
