"""What Triton needs before its first kernel is prepared beside other imports, and never in anybody's way."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sessile.kernels import triton_start
from sessile.kernels.triton_start import head_start

PREPARED = """
import sys
from pathlib import Path
from sessile.kernels import triton_start
triton_start.NVIDIA_DEVICE = Path(sys.argv[1])
with triton_start.head_start(wanted=True):
    pass
assert "torch" not in sys.modules, "a head start waits for PyTorch"
from triton.runtime.cache import triton_key
assert triton_key.cache_info().currsize == 1, "Triton's digest is not there"
"""


def test_triton_is_prepared_without_pytorch_where_a_gpu_may_be(tmp_path: Path) -> None:
    device = tmp_path / "nvidiactl"
    device.touch()
    subprocess.run([sys.executable, "-c", PREPARED, str(device)], check=True, timeout=120)


@pytest.mark.parametrize(("wanted", "is_there"), [(True, False), (False, True)])
def test_nothing_is_prepared_for_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool, is_there: bool
) -> None:
    device = tmp_path / "nvidiactl"
    if is_there:
        device.touch()
    begun: list[str] = []
    monkeypatch.setattr(triton_start, "NVIDIA_DEVICE", device)
    monkeypatch.setattr(triton_start, "_prepare", lambda: begun.append("prepared"))
    with head_start(wanted):
        assert "triton-start" not in {thread.name for thread in threading.enumerate()}
    assert not begun


def test_a_machine_without_triton_learns_of_it_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr(triton_start, "NVIDIA_DEVICE", device)
    for module in ("triton.backends.nvidia.driver", "triton.runtime.cache"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.DEBUG, "sessile.kernels"), head_start(wanted=True):
        pass
    assert "no head start for Triton" in caplog.text
