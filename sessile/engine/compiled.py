"""The compiled core, where somebody made one: mypyc's output of the very sources in sessile/core (docs/adr/0006).

It lies in build/core of a checkout, beside a stamp of the sources it was made from. A stamp that does not fit the
sources, the interpreter or the processor is never used: the sources are. Nothing else changes: same modules, same
names, same results.
"""

import hashlib
import importlib
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import sessile.core

PACKAGE = Path(sessile.__file__).parent
FOLDER = PACKAGE.parent / "build" / "core"
STAMP = "stamp.txt"
PURE_MODULES = ("__init__", "limits")
"""Of the core, what stays as it is: limits is read by everybody, long before anybody asks for the compiled core."""


@dataclass(frozen=True)
class CoreBuild:
    """Which core this process runs, and what to do to run a faster one."""

    compiled: bool
    found: str
    remedy: str = ""


def core_sources() -> list[Path]:
    """The modules that are compiled."""
    return [path for path in sorted((PACKAGE / "core").glob("*.py")) if path.stem not in PURE_MODULES]


def core_stamp() -> str:
    """What a compiled core depends on: the sources of core and contract, interpreter and processor."""
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {platform.system()} {platform.machine()}".encode())
    parts = [PACKAGE / "units.py", PACKAGE / "errors.py", PACKAGE / "options.py"]
    for path in (*sorted((PACKAGE / "core").glob("*.py")), *sorted((PACKAGE / "contract").glob("*.py")), *parts):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def use_compiled_core(folder: Path | None = None) -> CoreBuild:
    """Take the core's modules from the compiled core if there is one that fits. To be called before any is imported.

    folder: where it lies; None: in FOLDER.
    """
    folder = folder or FOLDER
    build = available_core(folder)
    modules = str(folder / "sessile" / "core")
    if not build.compiled or modules in sessile.core.__path__:
        return build
    if any(f"sessile.core.{path.stem}" in sys.modules for path in core_sources()):
        return CoreBuild(False, "pure Python; it was in use before the compiled core was asked for")
    sys.path.append(str(folder))  # Where the library lies that all compiled modules share.
    sessile.core.__path__.insert(0, modules)
    importlib.invalidate_caches()
    return build


def available_core(folder: Path | None = None) -> CoreBuild:
    """What `use_compiled_core` would use; changes nothing."""
    stamp = (folder or FOLDER) / STAMP
    if not stamp.is_file():
        return CoreBuild(False, "pure Python", "Run `make compile`: steps of many rows take two thirds of the time.")
    if stamp.read_text().strip() != core_stamp():
        return CoreBuild(False, "pure Python; the compiled core is of other sources", "Run `make compile` again.")
    return CoreBuild(True, "compiled")
