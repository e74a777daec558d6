"""Model folders: what is refused says in one line what to do; what is read is what was saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sessile.errors import StartupError
from sessile.model.config import config_from_folder, resolve_model_path
from sessile.model.layers import Decoder, WeightFormat
from sessile.model.options import ModelOptions
from sessile.model.weights import load_model

CONFIG = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
FORM = WeightFormat(torch.float32, torch.device("cpu"))


def shapes() -> dict[str, tuple[int, ...]]:
    named: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16), "model.norm.weight": (16,),
    }  # fmt: skip
    parts = {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
        "input_layernorm": (16,), "post_attention_layernorm": (16,),
    }  # fmt: skip
    for layer in range(2):
        named |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return named


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in shapes().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def load(folder: Path, load_format: str = "auto") -> Decoder:
    return load_model(ModelOptions(str(folder), load_format), FORM, lambda stage, done: None).decoder


def change_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(StartupError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_weights_are_those_of_the_file(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    decoder = load(folder)
    assert torch.equal(decoder.embedding, saved["model.embed_tokens.weight"])
    fused = torch.cat([saved[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    identity = decoder.layers[1].self_attn.qkv_proj(torch.eye(16))
    torch.testing.assert_close(identity.T, fused)


def test_a_model_in_several_files_reads_like_one_in_a_single_file(folder: Path) -> None:
    whole = load(folder).logits(torch.ones(1, 16))
    saved = load_file(folder / "model.safetensors")
    names = sorted(saved)
    places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: saved[name] for name in names if places[name] == place}, folder / place)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    torch.testing.assert_close(load(folder).logits(torch.ones(1, 16)), whole)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "corrupt or truncated" in refusal(folder)


def test_a_file_of_noise_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    assert "Download it again" in refusal(folder)


def test_a_missing_weights_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "does not exist" in refusal(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    del saved["model.layers.1.mlp.up_proj.weight"]
    save_file(saved, folder / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    change_config(folder, intermediate_size=32)
    message = refusal(folder)
    assert "[24, 16]" in message
    assert "[32, 16]" in message


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"hidden_size": "wide"}, "damaged"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": {"partial_rotary_factor": 0.5}}, "partial rotary"),
    ],
)
def test_a_configuration_we_cannot_serve_is_refused(folder: Path, changes: dict[str, object], word: str) -> None:
    change_config(folder, **changes)
    assert word in refusal(folder)


def test_a_broken_or_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "not JSON" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "JSON object" in refusal(folder)
    (folder / "config.json").unlink()
    assert "model folder" in refusal(folder)


def test_a_path_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StartupError, match="no such file or folder"):
        resolve_model_path("/nowhere/model")


def test_a_context_beyond_the_sliding_window_is_refused(folder: Path) -> None:
    change_config(folder, model_type="mistral", sliding_window=32)
    config = config_from_folder(folder)
    assert config.serving_context_tokens(None) == 32
    assert config.serving_context_tokens(20) == 20
    with pytest.raises(StartupError, match="sliding-window"):
        config.serving_context_tokens(33)


def test_a_context_beyond_the_models_is_refused(folder: Path) -> None:
    config = config_from_folder(folder)
    assert config.serving_context_tokens(None) == 64
    with pytest.raises(StartupError, match="Ask for at most 64"):
        config.serving_context_tokens(65)


def test_dummy_weights_need_no_tensors_and_are_the_same_each_time(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    first, second = load(folder, "dummy"), load(folder, "dummy")
    x = torch.ones(1, 16)
    assert torch.equal(first.logits(x), second.logits(x))
    assert not torch.equal(first.layers[0].mlp(x), first.layers[1].mlp(x))


def test_progress_ends_at_one(folder: Path) -> None:
    seen: list[tuple[str, float]] = []
    load_model(ModelOptions(str(folder)), FORM, lambda stage, done: seen.append((stage, done)))
    assert seen[-1] == ("loading weights", 1.0)
    assert [done for _, done in seen] == sorted(done for _, done in seen)
