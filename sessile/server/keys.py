"""Keys: known by their hashes only, and whom each stands for. The keys themselves are nowhere."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from sessile.server.corpora.budget import CorpusLimits


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: the tenant that its messages to the engine carry, and whether it may act on the whole."""

    tenant: str
    is_admin: bool


OPERATOR = Caller("", is_admin=True)
"""Everybody, where there is no keys file."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the keys file. digest: SHA-256 of the key, 32 bytes."""

    digest: bytes = field(repr=False)
    caller: Caller


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys that are accepted, and every tenant that they may stand for, by name."""

    keys: tuple[Key, ...] = field(repr=False)
    tenants: tuple[str, ...]
    corpus_limits: Mapping[str, CorpusLimits] = field(default_factory=dict)
    """Of those tenants that have some."""

    def caller_with(self, key: str) -> Caller | None:
        """Whom a key stands for; None for a key that is not known.

        Takes as long for every key: hashes are compared, in constant time, and all of them whichever matches.
        """
        presented = digest_of(key)
        found: Caller | None = None
        for known in self.keys:
            if hmac.compare_digest(known.digest, presented):
                found = known.caller
        return found


def digest_of(key: str) -> bytes:
    """What the keys file knows a key by. A key is drawn at random, so its hash needs neither salt nor many rounds."""
    return hashlib.sha256(key.encode()).digest()
