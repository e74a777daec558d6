"""What every test shares: bounded threads, hypothesis profiles, and the switches for long grids and planted faults."""

import os

# Before torch or numba is imported anywhere: two cores are what CI has, and oversubscription only slows them.
threads = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, threads)
os.environ.setdefault("NUMBA_NUM_THREADS", "2")  # the most that a test may ask for
# A thread that spins while it waits takes the core that another process of the test needs: five times slower here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which Triton decides when it is imported, by whichever test comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Same examples on every run: a failure in CI is a failure here. Timing says nothing on a shared machine.
settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-grid", action="store_true", help="run every combination of a long grid, not some that stand for all"
    )
    parser.addoption(
        "--storm-s", type=float, default=3.0, help="how long corpora are added and removed while requests run; from 30"
        " seconds on, the memory of all processes must be what it was"
    )
    parser.addoption(
        "--plant", metavar="FAULT", help="plant this fault of sessile/sim/faults.py in the servers of the matrix"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread files whose tests wait for servers among those that compute: at any time some process has work to do."""
    files = dict.fromkeys(item.path for item in items)
    waiting = [file for file in files if file.parent.name == "http" or "process" in file.name or "readme" in file.name]
    computing = [file for file in files if file not in set(waiting)]
    place = {file: index / len(group) for group in (waiting, computing) for index, file in enumerate(group)}
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(scope="session")
def whole_grid(request: pytest.FixtureRequest) -> bool:
    """Whether the long grid was asked for (`make parity`)."""
    return bool(request.config.getoption("--whole-grid"))
