"""What the documents show is there: commands, flags, links, tests, switches."""

import ast
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessile.cli import COMMANDS, parser_for
from sessile.config import settings
from sessile.keyfile import read_keys
from sessile.server.app import create_app
from sessile.server.body import ANYTHING, Body
from sessile.server.config import ServerOptions
from sessile.sim.faults import MUTANTS
from sessile.sim.mutants import BALANCED_MIN

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
DOC_IDS = [str(path.relative_to(ROOT)) for path in DOCS]
HAZARDS = (ROOT / "docs" / "HAZARDS.md").read_text("utf-8")
WAITING = {"H32", "H63"}
"""Hazards of what is not built yet: tiers, several ranks."""
every_document = pytest.mark.parametrize("path", DOCS, ids=DOC_IDS)


def fenced(path: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a language in a document."""
    yield from re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def shown_commands(path: Path) -> Iterator[str]:
    """Each line of a shell block and each piece of inline code, without comments."""
    for block in fenced(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.split("  #")[0]
    prose = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", prose)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@every_document
def test_every_make_target_that_is_shown_exists(path: Path) -> None:
    shown = {
        target
        for command in shown_commands(path)
        for target in re.findall(r"(?:^|[|;&] *)make ([a-z-]+)", command)
    }
    assert shown - make_targets() == set()


def check_sessile_command(words: list[str]) -> None:
    """Find the command that the words begin with and look its flags up."""
    names = [name for name in COMMANDS if words[: len(name.split())] == name.split()]
    groups = {name.split()[0] for name in COMMANDS}
    assert names or words[0] in groups, f"sessile has no command {words[0]}"
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    assert not flags or names, f"sessile {words[0]} takes no flags by itself"
    for flag in flags:
        assert flag in parser_for(names[0])._option_string_actions, f"sessile {names[0]} has no {flag}"


@every_document
def test_every_sessile_command_that_is_shown_exists(path: Path) -> None:
    for command in shown_commands(path):
        found = re.match(r"(?:\S*/)?sessile ([a-z].*)", command)
        if found:
            check_sessile_command(shlex.split(found[1]))
        for arguments in re.findall(r'make (?:serve|chat) ARGS="([^"]*)"', command):
            check_sessile_command(["serve", *arguments.split()])


@every_document
def test_every_flag_that_is_named_exists(path: Path) -> None:
    known = {f"--{flag}" for setting in settings() for flag in setting.flags}
    for name in COMMANDS:
        known |= set(parser_for(name)._option_string_actions)
    named = {match for command in shown_commands(path) for match in re.findall(r"^(--[a-z][a-z-]+)", command)}
    assert named - known - {"--no-deps"} == set()


@every_document
def test_every_python_example_compiles(path: Path) -> None:
    for source in fenced(path, "python"):
        assert ast.parse(source).body


def test_every_document_with_commands_has_a_test_that_runs_it() -> None:
    """Named by it in quotes. A page of figures shows what made them, which takes hours; its flags are checked above."""
    sources = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    shown = [path.name for path in DOCS if any(fenced(path, "bash"))]
    unrun = [name for name in shown if not any(f'"{name}"' in source for source in sources)]
    assert set(shown) >= {"README.md", "OPERATIONS.md", "SESSIONS.md", "SPECULATION.md"}
    assert set(unrun) <= {"BENCHMARKS.md", "CONTRIBUTING.md"}, "run what the page shows, as tests/test_readme.py does"


def test_the_keys_file_that_is_shown_can_be_read(tmp_path: Path) -> None:
    (shown,) = fenced(ROOT / "docs" / "HTTP.md", "yaml")
    (tmp_path / "keys.yaml").write_text(shown, "utf-8")
    assert [policy.name for policy in read_keys(tmp_path / "keys.yaml").policies] == ["acme", "umbra"]


@every_document
def test_every_link_inside_the_repository_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8"))
    inside = [target for target in targets if "://" not in target]
    assert [target for target in inside if not (path.parent / target).exists()] == []


@every_document
def test_every_file_of_the_repository_that_is_named_exists(path: Path) -> None:
    roots = "sessile|tests|docs|scripts|examples"
    named = {match for text in shown_commands(path) for match in re.findall(rf"^((?:{roots})/[\w./-]*)$", text)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_page_of_switches_is_the_one_the_declarations_make() -> None:
    render = runpy.run_path(str(ROOT / "scripts" / "write_switches.py"))["render"]
    written = (ROOT / "docs" / "SWITCHES.md").read_text("utf-8")
    assert written == render(), "run .venv/bin/python scripts/write_switches.py"


def test_the_architecture_names_every_folder_and_no_other() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8")
    named = set(re.findall(r"^\| .*?`sessile/([a-z]+)/`", page, re.MULTILINE))
    there = {path.parent.name for path in (ROOT / "sessile").glob("*/__init__.py")}
    assert named == there


def test_every_test_that_an_invariant_rests_on_exists() -> None:
    page = (ROOT / "docs" / "INVARIANTS.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 10
    assert [name for name in sorted(named) if f"def {name}(" not in source] == []


def test_the_readme_table_of_adrs_is_complete() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text("utf-8")
    files = [path.name for path in sorted((ROOT / "docs" / "adr").glob("0*.md"))]
    assert files
    assert [name for name in files if f"({name})" not in index] == []


def served_routes() -> set[str]:
    """Every route of the application as `METHOD /path`; building it needs neither an engine nor a tokenizer."""
    app = create_app(NotImplemented, NotImplemented, ServerOptions())
    return {f"{method.upper()} {route}" for route, methods in app.openapi()["paths"].items() for method in methods}


def test_the_page_of_routes_lists_those_that_are_served() -> None:
    page = (ROOT / "docs" / "HTTP.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `((?:GET|POST|DELETE) /[^`]*)`", page, re.MULTILINE))
    unlisted = {"GET /flush_cache"}  # named in the row of POST
    assert listed == served_routes() - unlisted


@every_document
def test_every_route_that_is_named_is_served(path: Path) -> None:
    paths = {route.split()[1] for route in served_routes()}
    text = path.read_text("utf-8")
    named = set(re.findall(r"127\.0\.0\.1:30000(/[\w/]+)", text)) - {"/v1"}
    patterns = [re.sub(r"\{\w+\}", "[^/]+", each) for each in paths]
    assert {name for name in named if not any(re.fullmatch(pattern, name) for pattern in patterns)} == set()


def bodies(kind: type[Body]) -> Iterator[type[Body]]:
    for body in kind.__subclasses__():
        yield body
        yield from bodies(body)


def test_every_field_that_is_accepted_without_effect_is_listed() -> None:
    page = (ROOT / "docs" / "HTTP.md").read_text("utf-8")
    ignored = {name for body in bodies(Body) for name, value in body.tolerated.items() if value is ANYTHING}
    listed = set(re.findall(r"`(\w+)`", page.split("## Accepted, without effect")[1].split("\n\n")[2]))
    assert served_routes()  # imports every module that declares a body
    assert listed == ignored


def claims_by_hazard() -> dict[str, set[str]]:
    """Every test whose name begins with hazards, test_h24_… or test_h26_h66_…, by hazard."""
    named: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name, ids in re.findall(r"def (test_((?:h\d\d_)+)\w+)\(", path.read_text("utf-8")):
            for hazard in ids.upper().strip("_").split("_"):
                named.setdefault(hazard, set()).add(name)
    return named


def test_every_hazard_of_what_is_built_is_named_by_a_test() -> None:
    described = set(re.findall(r"^\| (H\d\d) \|", HAZARDS, re.MULTILINE))
    assert described - WAITING == set(claims_by_hazard())


def test_every_row_of_the_hazards_shows_tests_of_that_hazard_or_what_it_waits_for() -> None:
    named = claims_by_hazard()
    rows = re.findall(r"^\| (H\d\d) \| [^|]+ \| ([^|]+) \| ([^|]*) \|$", HAZARDS, re.MULTILINE)
    assert len(rows) == 77
    for hazard, reason, tests in rows:
        shown = re.findall(r"`(test_\w+)`", tests)
        assert set(shown) <= named.get(hazard, set()), f"{hazard} shows a test that does not name it"
        assert bool(shown) != (hazard in WAITING), f"{hazard} shows no test"
        assert hazard not in WAITING or reason.startswith("**waiting** for")


def test_the_page_of_planted_faults_lists_no_other() -> None:
    page = (ROOT / "docs" / "MUTANTS.md").read_text("utf-8")
    listed = re.findall(r"^\| (?!fault \|)([^|-][^|]*) \|", page, re.MULTILINE)
    gone = set(listed) - {mutant.name for mutant in MUTANTS}
    assert not gone, "run make mutants ARGS='--write docs/MUTANTS.md'"
    balanced = len(re.findall(r"\| balanced \|", page))
    assert len(listed) >= 30 and balanced >= BALANCED_MIN


def test_every_hazard_that_code_or_tests_name_is_described() -> None:
    described = set(re.findall(r"^\| (H\d\d) \|", HAZARDS, re.MULTILINE))
    sources = [*(ROOT / "sessile").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    text = "\n".join(path.read_text("utf-8") for path in sources)
    named = set(re.findall(r"\bH\d\d\b", text)) | {each.upper() for each in re.findall(r"\btest_(h\d\d)_", text)}
    assert len(named) > 10
    assert named - described == set()
