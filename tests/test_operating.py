"""What operators are given is there and right: the tests behind docs/SECURITY.md."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def test_every_class_of_vulnerability_shows_tests_that_exist() -> None:
    table = page("SECURITY.md").partition("## Classes of vulnerability")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \|$", table, re.MULTILINE)[2:]
    assert len(rows) >= 28
    for name, reason, tests in rows:
        shown = re.findall(r"`(test_\w+)`", tests)
        assert shown and reason, f"{name} shows no test"
        assert [test for test in shown if f"def {test}(" not in TESTS] == [], name
