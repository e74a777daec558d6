"""The keys file: which keys are accepted, whom each stands for, and what every tenant may take.

    tenants:
      acme:
        weight: 2
        sessions_max: 100
    keys:
      - sha256: 5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8
        tenant: acme
        role: user

It is read once, at the start, and strictly: whatever is not as described here ends the start with one line that names
file and line. The server gets the hashes, the core gets the limits; neither gets what the other has.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sessile.config import nearest
from sessile.core.limits import TenantPolicy
from sessile.errors import StartupError
from sessile.server.corpora.budget import CorpusLimits
from sessile.server.keys import Caller, Key, KeyRing, digest_of

KEY_PREFIX = "sk-sessile-"
KEY_BYTES = 32
"""Of randomness in a key that we draw: as much as its hash has."""
ROLES = ("user", "admin")
TENANT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NAME_RULE = "a name has 1 to 64 letters, digits, dots, dashes, underscores"
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
WEIGHT_MAX = 1000
LIMIT_MAX = 1 << 40
SWITCHES = ("shares_prefixes", "remembers")
"""Fields of a policy that are true or false; all others are limits."""
POLICY_FIELDS = tuple(field.name for field in fields(TenantPolicy) if field.name != "name")
CORPUS_FIELDS = {"corpora_tokens_max": "tokens_max", "corpora_bytes_max": "bytes_max"}
"""What the file calls the limits that the server keeps itself → their names in CorpusLimits."""
KNOWN_FIELDS = (*POLICY_FIELDS, *CORPUS_FIELDS)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What a keys file says."""

    ring: KeyRing
    policies: tuple[TenantPolicy, ...]


def draw_key(tenant: str, role: str) -> tuple[str, str]:
    """A new key, and the entry of the keys file that makes it valid. Raises StartupError for an impossible name."""
    if not TENANT_NAME.fullmatch(tenant):
        raise StartupError(f"--tenant {tenant!r:.100}: {NAME_RULE}")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return key, f"  - sha256: {digest_of(key).hex()}\n    tenant: {tenant}\n    role: {role}\n"


def read_keys(path: Path) -> KeyFile:
    """The keys file at path. Raises StartupError, one line that names file and line."""
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise StartupError(f"cannot read the keys file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise StartupError(f"the keys file {path} is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        raise StartupError(f"the keys file {path} is empty: `sessile key` draws a key and prints its entry")
    return _Reader(path).key_file(root)


class _Reader:
    """Turns the nodes of one file into what they say; every refusal names the line of the node at fault."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def key_file(self, root: yaml.Node) -> KeyFile:
        entries = self._mapping(root, "the file", ("tenants", "keys"))
        for name in ("tenants", "keys"):
            if name not in entries:
                self._refuse(root, f"{name} is missing")
        tenants, corpus_limits = self._tenants(entries["tenants"])
        keys = self._keys(entries["keys"], tenants)
        ring = KeyRing(tuple(keys), tuple(tenants), corpus_limits)
        return KeyFile(ring, tuple(tenants.values()))

    def _tenants(self, node: yaml.Node) -> tuple[dict[str, TenantPolicy], dict[str, CorpusLimits]]:
        """By name: what the core holds a tenant to, and what the server does."""
        tenants, corpus_limits = {}, {}
        for name, policy in self._mapping(node, "tenants").items():
            if not TENANT_NAME.fullmatch(name):
                self._refuse(policy, f"tenant {name!r:.100}: {NAME_RULE}")
            given = {} if self._is_null(policy) else self._mapping(policy, f"tenant {name}", KNOWN_FIELDS)
            values = {field: self._policy_value(name, field, each) for field, each in given.items()}
            tenants[name] = TenantPolicy(name, **{field: values[field] for field in POLICY_FIELDS if field in values})
            limits = {ours: values[field] for field, ours in CORPUS_FIELDS.items() if field in values}
            if limits:
                corpus_limits[name] = CorpusLimits(**limits)
        if not tenants:
            self._refuse(node, "tenants names none")
        return tenants, corpus_limits

    def _policy_value(self, tenant: str, field: str, node: yaml.Node) -> Any:
        what = f"tenant {tenant}: {field}"
        text = self._text(node, what)
        if field in SWITCHES:
            if text not in ("true", "false"):
                self._refuse(node, f"{what} must be true or false, got {text!r:.100}")
            return text == "true"
        if self._is_null(node) and field != "weight":
            return None
        least = 0 if field in CORPUS_FIELDS else 1
        most = WEIGHT_MAX if field == "weight" else LIMIT_MAX
        if not re.fullmatch(r"[0-9]{1,15}", text) or not least <= int(text) <= most:
            self._refuse(node, f"{what} must be a whole number from {least} to {most}, got {text!r:.100}")
        return int(text)

    def _keys(self, node: yaml.Node, tenants: Mapping[str, TenantPolicy]) -> list[Key]:
        lines: dict[bytes, int] = {}
        keys = []
        for entry in self._sequence(node, "keys"):
            key = self._key(entry, tenants)
            if key.digest in lines:
                self._refuse(entry, f"this key is listed already, on line {lines[key.digest]}")
            lines[key.digest] = entry.start_mark.line + 1
            keys.append(key)
        if not keys:
            self._refuse(node, "keys lists none: `sessile key` draws a key and prints its entry")
        return keys

    def _key(self, node: yaml.Node, tenants: Mapping[str, TenantPolicy]) -> Key:
        given = self._mapping(node, "a key", ("sha256", "tenant", "role"))
        for name in ("sha256", "tenant"):
            if name not in given:
                self._refuse(node, f"the key has no {name}")
        digest = self._text(given["sha256"], "sha256")
        if not SHA256.fullmatch(digest):
            # Not shown: it may be the key itself.
            self._refuse(given["sha256"], "sha256 must be 64 hexadecimal digits, the SHA-256 of the key")
        tenant = self._text(given["tenant"], "tenant")
        if tenant not in tenants:
            hint = nearest(tenant, tenants)
            self._refuse(given["tenant"], f"tenant {tenant!r:.100} is not declared under tenants{hint}")
        role = self._text(given["role"], "role") if "role" in given else "user"
        if role not in ROLES:
            self._refuse(given["role"], f"role must be {' or '.join(ROLES)}, got {role!r:.100}")
        return Key(bytes.fromhex(digest), Caller(tenant, is_admin=role == "admin"))

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _mapping(self, node: yaml.Node, what: str, known: Iterable[str] = ()) -> dict[str, yaml.Node]:
        """The values of a mapping by key, none of them twice; with `known`, no others."""
        if not isinstance(node, yaml.MappingNode):
            self._refuse(node, f"{what} must be lines of the form name: value")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = self._text(key, f"a name in {what}")
            field = name.replace("-", "_") if known else name
            if known and field not in known:
                self._refuse(key, f"{what} has no field {name!r:.100}{nearest(field, known)}")
            if field in found:
                self._refuse(key, f"{name:.100} is set twice")
            found[field] = value
        return found

    def _sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self._refuse(node, f"{what} must be a list, each entry begun by a dash")
        return list(node.value)

    def _text(self, node: yaml.Node, what: str) -> str:
        """A scalar as it is written: hexadecimal digits are text even where YAML would read a number."""
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node, f"{what} must be a single value")
        return str(node.value)

    def _is_null(self, node: yaml.Node) -> bool:
        return bool(node.tag == "tag:yaml.org,2002:null")

    def _refuse(self, node: yaml.Node, message: str) -> NoReturn:
        raise StartupError(f"{message} (keys file {self._path}, line {node.start_mark.line + 1})")
