"""The pages of the documentation site that are not files of docs/: made when it is built, from the README and the code.

A hook of MkDocs, named in mkdocs.yml; `make docs` runs it. It also fits pages to the site that are written to be read
in the repository: links that lead out of docs/, and diagrams that would need a script from elsewhere.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import site_commands
import site_http
import site_python
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

MOVED = {"README.md": "quick-start.md", "CHANGELOG.md": "changelog.md"}
"""Files outside docs/ that have a page."""

MADE = {
    "quick-start.md": lambda: quick_start((ROOT / "README.md").read_text("utf-8")),
    "changelog.md": lambda: (ROOT / "CHANGELOG.md").read_text("utf-8"),
    "http-reference.md": site_http.render,
    "python-reference.md": site_python.render,
    "commands.md": site_commands.render,
}
QUICK_START = ("Start", "Ask it something", "Sessions", "In Python", "Corpora", "Commands")
"""Sections of the README that the page takes over. A test runs their commands."""

NOT_SHOWN = {"RELEASE.md"}
"""As mkdocs.yml excludes it."""

LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STATE = re.compile(r'^(?P<name>\w+|\[\*\])\s*(?:\(\("(?P<round>[^"]+)"\)\)|\["(?P<box>[^"]+)"\])?')
ARROW = re.compile(
    r"""^(?P<source>.+?)\s+
    (?: --\s"?(?P<on>[^"]+?)"?\s--> | -\.\s"?(?P<dotted>[^"]+?)"?\s\.-> | -\.-> | --> )
    \s+(?P<target>[^:]+)(?::\s*(?P<after>.+))?$""",
    re.VERBOSE,
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give pages of docs/ that the navigation does not name a place in it: guides under Use, decisions under Design."""
    docs = Path(config.docs_dir)
    headings = {name: pages for entry in config.nav for name, pages in entry.items()}
    named = set(re.findall(r"[\w/.-]+\.md", repr(config.nav)))
    guides = sorted(path.name for path in docs.glob("*.md"))
    headings["Use"] += [name for name in guides if name not in named | NOT_SHOWN]
    headings["Design"] += sorted(f"adr/{path.name}" for path in (docs / "adr").glob("0*.md"))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for name, make in MADE.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The page's text with links and diagrams that work on the site."""
    source = page.file.src_uri
    origin = next((name for name, target in MOVED.items() if target == source), f"docs/{source}")
    return DIAGRAM.sub(lambda found: arrows_of(found[1]), fitted(markdown, posixpath.dirname(origin), source))


def quick_start(readme: str) -> str:
    """The sections of the README that show how to begin."""
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL))
    return "# Quick start\n\n" + "".join(f"## {name}\n{sections[name]}" for name in QUICK_START)


def fitted(markdown: str, folder: str, page: str) -> str:
    """Links of a file in a folder of the repository as links of a page of the site; one that leads to no page stays."""

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        inside = MOVED.get(path) or path.removeprefix("docs/")
        return f"]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, markdown)


def arrows_of(diagram: str) -> str:
    """A Mermaid diagram of states as a table of its arrows, which needs no script to be drawn."""
    names: dict[str, str] = {"[*]": "start"}
    rows = ["| from | to | when |", "|---|---|---|"]
    for line in diagram.splitlines()[1:]:
        found = ARROW.match(line.strip())
        ends = [found["source"], found["target"]] if found else [line.strip()]
        shown = []
        for end in ends:
            state = STATE.match(end.strip())
            assert state, f"not an arrow of a diagram: {line!r}"
            label = state["round"] or state["box"]
            names[state["name"]] = label or names.get(state["name"], state["name"])
            shown.append(names[state["name"]])
        if found:
            rows.append(f"| {shown[0]} | {shown[1]} | {found['on'] or found['dotted'] or found['after'] or ''} |")
        else:
            rows.append(f"| {shown[0]} | | |")
    return "\n".join(rows).replace("<br/>", " ")
