"""Compare wheel and sdist with the repository: every file that belongs there, and nothing else.

    python -m build
    python scripts/check_package.py dist

Needs nothing but Python and git, so that it can look at what was built before anything is installed from it.
"""

import fnmatch
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ("sessile/*",)
SOURCE = (
    *PACKAGE, "tests/*", "docs/*", "scripts/*", "examples/*", "deploy/*", "Makefile", "constraints.txt", "CHANGELOG.md",
    "CONTRIBUTING.md", "README.md", "LICENSE", "mkdocs.yml", "pyproject.toml", ".gitignore",
)  # fmt: skip
"""What an sdist holds: enough to test it with. hatchling adds .gitignore by itself."""
DIST_INFO = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")


def tracked_files() -> list[str]:
    """Every file of the repository, relative to its root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]


def chosen(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that any of the patterns matches; * crosses folders."""
    patterns = tuple(patterns)
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


def expected_in_wheel(names: Iterable[str], version: str) -> set[str]:
    """What a wheel of this version holds."""
    return chosen(names, PACKAGE) | {f"sessile-{version}.dist-info/{name}" for name in DIST_INFO}


def expected_in_sdist(names: Iterable[str], version: str) -> set[str]:
    """What an sdist of this version holds."""
    return {f"sessile-{version}/{name}" for name in (*chosen(names, SOURCE), "PKG-INFO")}


def faults(archive: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with an archive, one line each."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found = {name for name in wheel.namelist() if not name.endswith("/")}
        expected = expected_in_wheel(names, archive.name.split("-")[1])
    else:
        with tarfile.open(archive) as sdist:
            found = {member.name for member in sdist if not member.isdir()}
        expected = expected_in_sdist(names, archive.name.removeprefix("sessile-").removesuffix(".tar.gz"))
    missing = [f"{archive.name} lacks {name}" for name in sorted(expected - found)]
    return missing + [f"{archive.name} holds {name}, which does not belong there" for name in sorted(found - expected)]


def main(folder: Path) -> int:
    """Check the one wheel and the one sdist of a folder; 1 if anything is wrong."""
    archives = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if sorted(archive.suffix for archive in archives) != [".gz", ".whl"]:
        print(f"{folder} should hold one wheel and one sdist: empty it, and run python -m build", file=sys.stderr)
        return 1
    names = tracked_files()
    wrong = [line for archive in archives for line in faults(archive, names)]
    print("\n".join(wrong) or f"{', '.join(archive.name for archive in archives)}: complete, and nothing else")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
