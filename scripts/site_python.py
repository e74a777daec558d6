"""The page of the documentation site that describes the Python interface, from the docstrings of what is public.

Public is what a module lists in `__all__`, or, without that, its classes. Source is read rather than signatures, so
that types stand there as they were written.
"""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import is_typeddict

MODULES = ("sessile", "sessile.errors")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LINE_CHARS_MAX = 88
SHOWN_DUNDERS = {"__init__", "__await__", "__aiter__", "__iter__"}

INTRODUCTION = """\
# Python

The classes for use from Python, each with what it takes, gives and raises.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def render() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for name in MODULES:
        module = importlib.import_module(name)
        kinds = public(module)
        if kinds:
            parts.append(f"## {name}\n\n{text(module.__doc__)}\n")
            parts += [described(kind) for kind in [*kinds, *beside(kinds)]]
    parts += examples()
    return "\n".join(parts)


def public(module: ModuleType) -> list[type]:
    """The public classes of a module, in the order of its source or of its list."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
    ]  # fmt: skip
    found = [getattr(module, name) for name in names]
    return [value for value in found if isinstance(value, type)]


def beside(kinds: list[type]) -> Iterator[type]:
    """Records that methods of public classes give and dictionaries whose keys they take, where these are not public."""
    seen = set(kinds)
    for kind in kinds:
        source = inspect.getsource(kind)
        for name in re.findall(r"Unpack\[(\w+)\]|-> \W*(?:\w+\[)*(\w+)", source):
            found = getattr(sys.modules[kind.__module__], name[0] or name[1], None)
            is_record = is_dataclass(found) or is_typeddict(found)
            if is_record and found not in seen and found.__module__.startswith("sessile"):
                seen.add(found)
                yield found


def described(kind: type) -> str:
    """One class: its docstring, fields and methods."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    parts = [f"### {kind.__name__}", f"```python\n{head(tree)}\n```", text(kind.__doc__)]
    rows = [f"| `{name}` | {kind_shown} | {said} |" for name, kind_shown, said in fields(tree)]
    if rows:
        parts.append("\n".join(["| field | type | |", "|---|---|---|", *rows]))
    for name, signatures, said in methods(tree):
        parts.append(f"#### `{kind.__name__}.{name}`\n\n```python\n" + "\n".join(signatures) + "\n```")
        parts.append(said)
    return "\n\n".join(part for part in parts if part) + "\n"


def head(tree: ast.ClassDef) -> str:
    """The line that declares a class."""
    bases = ", ".join(ast.unparse(base) for base in tree.bases)
    return f"class {tree.name}({bases})" if bases else f"class {tree.name}"


def fields(tree: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Annotated names of the class body as (name, type, what the string below it says)."""
    following = [*tree.body[1:], None]
    for node, after in zip(tree.body, following, strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if node.target.id.startswith("_") or ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        default = f", `{ast.unparse(node.value)}` if not given" if node.value else ""
        said = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        shown = ast.unparse(node.annotation).strip("'").replace("|", "\\|")
        yield node.target.id, f"`{shown}`{default}", text(said).replace("\n", " ")


def methods(tree: ast.ClassDef) -> Iterator[tuple[str, list[str], str]]:
    """Public methods and properties as (name, signatures, docstring); several signatures where it is overloaded."""
    defined: dict[str, list[Function]] = {}
    for node in tree.body:
        if isinstance(node, Function) and (not node.name.startswith("_") or node.name in SHOWN_DUNDERS):
            defined.setdefault(node.name, []).append(node)
    for name, nodes in defined.items():
        overloads = [node for node in nodes if "overload" in decorators(node)] or nodes
        said = next((found for node in nodes if (found := ast.get_docstring(node))), "")
        if said or name not in SHOWN_DUNDERS:
            yield name, [signature(node) for node in overloads], text(said)


def decorators(node: Function) -> list[str]:
    """The decorators of a function, as written."""
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def signature(node: Function) -> str:
    """A function's first line, an argument a line where it is long."""
    name = f"{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}def {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    given = list(arguments(node.args))
    line = f"{name}({', '.join(given)}){returns}"
    if len(line) > LINE_CHARS_MAX:
        line = f"{name}(\n" + "".join(f"    {each},\n" for each in given) + f"){returns}"
    shown = [f"@{each}" for each in decorators(node) if each in ("property", "classmethod", "staticmethod")]
    return "\n".join([*shown, line])


def arguments(given: ast.arguments) -> Iterator[str]:
    """The arguments of a method as a caller sees them, without self."""
    by_place = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(by_place) - len(given.defaults)) + given.defaults
    for each, default in list(zip(by_place, defaults, strict=True))[1:]:
        yield argument(each, default)
    if given.vararg:
        yield f"*{argument(given.vararg, None)}"
    elif given.kwonlyargs:
        yield "*"
    for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield argument(each, default)
    if given.kwarg:
        yield f"**{argument(given.kwarg, None)}"


def argument(given: ast.arg, default: ast.expr | None) -> str:
    """One argument with its type and default."""
    typed = f"{given.arg}: {ast.unparse(given.annotation)}" if given.annotation else given.arg
    if default is None:
        return typed
    return f"{typed} = {ast.unparse(default)}" if given.annotation else f"{typed}={ast.unparse(default)}"


def text(docstring: object) -> str:
    """A docstring as Markdown: what is drawn in columns stays so, and nothing in it is taken for markup."""
    parts = []
    for paragraph in inspect.cleandoc(str(docstring or "")).split("\n\n"):
        if re.search(r"^ |[├│└]|\S {2,}\S", paragraph, re.MULTILINE):
            parts.append(f"```{language(paragraph)}\n{paragraph}\n```")
        else:
            parts.append(escaped(paragraph))
    return "\n\n".join(parts)


def language(block: str) -> str:
    """What a block of a docstring is written in, as far as it matters for its colours."""
    try:
        ast.parse(block)
    except SyntaxError:
        return "text"
    return "python"


def escaped(paragraph: str) -> str:
    """Text in which Markdown finds nothing but code between backticks."""
    pieces = re.split(r"(`[^`]*`)", paragraph)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([*_\[\]|])", r"\\\1", piece).replace("<", "&lt;")
        for piece in pieces
    )


def examples() -> Iterator[str]:
    """The programs of examples/, which tests run."""
    for index, path in enumerate(sorted(EXAMPLES.glob("*.py"))):
        source = path.read_text("utf-8")
        said = ast.get_docstring(ast.parse(source)) or path.name
        title = "## Examples\n\n" if index == 0 else ""
        yield f"{title}### {path.name}\n\n{escaped(said)}\n\n```python\n{source}```\n"
