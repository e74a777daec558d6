"""A compiled core is used only if it was made from these very sources; without one nothing is missing."""

import shutil
import sys
from pathlib import Path

import pytest

import sessile.core
import sessile.core.machine
from sessile.engine import compiled


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the compiled core would lie."""
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    return tmp_path


def test_without_a_compiled_core_the_sources_serve(folder: Path) -> None:
    build = compiled.available_core()
    assert not build.compiled
    assert "make compile" in build.remedy


def test_a_compiled_core_of_other_sources_is_not_used_and_said_to_be_so(folder: Path) -> None:
    (folder / compiled.STAMP).write_text("0123")
    build = compiled.use_compiled_core()
    assert not build.compiled
    assert "other sources" in build.found


def test_a_compiled_core_of_these_sources_is_offered(folder: Path) -> None:
    (folder / compiled.STAMP).write_text(compiled.core_stamp() + "\n")
    assert compiled.available_core() == compiled.CoreBuild(True, "compiled")


def test_a_core_that_is_in_use_is_not_exchanged(folder: Path) -> None:
    (folder / compiled.STAMP).write_text(compiled.core_stamp())
    before = (list(sessile.core.__path__), list(sys.path))
    build = compiled.use_compiled_core()
    assert not build.compiled
    assert "in use" in build.found
    assert (list(sessile.core.__path__), list(sys.path)) == before


@pytest.mark.parametrize("name", ["core/ledger.py", "core/limits.py", "contract/plan.py", "units.py"])
def test_the_stamp_follows_every_source_that_is_compiled_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sessile"
    shutil.copytree(compiled.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiled, "PACKAGE", package)
    before = compiled.core_stamp()
    (package / name).write_text((package / name).read_text() + "\n# changed\n")
    assert compiled.core_stamp() != before
