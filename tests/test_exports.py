"""What a module declares in `__all__` is there, and a package's public names come from where they say."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import sessile

ROOT = Path(__file__).resolve().parents[1]
ACCELERATOR_PACKAGES = {"triton"}
"""Come with torch's builds for GPUs, and only with them."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "sessile").rglob("*.py"))
    if path.name != "__main__.py"
}


def declared_all(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def imported(name: str) -> ModuleType | None:
    """The module, or None if it runs only beside an accelerator whose packages are not installed here."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ACCELERATOR_PACKAGES:
            raise
        return None


@pytest.mark.parametrize("name", MODULES)
def test_a_module_can_be_imported_and_says_what_it_is(name: str) -> None:
    imported(name)
    assert ast.get_docstring(ast.parse(MODULES[name].read_text("utf-8")))


def test_all_lists_each_public_name_once_and_truly() -> None:
    for name, path in MODULES.items():
        listed = declared_all(path) or []
        module = imported(name)
        assert len(listed) == len(set(listed)), f"{name}.__all__ lists a name twice"
        absent = [each for each in listed if module and not hasattr(module, each)]
        assert absent == [], f"{name}.__all__ lists what is not there"
        assert [each for each in listed if each.startswith("_")] == [], f"{name}.__all__ lists private names"


def test_every_package_is_a_package() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_the_version_is_the_one_of_the_distribution() -> None:
    assert sessile.__version__ == version("sessile")


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, sessile.errors, sessile.units, sessile.contract.messages; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "False"


@pytest.mark.parametrize(
    ("names", "unwanted"),
    [("", "numpy httpx msgspec"), ("Client, AsyncClient", "numpy torch numba"), ("LLM, AsyncLLM", "torch fastapi")],
)
def test_a_public_name_loads_what_it_needs_when_it_is_named(names: str, unwanted: str) -> None:
    importing = f"from sessile import {names}" if names else "import sessile"
    code = f"import sys; {importing}; print([name for name in {unwanted.split()} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "[]"


def test_every_public_name_has_one_home() -> None:
    homes = [name for names in sessile._HOMES.values() for name in names]
    assert sorted(homes) == sorted(sessile.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        sessile.__getattr__("Llm")
