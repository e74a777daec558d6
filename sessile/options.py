"""How a layer declares its section of the configuration: a frozen dataclass whose fields are made by `option`.

The command line, environment variables, the YAML file and the table in the docs are all derived from these fields
(see config.py and cli.py); nothing else declares a setting.
"""

from collections.abc import Sequence
from dataclasses import Field, field, fields
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """Declare one setting.

    help: a sentence that says what it does and why one would change it. unit: of the value, shown in --help.
    choices / low / high: what is accepted (bounds inclusive). aliases: further flag names, without dashes.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "aliases": tuple(aliases),
    }
    return field(default=default, metadata=metadata)


def check_options(section: Any) -> None:
    """Raise ValueError naming the first field of a config section that is out of its declared range or choices."""
    for declared in fields(section):
        check_value(declared, getattr(section, declared.name))


def check_value(declared: "Field[Any]", value: Any) -> None:
    """Raise ValueError unless the declared field accepts the value; None is accepted where it is the default."""
    if value is None and declared.default is None:
        return
    rules = declared.metadata
    flag = "--" + declared.name.replace("_", "-")
    if rules.get("choices") and value not in rules["choices"]:
        raise ValueError(f"{flag} must be one of {', '.join(rules['choices'])}; got {value!r:.100}")
    low, high = rules.get("low"), rules.get("high")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value or (low is not None and value < low) or (high is not None and value > high):
            bounds = f"≥ {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{flag} must be {bounds} {rules.get('unit', '')}".rstrip() + f"; got {value!r:.100}")
