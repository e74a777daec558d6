"""The doctor names what is wrong with a machine and what to do, and does not fall ill itself."""

import importlib
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sessile import doctor
from sessile.config import Config
from sessile.doctor import Finding, Level, examine, examine_accelerator, main, render
from sessile.kernels import flash_attention3
from sessile.kernels.flash_attention3 import Availability
from sessile.model.options import ModelOptions
from sessile.server.config import ServerOptions
from tests.kernels.fake_flash import fake_flash_attention3

ANY_PORT = ServerOptions(port=0)
SOUND = Config(server=ANY_PORT)


def finding(findings: list[Finding], subject: str) -> Finding:
    return next(found for found in findings if found.subject == subject)


def without(monkeypatch: pytest.MonkeyPatch, *names: str, error: Exception | None = None) -> None:
    """Make importing these modules fail."""
    real = importlib.import_module

    def refuse(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] in names:
            raise error or ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", refuse)


def test_a_machine_that_passes_these_tests_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SOUND) == 0
    shown = capsys.readouterr().out
    assert "Ready to serve" in shown
    assert "SmolLM2-135M-Instruct.Q4_1.gguf: llama, 30 layers" in " ".join(shown.split())


def test_every_problem_comes_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "torch", "numba", "zmq")
    findings = examine(replace(SOUND, model=ModelOptions(model=str(tmp_path / "nowhere"))))
    ill = [found for found in findings if found.level is not Level.OK]
    assert {"packages", "PyTorch", "numba", "model", "tokenizer"} <= {found.subject for found in ill}
    for found in ill:
        assert found.remedy or "Give" in found.found, found


def test_a_machine_without_torch_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch")
    findings = examine(SOUND)
    torch = finding(findings, "PyTorch")
    assert torch.level is Level.PROBLEM
    assert "pip install torch" in torch.remedy
    assert finding(findings, "Python").level is Level.OK


def test_a_torch_that_breaks_while_it_is_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch", error=OSError("libgomp.so.1: cannot open shared object file\nand more"))
    torch = finding(examine(SOUND), "PyTorch")
    assert torch.found == "cannot import it: libgomp.so.1: cannot open shared object file"


def test_a_torch_without_bytecode_is_slow_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert torch.__spec__ is not None
    monkeypatch.setattr(torch.__spec__, "cached", str(tmp_path / "__init__.cpython-311.pyc"))
    found = finding(examine(SOUND), "PyTorch")
    assert found.level is Level.WARNING
    assert "without bytecode" in found.found
    assert f"compileall -q {Path(str(torch.__file__)).parent}" in found.remedy


def test_a_missing_numba_is_slow_but_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "numba")
    assert finding(examine(SOUND), "numba").level is Level.WARNING


@pytest.mark.parametrize(
    ("capability", "available", "level", "found"),
    [
        ((9, 0), Availability(fake_flash_attention3("vllm"), "FlashAttention-3 of vllm"), Level.OK,
         "H100; attention: triton, prompts by FlashAttention-3 of vllm"),
        ((9, 0), Availability(None, "FlashAttention-3 is not installed", "Install one."), Level.WARNING,
         "H100; attention: triton; FlashAttention-3 is not installed"),
        ((8, 0), Availability(None, "", ""), Level.OK, "H100; attention: triton"),
    ],
)  # fmt: skip
def test_a_gpu_is_told_with_what_attends_on_it(
    capability: tuple[int, int], available: Availability, level: Level, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(flash_attention3, "available_flash_attention3", lambda: available)
    accelerator = examine_accelerator()
    assert (accelerator.level, accelerator.found, accelerator.remedy) == (level, found, available.remedy)


def test_a_damaged_model_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF")
    findings = examine(replace(SOUND, model=ModelOptions(model=str(path))))
    assert finding(findings, "model").level is Level.PROBLEM
    assert "Download it again" in finding(findings, "model").found


def test_a_port_in_use_is_a_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        findings = examine(replace(SOUND, server=ServerOptions(port=taken.getsockname()[1])))
    assert finding(findings, "port").level is Level.PROBLEM
    assert "--port" in finding(findings, "port").found


def test_too_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sessile.device.memory.available_bytes", lambda: 299 << 20)
    memory = finding(examine(SOUND), "memory")
    assert memory.level is Level.PROBLEM
    assert memory.found.startswith("299.0 MiB free, at least ")
    assert "container's limit" in memory.remedy


def test_an_examination_that_fails_is_a_finding_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Finding:
        raise ZeroDivisionError("no cores")

    monkeypatch.setattr(doctor, "examine_processor", fail)
    findings = examine(SOUND)
    assert finding(findings, "processor").found == "ZeroDivisionError: no cores"
    assert finding(findings, "port").level is Level.OK


def test_what_was_found_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.Console().print(render([Finding("x", Level.OK, "[red]found[/red]", "[do]")]))
    shown = capsys.readouterr().out
    assert "[red]found[/red]" in shown
    assert "[do]" in shown


def test_the_doctor_is_ready_before_torch_is_imported() -> None:
    code = "import sys; import sessile.doctor; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
