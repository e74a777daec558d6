"""The soak itself, for a few seconds: `scripts/soak.py` finds nothing, and would find what it looks for."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.http.serving import free_port

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    specification = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = sys.modules["soak"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.long
def test_h53_whatever_clients_do_no_reply_is_a_5xx_and_nothing_is_left_behind() -> None:
    command = [sys.executable, str(SCRIPT), "--minutes=0.12", "--clients=12", f"--port={free_port()}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "soak: all good" in ended.stdout and "memory: not judged" in ended.stdout


def test_memory_that_grows_after_the_warm_up_is_a_failure(soak: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def judged(engine_bytes: list[int]) -> int:
        samples = [soak.Sample(float(at), 100 << 20, size << 20) for at, size in enumerate(engine_bytes)]
        return int(soak.report(soak.Findings(), samples, minutes=30))

    warm_up = [50, 90]
    assert judged([*warm_up, 100, 100, 101, 100, 101, 101]) == 0
    assert judged([*warm_up, 100, 100, 101, 102, 103, 103]) == 1
    assert "the engine's memory is not flat: +3.00%" in capsys.readouterr().out


def test_the_first_failures_are_shown_and_all_are_counted(soak: ModuleType) -> None:
    findings = soak.Findings()
    findings.expect(True, "holds")
    for number in range(99):
        findings.expect(False, f"failure {number}")
    assert findings.failure_count == 99 and findings.failures[0] == "failure 0" and len(findings.failures) < 99
