"""What `--device` means: a GPU where there is one, and a plain word where there is not."""

import pytest
import torch

from sessile.device.config import DeviceOptions
from sessile.device.factory import chosen_kind
from sessile.errors import MachineLacks, StartupError


@pytest.mark.parametrize(("asked", "has_gpu", "kind"), [
    ("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda"),
])  # fmt: skip
def test_the_kind_of_device_follows_from_the_switch_and_the_machine(
    asked: str, has_gpu: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert chosen_kind(DeviceOptions(device=asked)) == kind


@pytest.mark.parametrize(("built_for", "reason"), [(None, "built without CUDA"), ("13.0", "no GPU or no driver")])
def test_a_gpu_that_is_asked_for_and_not_there_is_refused_with_a_remedy(
    built_for: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(StartupError, match=reason) as refusal:
        chosen_kind(DeviceOptions(device="cuda"))
    assert "--device cpu" in str(refusal.value)
    # A driver may be there a moment later, as while a machine starts; another build of torch is not.
    assert isinstance(refusal.value, MachineLacks) == (built_for is not None)
