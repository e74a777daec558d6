"""Compiling many kernels at once: each job is done once by another process, and what goes wrong there is met here."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sessile.kernels.triton_launch import ForkedCalls, compiled_together, start_children


def noting(folder: Path, index: int) -> Callable[[], int]:
    """A job that leaves a line with its process, in a file of its own, and returns its number."""

    def note() -> int:
        with (folder / str(index)).open("a") as file:
            file.write(f"{os.getpid()}\n")
        return index

    return note


def run_in_children(jobs: Sequence[Callable[[], int]], processes: int) -> None:
    for child in start_children(jobs, processes):
        os.waitpid(child, 0)


def makers(folder: Path, count: int) -> list[list[int]]:
    """Of each job, the processes that did it."""
    files = [folder / str(index) for index in range(count)]
    return [[int(line) for line in file.read_text().split()] if file.exists() else [] for file in files]


@pytest.mark.parametrize("processes", [1, 3])
def test_each_job_is_done_once_and_elsewhere(tmp_path: Path, processes: int) -> None:
    run_in_children([noting(tmp_path, index) for index in range(300)], processes)
    done = makers(tmp_path, 300)
    assert [len(by) for by in done] == [1] * 300
    used = {by[0] for by in done}
    assert os.getpid() not in used
    assert len(used) <= processes
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # nobody was left behind


def test_a_job_that_fails_or_kills_its_process_leaves_the_others_done(tmp_path: Path) -> None:
    def fail() -> int:
        raise ValueError("no such kernel")

    def die() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    jobs = [noting(tmp_path, index) for index in range(40)]
    run_in_children([fail, die, *jobs], 3)
    assert [len(by) for by in makers(tmp_path, 40)] == [1] * 40


def test_without_processes_nothing_is_done_elsewhere_but_all_of_it_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    calls = ForkedCalls(4)
    futures = [calls.submit(noting(tmp_path, index)) for index in range(5)]
    assert not any(future.done() for future in futures)
    calls.finish()
    assert [future.result() for future in futures] == list(range(5))
    assert makers(tmp_path, 5) == [[os.getpid()]] * 5


def test_what_a_job_raises_is_raised_to_whoever_asks_for_its_result(tmp_path: Path) -> None:
    def fail(reason: str) -> int:
        raise ValueError(reason)

    calls = ForkedCalls(2)
    failed, done = calls.submit(fail, "no such kernel"), calls.submit(noting(tmp_path, 0))
    calls.finish()
    assert done.result() == 0
    assert len(makers(tmp_path, 1)[0]) == 2  # once there, once here
    with pytest.raises(ValueError, match="no such kernel"):
        failed.result()


def test_what_was_noted_is_begun_while_more_is_noted(tmp_path: Path) -> None:
    calls = ForkedCalls(2)
    for index in range(3):
        calls.submit(noting(tmp_path, index))
    calls.begin()
    until_s = time.monotonic() + 30
    while not all(makers(tmp_path, 3)):
        assert time.monotonic() < until_s, "calls that were begun are made before anybody asks for their results"
        time.sleep(0.01)
    later = calls.submit(noting(tmp_path, 3))
    calls.finish()
    assert later.result() == 3
    there = [[process for process in by if process != os.getpid()] for by in makers(tmp_path, 4)]
    assert [len(by) for by in there] == [1] * 4


def test_an_error_while_kernels_are_asked_for_is_raised_when_all_that_was_noted_has_its_result(tmp_path: Path) -> None:
    futures = []

    def ask_in_vain() -> None:
        with compiled_together(2) as calls:
            futures.append(calls.submit(noting(tmp_path, 0)))
            calls.begin()
            futures.append(calls.submit(noting(tmp_path, 1)))
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        ask_in_vain()
    # Triton's own mode waits for them as it is left: without results it would wait for ever.
    assert [future.result(timeout=0) for future in futures] == [0, 1]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_call_that_is_interrupted_leaves_no_other_without_a_result(tmp_path: Path) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    calls = ForkedCalls(1)
    interrupted, done = calls.submit(interrupt), calls.submit(noting(tmp_path, 0))
    calls.finish()
    assert done.result(timeout=0) == 0
    with pytest.raises(KeyboardInterrupt):
        interrupted.result(timeout=0)
