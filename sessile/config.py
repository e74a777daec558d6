"""The configuration: every layer's section, composed once and frozen.

A setting is declared in its layer by `sessile.options.option` and nowhere else; its flag, its environment variable
and its key in the YAML file follow from the name of the field:

    rows_max    --rows-max    SESSILE_ROWS_MAX    rows-max: 64 (or rows_max: 64)

A flag wins over the environment, the environment over the file, the file over the default.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from sessile.core.limits import SchedulerOptions, TenantPolicy
from sessile.device.config import DeviceOptions
from sessile.engine.config import EngineOptions
from sessile.errors import StartupError
from sessile.model.options import ModelOptions
from sessile.options import check_value
from sessile.server.config import ServerOptions

ENVIRONMENT_PREFIX = "SESSILE_"
CONFIG_FILE_VARIABLE = "SESSILE_CONFIG"
API_KEY_VARIABLE = "SESSILE_API_KEY"
"""The key that our own clients send; not a setting, and never shown."""


@dataclass(frozen=True)
class Config:
    """All settings of one server. Each layer gets its own section and sees no other."""

    model: ModelOptions = field(default_factory=ModelOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    tenants: tuple[TenantPolicy, ...] = ()
    """Not a setting: what the keys file says of tenants, added by who reads it."""

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Inverse of `to_json`. Raises StartupError for anything else."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise StartupError(f"the configuration handed to the engine is not one: {error}") from error


@dataclass(frozen=True)
class Setting:
    """One setting: the section that declares it, its field there, and the type of its value."""

    section: str
    declared: "Field[Any]"
    type: type
    optional: bool

    @property
    def name(self) -> str:
        """Name of the field, which is the setting's key."""
        return self.declared.name

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags without dashes, its own first."""
        return self.name.replace("_", "-"), *self.declared.metadata["aliases"]

    @property
    def keys(self) -> tuple[str, ...]:
        """All names under which environment and file may set it, with underscores."""
        return tuple(flag.replace("-", "_") for flag in self.flags)

    def parse(self, text: str, source: str) -> Any:
        """The value that a flag or an environment variable gives as text. Raises StartupError naming the source."""
        if self.type is str:
            return self._checked(text, source)
        if self.type is bool:
            raise AssertionError(f"setting {self.name} is a bool; declare a choice of on and off instead")
        try:
            return self._checked(self.type(text), source)
        except ValueError:
            raise StartupError(f"{self._expected()}; got {text!r:.100} ({source})") from None

    def accept(self, value: object, source: str) -> Any:
        """The value that a YAML file gives. Raises StartupError naming the source."""
        if isinstance(value, bool) and "on" in self.declared.metadata["choices"]:
            value = "on" if value else "off"  # YAML reads a bare on and off as truth values.
        if self.type is str and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None and self.optional:
            return None
        if type(value) is not self.type:
            raise StartupError(f"{self._expected()}; got {value!r:.100} ({source})")
        return self._checked(value, source)

    def _checked(self, value: Any, source: str) -> Any:
        try:
            check_value(self.declared, value)
        except ValueError as error:
            raise StartupError(f"{error} ({source})") from None
        return value

    def _expected(self) -> str:
        kind = {int: "a whole number", float: "a number", str: "text"}[self.type]
        unit = self.declared.metadata["unit"]
        return f"--{self.flags[0]} must be {kind}" + (f" of {unit}" if unit else "")


@cache
def settings() -> tuple[Setting, ...]:
    """Every setting, section by section in the order of declaration. No two share a name or an alias."""
    found = [setting for section, options in _sections().items() for setting in settings_of(options, section)]
    keys = [key for setting in found for key in setting.keys]
    assert len(keys) == len(set(keys)), f"settings share a name: {sorted({k for k in keys if keys.count(k) > 1})}"
    return tuple(found)


def settings_of(options: Any, section: str = "") -> list[Setting]:
    """The settings that a dataclass of options declares, in order."""
    hints = typing.get_type_hints(options)
    return [Setting(section, declared, *_value_type(hints[declared.name])) for declared in fields(options)]


def compose(
    flags: Mapping[str, str] = types.MappingProxyType({}),
    environment: Mapping[str, str] = types.MappingProxyType({}),
    file: Path | None = None,
) -> Config:
    """The configuration that these sources make. Raises StartupError, one line that names what is wrong and where.

    flags: text by setting name. environment: all variables of the process; those that start with SESSILE_ count, an
    empty one as unset. file: YAML; where None, the one that SESSILE_CONFIG names, if it does.
    """
    if file is None and environment.get(CONFIG_FILE_VARIABLE):
        file = Path(environment[CONFIG_FILE_VARIABLE])
    values = _from_file(file) if file else {}
    values |= _from_environment(environment)
    by_name = {setting.name: setting for setting in settings()}
    values |= {name: by_name[name].parse(text, f"flag --{by_name[name].flags[0]}") for name, text in flags.items()}
    return Config(
        **{
            section: options(
                **{s.name: values[s.name] for s in settings() if s.section == section and s.name in values}
            )
            for section, options in _sections().items()
        }
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word most like this one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _sections() -> dict[str, Any]:
    """The dataclass of each section by its name in Config."""
    return {name: options for name, options in typing.get_type_hints(Config).items() if name != "tenants"}


def _value_type(hint: Any) -> tuple[type, bool]:
    """The plain type of a field and whether it may be None."""
    choices = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
    assert len(choices) == 1 and choices[0] in (int, float, str), f"no setting can have the type {hint}"
    return choices[0], type(None) in typing.get_args(hint)


def _by_key() -> dict[str, Setting]:
    return {key: setting for setting in settings() for key in setting.keys}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    known = {ENVIRONMENT_PREFIX + key.upper(): setting for key, setting in _by_key().items()}
    values: dict[str, Any] = {}
    for variable in sorted(environment):
        if not variable.startswith(ENVIRONMENT_PREFIX) or not environment[variable]:
            continue
        if variable in (CONFIG_FILE_VARIABLE, API_KEY_VARIABLE):
            continue
        if variable not in known:
            raise StartupError(f"unknown environment variable {variable:.100}{nearest(variable, known)}")
        setting = known[variable]
        if setting.name in values:
            raise StartupError(f"environment variable {variable} sets {setting.name}, which another one sets too")
        values[setting.name] = setting.parse(environment[variable], f"environment variable {variable}")
    return values


def _from_file(path: Path) -> dict[str, Any]:
    known = _by_key()
    values: dict[str, Any] = {}
    for key, value in _read_yaml(path):
        setting = known.get(key.replace("-", "_"))
        if setting is None:
            flags = [flag for s in settings() for flag in s.flags]
            raise StartupError(f"unknown setting {key!r:.100}{nearest(key.replace('_', '-'), flags)} (file {path})")
        if setting.name in values:
            raise StartupError(f"--{setting.flags[0]} is set twice (file {path})")
        values[setting.name] = setting.accept(value, f"file {path}")
    return values


def _read_yaml(path: Path) -> list[tuple[str, object]]:
    """The top-level entries of a YAML mapping in order, repeated keys included."""
    import yaml  # Here, because most runs have no file and should not wait for the import.

    try:
        text = path.read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return []
            if not isinstance(node, yaml.MappingNode):
                raise StartupError(f"the configuration file {path} must hold lines of the form setting: value")
            return [(str(key.value), loader.construct_object(value, deep=True)) for key, value in node.value]
        finally:
            loader.dispose()
    except OSError as error:
        raise StartupError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        # The last three the library raises itself: for a month of 99, !!timestamp before a word, brackets in brackets.
        raise StartupError(f"the configuration file {path} is not YAML: {' '.join(str(error).split())}") from error
