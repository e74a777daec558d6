"""Write docs/SWITCHES.md from the declarations of the settings: `python scripts/write_switches.py`."""

from itertools import groupby
from pathlib import Path

from sessile.config import Setting, settings

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "SWITCHES.md"

INTRODUCTION = """\
# Switches

Every setting of `sessile serve`. This page is written by `scripts/write_switches.py` from the declarations in the code.

Each setting has one name and three ways to be set. A flag wins over the environment, the environment over the file, the
file over the default:

| as | for example |
|---|---|
| flag | `sessile serve --rows-max 64` |
| environment | `SESSILE_ROWS_MAX=64` |
| YAML file, named by `--config` or `SESSILE_CONFIG` | `rows-max: 64` |

An unknown name, a wrong type or a value out of range ends the start with one line that names it and where it was set.
"""


def render() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for section, members in groupby(settings(), key=lambda setting: setting.section):
        head = [f"## {section.capitalize()}", "", "| flag | default | accepts | |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *(render_row(setting) for setting in members), ""]))
    return "\n".join(parts)


def render_row(setting: Setting) -> str:
    """One setting as a row: flag and aliases, default, accepted values, what it does."""
    flags = " ".join(f"`--{flag}`" for flag in setting.flags)
    default = setting.declared.default
    help_text = setting.declared.metadata["help"].replace("|", "\\|")
    return f"| {flags} | {'' if default is None else f'`{default}`'} | {accepted(setting)} | {help_text} |"


def accepted(setting: Setting) -> str:
    """What a setting accepts, in words."""
    rules = setting.declared.metadata
    if rules["choices"]:
        return ", ".join(rules["choices"])
    low, high, unit = rules["low"], rules["high"], rules["unit"]
    if low is None and high is None:
        return unit
    bounds = f"≥ {low:,}" if high is None else f"{low:,} … {high:,}"
    return f"{bounds} {unit}".strip()


if __name__ == "__main__":
    TARGET.write_text(render(), "utf-8")
