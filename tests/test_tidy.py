"""The rules of docs/STYLE.md that a machine can check. A failure lists every offender with file and line."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "sessile").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
PYTHON = LIBRARY + TESTS + SCRIPTS + EXAMPLES
DOCS = [path for path in sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))]

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
LINE_LENGTH_MAX = 120

PRAGMA = re.compile(r"\s+# (type: ignore|noqa|fmt: skip).*$")
"""What a line says to a tool and not to its reader; ruff does not count it either."""

FORBIDDEN_WORDS = {"util", "utils", "manager", "helper", "helpers", "mixin"}
FORBIDDEN_PREFIXES = ("handle_", "process_")
FORBIDDEN_NAMES = {"data", "info"}
OTHERS_NAMES = {"handle_async_request"}
"""What a library calls us by."""

# What would make the core impure: time, chance, threads, the outside world.
IMPURE = {"asyncio", "time", "random", "threading", "os", "logging", "datetime", "secrets", "uuid", "subprocess"}
CORE_MAY_IMPORT = {"numpy", "sessile"}
# The shells a user talks to; everything else logs or returns.
MAY_PRINT = {"cli.py", "doctor.py", "__main__.py"}
MAY_PRINT_FOLDERS = {"bench", "sim"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def spot(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def walk(paths: list[Path], *kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    """Each node of the given kinds in each file."""
    for path in paths:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, kinds):
                yield path, node


def under(folder: str) -> list[Path]:
    return [path for path in LIBRARY if path.relative_to(ROOT / "sessile").parts[0] == folder]


def imported_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def refuse(offenders: list[str], rule: str) -> None:
    """Fail with every offender on its own line."""
    if offenders:
        pytest.fail(f"{rule}:\n  " + "\n  ".join(offenders), pytrace=False)


def test_the_rules_see_the_library() -> None:
    assert len(LIBRARY) > 10
    assert len(DOCS) > 0


def test_functions_are_short() -> None:
    offenders = [
        f"{spot(path, node.lineno)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path, node in walk(PYTHON, ast.FunctionDef, ast.AsyncFunctionDef)
        if node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    refuse(offenders, f"a function has at most {FUNCTION_LINES_MAX} lines")


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in PYTHON}
    offenders = [f"{spot(path, n)}: {n} lines" for path, n in lengths.items() if n > FILE_LINES_MAX]
    refuse(offenders, f"a file has at most {FILE_LINES_MAX} lines")


def test_lines_are_short_in_code_and_docs() -> None:
    offenders = [
        spot(path, number)
        for path in PYTHON + DOCS
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if len(PRAGMA.sub("", line)) > LINE_LENGTH_MAX and not line.lstrip().startswith("|")  # a table's row
    ]
    refuse(offenders, f"a line has at most {LINE_LENGTH_MAX} characters")


def test_modules_are_named_after_what_is_in_them() -> None:
    offenders = [
        spot(path, 1)
        for path in PYTHON
        if FORBIDDEN_WORDS & set(path.stem.split("_")) or path.stem in FORBIDDEN_NAMES
    ]
    refuse(offenders, f"no module is called {', '.join(sorted(FORBIDDEN_WORDS | FORBIDDEN_NAMES))}")


def words_of(name: str) -> set[str]:
    """fooBar_baz → {foo, bar, baz}"""
    return set(re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_"))


def declared_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    return []


def test_names_say_what_they_hold() -> None:
    offenders = []
    for path, node in walk(LIBRARY, ast.AST):
        for name in declared_names(node):
            bare = name.lstrip("_")
            if name in OTHERS_NAMES:
                continue
            if words_of(bare) & FORBIDDEN_WORDS or bare in FORBIDDEN_NAMES or bare.startswith(FORBIDDEN_PREFIXES):
                offenders.append(f"{spot(path, node.lineno)} {name}")
    refuse(offenders, "these names say nothing")


def test_the_core_imports_numpy_and_pure_standard_library_only() -> None:
    offenders = []
    for path, node in walk(under("core"), ast.Import, ast.ImportFrom):
        for module in imported_modules(node):
            top = module.split(".")[0]
            if top in IMPURE or (top not in CORE_MAY_IMPORT and top not in sys.stdlib_module_names):
                offenders.append(f"{spot(path, node.lineno)} {module}")
    refuse(offenders, "core imports numpy and the pure part of the standard library")


def is_set(node: ast.AST) -> bool:
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"set", "frozenset"}


def set_names(tree: ast.AST) -> set[str]:
    """Names and attributes that are assigned or annotated as a set anywhere in the module."""
    names = set()
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign) and is_set(node.value):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign) and re.match(r"(frozen)?set\b", ast.unparse(node.annotation)):
            targets = [node.target]
        elif isinstance(node, ast.arg) and node.annotation is not None:
            if re.match(r"(frozen)?set\b", ast.unparse(node.annotation)):
                names.add(node.arg)
        for target in targets:
            if isinstance(target, ast.Name):
                names.add(target.id)
            elif isinstance(target, ast.Attribute):
                names.add(target.attr)
    return names


def test_the_core_iterates_no_sets() -> None:
    """The order of a set differs between runs, and so would the schedule."""
    offenders = []
    for path in under("core"):
        known = set_names(tree_of(path))
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.For | ast.comprehension):
                continue
            over = node.iter
            name = over.id if isinstance(over, ast.Name) else over.attr if isinstance(over, ast.Attribute) else None
            if is_set(over) or name in known:
                offenders.append(f"{spot(path, over.lineno)} for … in {ast.unparse(over)}")
    refuse(offenders, "iterate a list or a dict, not a set")


def test_the_core_makes_no_object_anew() -> None:
    """In a compiled core a second `__init__` lets go of nothing that the first one made."""
    offenders = [
        spot(path, node.lineno)
        for path, node in walk(under("core"), ast.Call)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "__init__"
    ]
    refuse(offenders, "make a new object instead of calling __init__ again")


def test_no_exception_is_swallowed() -> None:
    offenders = []
    for path, node in walk(PYTHON, ast.ExceptHandler):
        wide = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
        silent = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
        if node.type is None or (wide and silent):
            offenders.append(spot(path, node.lineno))
    refuse(offenders, "name the exception; never pass over all of them")


def test_nothing_is_left_to_do() -> None:
    marker = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    offenders = [
        f"{spot(path, number)} {line.strip()}"
        for path in [*PYTHON, *DOCS, ROOT / "Makefile"]
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if marker.search(line)
    ]
    refuse(offenders, "do it, or file an issue")


def test_nothing_is_a_stub() -> None:
    offenders = [
        spot(path, node.lineno)
        for path, node in walk(LIBRARY, ast.Raise)
        if node.exc is not None and "NotImplementedError" in ast.unparse(node.exc)
    ]
    refuse(offenders, "what is there works")


def test_the_library_does_not_print() -> None:
    offenders = [
        spot(path, node.lineno)
        for path, node in walk(LIBRARY, ast.Call)
        if isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and path.name not in MAY_PRINT
        and path.parent.name not in MAY_PRINT_FOLDERS
        and not any(keyword.arg == "file" for keyword in node.keywords)
    ]
    refuse(offenders, "only what talks to a terminal prints")


def test_only_the_command_line_reads_argv_and_the_environment() -> None:
    offenders = []
    for path, node in walk(LIBRARY, ast.Attribute):
        reads = ast.unparse(node) in {"sys.argv", "os.environ", "os.getenv"}
        if reads and path.name not in {"cli.py", "__main__.py"}:
            offenders.append(f"{spot(path, node.lineno)} {ast.unparse(node)}")
    refuse(offenders, "settings reach a layer through its options")


def test_nothing_is_unpickled() -> None:
    offenders = [
        spot(path, node.lineno)
        for path, node in walk(LIBRARY, ast.Import, ast.ImportFrom)
        if any(module.split(".")[0] in {"pickle", "marshal", "shelve", "dill"} for module in imported_modules(node))
    ]
    refuse(offenders, "msgspec crosses processes; pickle crosses nothing")


def test_the_wall_clock_is_shown_and_never_reckoned_with() -> None:
    """It jumps. What is measured or waited for goes by a monotonic clock; a date is a whole number that is shown."""
    stamps = {
        inner
        for _, node in walk(LIBRARY, ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id == "int"
        for inner in node.args
    }
    offenders = [
        f"{spot(path, node.lineno)} {ast.unparse(node)}"
        for path, node in walk(LIBRARY, ast.Call)
        if ast.unparse(node.func) in {"time.time", "time.time_ns"} and node not in stamps
    ]
    refuse(offenders, "use a monotonic clock, or int(time.time()) for a date that is only shown")


def test_every_option_has_help_and_every_number_a_unit() -> None:
    offenders = []
    for path, node in walk(LIBRARY, ast.AnnAssign):
        call = node.value
        if not (isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "option"):
            continue
        given = {keyword.arg for keyword in call.keywords}
        texts = [argument for argument in call.args[1:2] if isinstance(argument, ast.Constant | ast.JoinedStr)]
        if not (texts or "help" in given):
            offenders.append(f"{spot(path, node.lineno)} {ast.unparse(node.target)} has no help")
        name = ast.unparse(node.target)
        is_number = re.search(r"\b(int|float)\b", ast.unparse(node.annotation)) is not None
        # A level, a port or a ratio has none; a bound still says what it may be.
        if is_number and "unit" not in given and not {"low", "high", "choices"} & given:
            offenders.append(f"{spot(path, node.lineno)} {name} has neither unit nor bounds")
    refuse(offenders, "an option says what it does and in what it is counted")


def test_docs_name_no_place_on_someones_machine() -> None:
    place = re.compile(r"(?<![\w/.:\"])/(?:home|root|work|Users|opt|mnt|srv)/")
    offenders = [
        f"{spot(path, number)} {line.strip()}"
        for path in DOCS
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if place.search(line)
    ]
    refuse(offenders, "docs use paths inside the repository")


def is_test_module(path: Path) -> bool:
    return path.name.startswith("test_")


def claims(node: ast.AST, checkers: set[str]) -> bool:
    """Whether a function asserts: directly, by pytest.raises, or by calling a function of the tests that does."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            name = ast.unparse(inner.func).split(".")[-1]
            if name in {"raises", "fail", "warns", "refuse"} or name.startswith("assert_") or name in checkers:
                return True
    return False


def asserting_functions() -> set[str]:
    """Names of the functions under tests/ that assert, followed through calls until nothing is added."""
    functions = [node for _, node in walk(TESTS, ast.FunctionDef, ast.AsyncFunctionDef) if isinstance(node, Function)]
    known: set[str] = set()
    while True:
        found = {function.name for function in functions if claims(function, known)}
        if found == known:
            return known
        known = found


def test_every_test_asserts_something() -> None:
    known = asserting_functions()
    offenders = [
        f"{spot(path, node.lineno)} {node.name}"
        for path, node in walk([path for path in TESTS if is_test_module(path)], ast.FunctionDef, ast.AsyncFunctionDef)
        if node.name.startswith("test_") and not claims(node, known)
    ]
    refuse(offenders, "a test that asserts nothing claims nothing")


def test_no_test_is_skipped() -> None:
    banned = {"skip", "skipif", "xfail", "importorskip", "skipTest"}
    offenders = [
        f"{spot(path, node.lineno)} {ast.unparse(node)}"
        for path, node in walk(TESTS, ast.Attribute)
        if node.attr in banned and ast.unparse(node).startswith("pytest.")
    ]
    refuse(offenders, "a test runs or is removed")
