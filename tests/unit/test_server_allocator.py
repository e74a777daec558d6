"""Memory that was freed goes back to the system; each case in a process of its own, as the allocator is a process's."""

import subprocess
import sys

BURST = """
import psutil
from sessile.server.allocator import return_freed_memory

if {told}:
    assert return_freed_memory()
del_first = [bytes(3_000_000) for _ in range(3)]
del del_first  # The largest block ever freed: glibc's threshold by itself.
before = psutil.Process().memory_info().rss
bodies, pins = [], []
for _ in range(500):
    bodies.append(b"x" * 100_000)
    pins.append(b"y" * 20_000)
del bodies  # The pins stay, among them.
print(psutil.Process().memory_info().rss - before)
"""


def kept_bytes(*, told: bool) -> int:
    ran = subprocess.run([sys.executable, "-c", BURST.format(told=told)], capture_output=True, text=True, check=True)
    return int(ran.stdout)


def test_a_burst_of_bodies_leaves_nothing_behind() -> None:
    assert kept_bytes(told=True) < 500 * 20_000 + 4_000_000


def test_without_being_told_the_allocator_keeps_them() -> None:
    """So that the case above shows something."""
    assert kept_bytes(told=False) > 500 * 100_000
