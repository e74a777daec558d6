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
USE = """
import sys
from pathlib import Path
from sessile.engine.compiled import use_compiled_core
build = use_compiled_core(Path(sys.argv[1]))
assert build.compiled, build
from sessile.core import machine
assert machine.__file__.endswith(".so"), machine.__file__
"""
SIMULATE = """
from sessile.sim import run
sys.exit(run.main(sys.argv[2:]))
"""
COUNT = """
import gc
from sessile.sim.simulation import Simulation
from sessile.sim.world import make_world
for _ in range(3):
    for seed in range(6):
        assert Simulation(make_world(seed)).run(200).failure is None
    gc.collect()
    blocks = sys.getallocatedblocks()
    print(blocks - before if "before" in globals() else blocks)
    before = blocks
"""
BLOCKS_MORE_MAX = 500
"""Of memory, after the same runs once more. One list a step that is not let go of makes 60,000."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core, compiled without optimisation, which takes half of the time and changes nothing of what is said."""
    folder = tmp_path_factory.mktemp("core")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(compile_core.OPTIMIZATION, "MYPYC_OPT_LEVEL", "0")
        assert compile_core.main(folder) == 0
    return folder


def last_line(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.timeout(900)
def test_the_simulator_sees_the_same_events_over_the_compiled_core(built: Path) -> None:
    said = [last_line("-c", USE + SIMULATE, str(built), *SEEDS), last_line("-m", "sessile.sim", *SEEDS)]
    traces = {line.rsplit("trace ", 1)[1] for line in said}
    assert all("nothing found" in line for line in said) and len(traces) == 1, said


@pytest.mark.timeout(900)
def test_the_compiled_core_keeps_nothing_of_what_has_ended(built: Path) -> None:
    assert int(last_line("-c", USE + COUNT, str(built))) <= BLOCKS_MORE_MAX
