"""Room for corpora, in tokens and bytes, of the whole server and of each tenant: claimed before it is used."""

from collections.abc import Mapping
from dataclasses import dataclass

from sessile.errors import LimitReached, TooLong, UserError

CODE = "over_budget"
TEXT_BYTES_A_TOKEN = 8
"""A text claims an eighth of its bytes as tokens until they are counted. Hardly any text has fewer; most have twice as
many, which are claimed before anything is indexed."""
INDEX_BYTES_A_TOKEN = 8
"""4 for the token, 4 for its position."""


@dataclass(frozen=True, slots=True)
class CorpusLimits:
    """How much there may be of corpora; None: no limit."""

    tokens_max: int | None = None
    bytes_max: int | None = None
    """Of their indexes, in memory and on the disk alike."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of one corpus or of several."""

    tokens: int = 0
    bytes: int = 0

    @classmethod
    def of_text(cls, text_bytes: int) -> "Size":
        """The least that a text of so many bytes is taken for."""
        return cls.of_tokens(text_bytes // TEXT_BYTES_A_TOKEN)

    @classmethod
    def of_tokens(cls, tokens: int) -> "Size":
        """What the index of so many tokens takes."""
        return cls(tokens, tokens * INDEX_BYTES_A_TOKEN)

    @classmethod
    def of_index(cls, file_bytes: int) -> "Size":
        """About what an index file holds."""
        return cls(file_bytes // INDEX_BYTES_A_TOKEN, file_bytes)

    def __add__(self, other: "Size") -> "Size":
        return Size(self.tokens + other.tokens, self.bytes + other.bytes)

    def __sub__(self, other: "Size") -> "Size":
        return Size(self.tokens - other.tokens, self.bytes - other.bytes)


class Claim:
    """Room that one corpus has been given. `release` gives it back, once or more often."""

    def __init__(self, budget: "Budget", tenant: str) -> None:
        self.size = Size()
        self._budget = budget
        self._tenant = tenant

    def resize(self, size: Size) -> None:
        """Claim more, or give some back. Raises TooLong or LimitReached; what was claimed before stays so."""
        self._budget.change(self._tenant, self.size, size)
        self.size = size

    def release(self) -> None:
        """Give everything back."""
        self.resize(Size())

    @property
    def tokens_max(self) -> int:
        """The most that `resize` would give at this moment."""
        return self.size.tokens + self._budget.left(self._tenant).tokens


class Budget:
    """What is claimed, beside what may be."""

    def __init__(self, in_all: CorpusLimits, by_tenant: Mapping[str, CorpusLimits]) -> None:
        self._limits = in_all
        self._tenant_limits = by_tenant
        self._used = Size()
        self._tenant_used: dict[str, Size] = {}

    @property
    def used(self) -> Size:
        """Claimed by all together."""
        return self._used

    def used_by(self, tenant: str) -> Size:
        """Claimed by one tenant."""
        return self._tenant_used.get(tenant, Size())

    def limits_of(self, tenant: str) -> tuple[CorpusLimits, CorpusLimits]:
        """Of the whole server, and of the tenant."""
        return self._limits, self._tenant_limits.get(tenant, CorpusLimits())

    def left(self, tenant: str) -> Size:
        """What the tenant could still claim."""
        pairs = list(zip(self.limits_of(tenant), (self._used, self.used_by(tenant)), strict=True))
        return Size(
            min(most.tokens_max - used.tokens for most, used in pairs if most.tokens_max is not None),
            min(most.bytes_max - used.bytes for most, used in pairs if most.bytes_max is not None),
        )

    def change(self, tenant: str, before: Size, after: Size) -> None:
        """Turn one claim of a tenant into another. Raises TooLong or LimitReached, and changes nothing then."""
        change = after - before
        if change.tokens > 0 or change.bytes > 0:
            left = self.left(tenant)
            if change.tokens > left.tokens or change.bytes > left.bytes:
                raise self._refusal(tenant, after, left + before)
        self._used += change
        self._tenant_used[tenant] = self.used_by(tenant) + change

    def _refusal(self, tenant: str, wanted: Size, left: Size) -> UserError:
        """Another moment may do for what fits an empty server; nothing helps what does not."""
        limits = self.limits_of(tenant)
        tokens_max = min(most.tokens_max for most in limits if most.tokens_max is not None)
        bytes_max = min(most.bytes_max for most in limits if most.bytes_max is not None)
        message = (
            f"the corpus takes at least {wanted.tokens} tokens and {wanted.bytes} bytes of index, and there is room "
            f"for {max(0, left.tokens)} of {tokens_max} tokens and {max(0, left.bytes)} of {bytes_max} bytes"
        )
        never = wanted.tokens > tokens_max or wanted.bytes > bytes_max
        error: UserError = TooLong(message) if never else LimitReached(f"{message}; remove a corpus first")
        error.code = CODE
        return error
