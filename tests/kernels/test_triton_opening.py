"""A GPU refuses in one line what it cannot serve, before or while it opens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sessile.bench.gpu_shapes import SHAPES
from sessile.contract.plan import StepPlan
from sessile.device import gpu_factory
from sessile.device.config import DeviceOptions
from sessile.device.gpu_factory import open_gpu
from sessile.device.gpu_timing import verifying_plans
from sessile.errors import MachineLacks, NotReady, PlanError, StartupError
from sessile.kernels.flash_attention3 import Availability
from sessile.model.options import ModelOptions
from tests.kernels.fake_flash import fake_flash_attention3
from tests.kernels.layouts import DEVICE

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 64}  # fmt: skip


def opened(
    folder: Path, *, kv_memory: str = "1M", kv_dtype: str = "auto", options: dict[str, Any] | None = None,
    device: torch.device = DEVICE, **config: Any,
) -> Any:  # fmt: skip
    (folder / "config.json").write_text(json.dumps(SHAPES["8B"] | TINY | config), encoding="utf-8")
    model = replace(ModelOptions(model=str(folder), load_format="dummy", dtype="float32"), **(options or {}))
    return open_gpu(
        model, DeviceOptions(kv_memory=kv_memory, kv_dtype=kv_dtype), page_size=16, context_tokens=None, rows_max=2,
        drafts_max=0, progress=lambda stage, done: None, device=device,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_warming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_factory, "warm_up", lambda *_: None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"head_dim": 512}, "up to 256. Use --device cpu"),
        ({"options": {"quantize": "int4"}, "intermediate_size": 48}, "of 32 inputs; .* 32, 48. Use --quantize int8"),
        ({"options": {"quantize_activations": "int8"}}, "--quantize-activations int8 works on the CPU only"),
        ({"kv_dtype": "int8"}, "--kv-dtype int8 works on the CPU only"),
        ({"kv_memory": "1K"}, "--kv-memory of 1.0 KiB holds"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=message) as refusal:
        opened(tmp_path, **asked)
    assert "\n" not in str(refusal.value)


HOPPER, NOWHERE = (9, 0), Availability(None, "It is not installed", "Install it.")
CUDA = torch.device("cuda")


def chosen(asked: str, available: Availability, monkeypatch: pytest.MonkeyPatch, head_dim: int = 128) -> Any:
    """What `--attention` means on a Hopper GPU with this package, or none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(gpu_factory, "available_flash_attention3", lambda: available)
    return gpu_factory.choose_flash_attention3(asked, head_dim, torch.bfloat16, CUDA)


def test_flash_attention_3_is_taken_where_it_is_there_unless_it_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Availability(fake_flash_attention3("vllm"), "It is installed")
    assert [chosen(asked, there, monkeypatch) for asked in ("auto", "fa3", "triton")] == [there.kernels] * 2 + [None]
    assert chosen("auto", NOWHERE, monkeypatch) is None
    assert chosen("auto", there, monkeypatch, head_dim=80) is None


def test_flash_attention_3_that_is_demanded_in_vain_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match="--attention fa3: It is not installed. Install it."):
        chosen("fa3", NOWHERE, monkeypatch)
    with pytest.raises(StartupError, match="--attention fa3: it has no kernels for heads of 80"):
        chosen("fa3", NOWHERE, monkeypatch, head_dim=80)


def test_fp8_on_a_gpu_without_it_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(StartupError, match=r"compute capability 8.9 .* this one has 8.6. Use --quantize int8"):
        opened(tmp_path, options={"quantize": "fp8"}, device=torch.device("cuda"))


def test_running_out_of_memory_while_starting_names_the_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_factory, "warm_up", runs_out)
    with pytest.raises(MachineLacks, match="lower --kv-memory or --context-tokens"):
        opened(tmp_path)


def test_a_closed_gpu_takes_no_steps(tmp_path: Path) -> None:
    device = opened(tmp_path)
    device.close()
    device.close()
    with pytest.raises(NotReady, match="closed"):
        device.launch(None)


def test_a_plan_that_reaches_out_of_bounds_fails_its_ticket_and_all_later_ones(tmp_path: Path) -> None:
    device = opened(tmp_path)
    plan = StepPlan.empty(1, bind_rows=np.array([9], np.int32))
    for ticket in (device.launch(plan), device.launch(StepPlan.empty(2))):
        with pytest.raises(PlanError, match="batch row 9 does not exist"):
            ticket.result()
    device.close()


@pytest.mark.parametrize(
    ("rows_max", "drafts_max", "sizes"),
    [(1, 1, [16]), (1, 7, [16]), (1, 60, [16, 32, 64]), (4, 7, [16, 32]), (256, 7, [16, 32, 64, 128, 256, 512])],
)
def test_steps_with_drafts_are_timed_as_far_as_rows_and_drafts_go(
    rows_max: int, drafts_max: int, sizes: list[int]
) -> None:
    plans = verifying_plans(rows_max, drafts_max)
    assert list(plans) == sizes
    for tokens, plan in plans.items():
        assert plan.tokens.size <= tokens and plan.rows.size <= rows_max and plan.draft_counts.max() <= drafts_max
