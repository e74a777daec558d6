"""Import a private copy of core and simulator with a fault planted in the source of a core module."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

_PRIVATE = (
    "sessile.core",
    *(f"sessile.sim.{name}" for name in (
        "simulation", "checkers", "drafter", "closure", "small_world", "canonical", "twin",
    )),
)  # fmt: skip
"""What is imported anew: the core and all of the simulator that holds references into it."""


@dataclass(frozen=True)
class Edit:
    """Replace `old`, which must occur exactly once in the module's source, by `new`."""

    module: str
    old: str
    new: str


class NoPlace(LookupError):
    """The core has changed where a fault was to be planted; its edit has to find the new place."""


class _Rewriter(SourceFileLoader):
    def __init__(self, name: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(name, path)
        self._edits = edits

    def get_code(self, fullname: str) -> CodeType:
        """Compile the edited source; nothing is cached on disk."""
        source = self.get_source(fullname)
        assert source is not None
        for edit in self._edits:
            count = source.count(edit.old)
            if count != 1:
                raise NoPlace(f"{edit.module} holds {count} times: {edit.old!r}")
            source = source.replace(edit.old, edit.new)
        return compile(source, self.path, "exec")


class _Planter(MetaPathFinder):
    def __init__(self, edits: Sequence[Edit]) -> None:
        self.pending = {edit.module: [e for e in edits if e.module == edit.module] for edit in edits}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Take over the modules that are to be edited; leave all others to Python."""
        edits = self.pending.pop(fullname, None)
        if edits is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None and spec.origin is not None, f"no module {fullname} to plant a fault in"
        spec.loader = _Rewriter(fullname, spec.origin, edits)
        return spec


@contextmanager
def planted(edits: Sequence[Edit], entry: str = "sessile.sim.simulation") -> Iterator[ModuleType]:
    """A module of the simulator, imported over a core with these edits; the real one comes back after.

    Raises NoPlace if an edit does not apply.
    """
    set_aside = {name: module for name, module in sys.modules.items() if name.startswith(_PRIVATE)}
    for name in set_aside:
        del sys.modules[name]
    planter = _Planter(edits)
    sys.meta_path.insert(0, planter)
    try:
        module = importlib.import_module(entry)
        assert not planter.pending, f"nobody imports {list(planter.pending)}"
        yield module
    finally:
        sys.meta_path.remove(planter)
        for name in [name for name in sys.modules if name.startswith(_PRIVATE)]:
            del sys.modules[name]
        sys.modules.update(set_aside)
        for name, module in set_aside.items():
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)
