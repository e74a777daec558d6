"""Compile sessile/core with mypyc, unless what was made before is of these very sources (docs/adr/0006).

    python scripts/compile_core.py [FOLDER]   (without one: build/core, where the engine looks)

Works on a copy of the package, so that the checkout keeps nothing but sources. Needs mypy, setuptools and a C compiler;
without a compiler it says so and ends with status 0, because the core runs without being compiled.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sessile.engine.compiled import FOLDER, PACKAGE, STAMP, available_core, core_sources, core_stamp

COMPILERS = ("cc", "gcc", "clang")
OPTIMIZATION = {"MYPYC_OPT_LEVEL": "3", "MYPYC_DEBUG_LEVEL": "0"}
"""Level 1 takes a fifth less time to compile, and steps 1 % more: most of theirs is in calls of the interpreter."""


def main(folder: Path) -> int:
    """Compile into a folder if need be; 0 unless the compiler fails."""
    if available_core(folder).compiled:
        return 0
    if not any(shutil.which(name) for name in COMPILERS):
        print("no C compiler here: the core stays pure Python")
        return 0
    print("compiling the core, about a minute", flush=True)
    stamp = core_stamp()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        shutil.copytree(PACKAGE, copy / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(PACKAGE.parent / "pyproject.toml", copy)
        sources = [str(path.relative_to(PACKAGE.parent)) for path in core_sources()]
        done = subprocess.run(
            [sys.executable, "-m", "mypyc", *sources],
            cwd=copy,
            env=os.environ | OPTIMIZATION,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], "the core was not compiled", sep="\n")
            return 1
        install(copy, folder)
    (folder / STAMP).write_text(stamp)
    return 0


def install(copy: Path, folder: Path) -> None:
    """Move the libraries that were made in a copy of the package to the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "sessile" / "core").mkdir(parents=True)
    for library in (*copy.glob("*.so"), *(copy / "sessile" / "core").glob("*.so")):
        shutil.copy(library, folder / library.relative_to(copy))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
