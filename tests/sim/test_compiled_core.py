"""The compiled core does to the letter what its sources do: mypyc checks types that Python does not look at.

Needs a C compiler, as whoever changes the core does.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import compile_core

pytestmark = pytest.mark.long

SEEDS = ["--seeds", "24", "--steps", "300", "--workers", "1"]
COMPILED = """
import sys
from pathlib import Path
from sessile.engine.compiled import use_compiled_core
build = use_compiled_core(Path(sys.argv[1]))
assert build.compiled, build
from sessile.core import machine
assert machine.__file__.endswith(".so"), machine.__file__
from sessile.sim import run
sys.exit(run.main(sys.argv[2:]))
"""


def last_line(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.timeout(900)
def test_the_simulator_sees_the_same_events_over_the_compiled_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the compiler's optimisation, which takes half of the time and changes nothing of what is said.
    monkeypatch.setitem(compile_core.OPTIMIZATION, "MYPYC_OPT_LEVEL", "0")
    assert compile_core.main(tmp_path) == 0
    said = [last_line("-c", COMPILED, str(tmp_path), *SEEDS), last_line("-m", "sessile.sim", *SEEDS)]
    traces = {line.rsplit("trace ", 1)[1] for line in said}
    assert all("nothing found" in line for line in said) and len(traces) == 1, said
