"""The documentation site: it builds, every link and anchor leads somewhere, nothing is fetched, nothing is left out."""

import argparse
import os
import re
import runpy
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

import sessile
from sessile.cli import COMMANDS, parser_for
from sessile.errors import SessileError
from sessile.server.app import create_app
from sessile.server.body import Body
from sessile.server.config import ServerOptions

# The theme announces its successor on standard error when it is imported.
os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[1]
DRAWN = runpy.run_path(str(ROOT / "scripts" / "draw_pictures.py"))
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
NOT_ON_THE_SITE = {"RELEASE"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a site that was built strictly: a link or an anchor that leads nowhere ends it."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def text_of(page: Path) -> str:
    """What a page says, without its markup."""
    article = page.read_text("utf-8").partition("<article")[2].partition("</article>")[0]
    return unescape(re.sub(r"<[^>]+>", "", article))


@pytest.mark.parametrize("broken", ["(HTTP.md#nowhere)", "(NOWHERE.md)"], ids=["anchor", "page"])
def test_a_link_that_leads_nowhere_ends_the_build(broken: str, tmp_path: Path) -> None:
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    page = docs / "SPECULATION.md"
    page.write_text(page.read_text("utf-8").replace("(HTTP.md#corpora)", broken), "utf-8")
    with pytest.raises(Abort, match="Aborted with 1 warnings in strict mode"):
        build(load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(tmp_path / "site"), strict=True))


def test_every_document_is_a_page(site: Path) -> None:
    docs = ROOT / "docs"
    names = {str(path.relative_to(docs).with_suffix("")) for path in docs.rglob("*.md")} - NOT_ON_THE_SITE
    pages = {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")}
    assert {name.replace("README", "index") for name in names} - pages == set()


def test_the_quick_start_says_what_the_readme_does(site: Path) -> None:
    said = text_of(site / "quick-start.html")
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```(?:bash|python)\n(.*?)^```", readme.partition("## State")[0], re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    assert [block for block in blocks if block.strip() not in said] == []


def test_every_route_that_is_served_has_its_section(site: Path) -> None:
    page = (site / "http-reference.html").read_text("utf-8")
    described = set(re.findall(r"<h3[^>]*><code>([^<]+)</code>", page))
    paths = create_app(NotImplemented, NotImplemented, ServerOptions()).openapi()["paths"]
    assert described == {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


def bodies(kind: type[Body]) -> Iterator[type[Body]]:
    for body in kind.__subclasses__():
        yield body
        yield from bodies(body)


def test_every_field_of_every_body_is_listed_with_what_stands_below_it_in_the_code(site: Path) -> None:
    said = re.sub(r"\s+", " ", text_of(site / "http-reference.html"))
    fields = [field for body in bodies(Body) for field in body.model_fields.items()]
    assert len(fields) > 50
    assert [name for name, _ in fields if not re.search(rf"\b{name}\b", said)] == []
    texts = {re.sub(r"\s+", " ", field.description) for _, field in fields if field.description}
    assert len(texts) > 15
    assert [text for text in texts if text not in said] == []


def test_every_class_that_is_public_is_described(site: Path) -> None:
    page = (site / "python-reference.html").read_text("utf-8")
    described = set(re.findall(r'<h3 id="[^"]*">(\w+)', page))
    errors = {each.__name__ for each in subclasses(SessileError)}
    listed = {name for name in getattr(sessile, "__all__", ()) if isinstance(getattr(sessile, name), type)}
    assert len(errors) > 10
    assert {"LLM", "Session", "Completion"} | errors | listed <= described


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    """The errors of sessile.errors below one; layers derive more of their own."""
    for each in kind.__subclasses__():
        if each.__module__ == "sessile.errors":
            yield each
            yield from subclasses(each)


def test_every_command_has_its_section_and_its_flags(site: Path) -> None:
    page = (site / "commands.html").read_text("utf-8")
    described = set(re.findall(r"<h2[^>]*><code>sessile ([^<]+)</code>", page))
    assert described == {name for name, command in COMMANDS.items() if command.summary}
    switches = (site / "SWITCHES.html").read_text("utf-8")
    for name in described:
        actions = [action for action in parser_for(name)._actions if action.help != argparse.SUPPRESS]
        flags = {flag for action in actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}
        assert [flag for flag in flags if f"<code>{flag}</code>" not in page + switches] == [], name


def test_who_reads_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    fetched: set[str] = set()
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source|video|object)\b[^>]*>", page.read_text("utf-8")):
            fetched.update(re.findall(r'(?:src|href|data)="([^"]+)"', tag))
    for sheet in site.rglob("*.css"):
        fetched.update(re.findall(r'(?:url\(|@import )["\']?([^)"\';]+)', sheet.read_text("utf-8")))
    assert len(fetched) > 10
    assert [name for name in fetched if re.match(r"(?:\w+:)?//", name)] == []


def test_no_markup_is_left_in_the_text(site: Path) -> None:
    """Lists and tables that lack an empty line before them, and diagrams for a script that the site does not have."""
    left = [
        (page.name, line)
        for page in site.rglob("*.html")
        for line in re.findall(r"<p>((?:\||- |\* |#|```|\d\. )[^<]{0,60})|(mermaid)\b", page.read_text("utf-8"))
    ]
    assert left == []


def test_every_picture_is_the_one_that_the_script_draws() -> None:
    assert {path.stem for path in PICTURES} == set(DRAWN["PICTURES"])
    for path in PICTURES:
        assert path.read_text("utf-8") == DRAWN["PICTURES"][path.stem]().render(), "run scripts/draw_pictures.py"


def test_every_picture_is_shown_and_described_in_words(site: Path) -> None:
    shown: dict[str, str] = {}
    for page in site.rglob("*.html"):
        shown |= dict(re.findall(r'<img alt="([^"]*)" src="[./]*pictures/([\w-]+)\.svg"', page.read_text("utf-8")))
    assert set(shown.values()) == {path.stem for path in PICTURES}
    assert all(len(words.split()) > 5 for words in shown)


def test_every_picture_can_be_read_on_light_and_on_dark() -> None:
    light, dark = DRAWN["LIGHT"], DRAWN["DARK"]
    for ground, colours in (("#ffffff", light), ("#1e2129", dark)):
        assert contrast(colours["ink"], ground) > 7 and contrast(colours["muted"], ground) > 4.5
        for kind in ("kept", "fresh", "shared"):
            assert contrast(colours["ink"], colours[kind]) > 4.5, kind
            assert contrast(colours[f"{kind}-edge"], ground) > 3, kind
    assert set(light) == set(dark)


def contrast(one: str, other: str) -> float:
    """The ratio of contrast of two colours by WCAG 2, 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """The relative luminance of `#rrggbb`, 0 to 1."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
