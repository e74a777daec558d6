"""The check of built archives, on archives that are as they should be and on others."""

import io
import re
import runpy
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "check_package.py"))
NAMES = ["sessile/__init__.py", "sessile/py.typed", "sessile/core/machine.py", "tests/unit/test_x.py", "docs/X.md",
         "deploy/Dockerfile", "Makefile", "pyproject.toml", "LICENSE", "README.md", ".ci/run", "stray.txt"]  # fmt: skip


def write_wheel(folder: Path, names: set[str]) -> Path:
    path = folder / "sessile-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in sorted(names):
            wheel.writestr(name, "")
    return path


def write_sdist(folder: Path, names: set[str]) -> Path:
    path = folder / "sessile-1.2.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        for name in sorted(names):
            sdist.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


WRITERS = {"expected_in_wheel": write_wheel, "expected_in_sdist": write_sdist}


@pytest.mark.parametrize("kind", WRITERS)
def test_an_archive_with_all_files_and_no_others_is_right(tmp_path: Path, kind: str) -> None:
    archive = WRITERS[kind](tmp_path, CHECK[kind](NAMES, "1.2"))
    assert CHECK["faults"](archive, NAMES) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_too_few_or_too_many_is_named(tmp_path: Path, kind: str) -> None:
    expected = CHECK[kind](NAMES, "1.2")
    (lost,) = [name for name in expected if name.endswith("core/machine.py")]
    archive = WRITERS[kind](tmp_path, (expected - {lost}) | {"sessile/secret.key"})
    assert CHECK["faults"](archive, NAMES) == [
        f"{archive.name} lacks {lost}",
        f"{archive.name} holds sessile/secret.key, which does not belong there",
    ]


def test_a_wheel_holds_the_package_alone_and_an_sdist_what_tests_it() -> None:
    in_wheel, in_sdist = CHECK["expected_in_wheel"](NAMES, "1.2"), CHECK["expected_in_sdist"](NAMES, "1.2")
    assert {name for name in in_wheel if ".dist-info" not in name} == set(NAMES[:3])
    assert {name.removeprefix("sessile-1.2/") for name in in_sdist} == {*NAMES[:-2], "PKG-INFO"}


def test_the_build_is_configured_for_what_is_checked() -> None:
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"] == {"packages": ["sessile"]}
    always = {"README.md", "LICENSE", "pyproject.toml", ".gitignore"}  # hatchling adds these by itself
    included = {name.removeprefix("/") for name in targets["sdist"]["include"]}
    assert included | always == {pattern.removesuffix("/*") for pattern in CHECK["SOURCE"]}


def test_nothing_lies_in_the_package_that_is_not_source() -> None:
    odd = [name for name in CHECK["chosen"](CHECK["tracked_files"](), CHECK["PACKAGE"])
           if not re.search(r"\.py$|/py\.typed$|/kernels/cpp/\w+\.(cpp|h)$|_recorded\.json$", name)]  # fmt: skip
    assert odd == []


def test_a_folder_with_an_old_build_beside_the_new_one_is_refused(tmp_path: Path) -> None:
    write_wheel(tmp_path, CHECK["expected_in_wheel"](NAMES, "1.2"))
    assert CHECK["main"](tmp_path) == 1
