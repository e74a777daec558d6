"""The answers of a batch on a disk that is full."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from sessile.batch import answer_file
from sessile.errors import StartupError


def answer(number: int) -> dict[str, object]:
    return {"id": f"batch_req_{number}", "custom_id": f"row {number}", "response": None, "error": None}


@contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room_bytes", [0, 10], ids=["no room", "room for part of a line"])
def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path: Path, room_bytes: int) -> None:
    path = tmp_path / "out.jsonl"
    with answer_file(path) as answers:
        answers.append(answer(1))
        whole = path.read_bytes()
        with room_for(len(whole) + room_bytes), pytest.raises(StartupError, match=r"cannot write .*run again"):
            answers.append(answer(2))
        assert path.read_bytes() == whole
        answers.append(answer(3))
    assert [orjson.loads(line) for line in path.read_bytes().splitlines()] == [answer(1), answer(3)]
