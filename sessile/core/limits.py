"""Frozen bounds of everything the core holds. A bound that is reached refuses or delays; it never grows."""

from dataclasses import dataclass

from sessile.options import option


@dataclass(frozen=True)
class SchedulerOptions:
    """Settings of the scheduler that a user may change; the rest of `Limits` follows from model and device."""

    page_size: int = option(
        16,
        "Tokens a KV page holds. Smaller shares prefixes more finely, larger costs less bookkeeping.",
        unit="tokens",
        low=1,
        high=256,
    )
    context_tokens: int | None = option(
        None,
        "Longest sequence, prompt and output together; default: the model's own limit.",
        unit="tokens",
        low=2,
        aliases=("context-length",),
    )
    rows_max: int | None = option(
        None,
        "Most requests that run at once; default: 64 on a CPU, 256 on a GPU.",
        unit="rows",
        low=1,
        high=4096,
        aliases=("max-running-requests",),
    )
    chunk_tokens: int | None = option(
        None,
        "Most tokens of one step; long prompts are cut into such chunks. Default: 512 on a CPU, 8192 on a GPU.",
        unit="tokens",
        low=1,
        high=65536,
        aliases=("chunked-prefill-size",),
    )
    mixed_chunk: str = option(
        "on",
        "Let prompts share a step with decoding rows; off: a step is either prompts or decoding.",
        choices=("on", "off"),
    )
    mixed_chunk_tokens: int | None = option(
        None,
        "Most tokens of a step in which any row decodes. Default: as many as of any step, whose time --step-limit-ms"
        " bounds.",
        unit="tokens",
        low=1,
        high=65536,
    )
    audit_level: int = option(
        1,
        "0: local checks of every change of ownership. 1: and a rolling audit. 2: and a full audit every step.",
        low=0,
        high=2,
    )
    retract_every: int = option(
        0,
        "Force the newest running request to be preempted every so many steps; for tests. 0: never.",
        unit="steps",
        low=0,
    )
    sessions_max: int = option(
        100_000,
        "Most sessions open at once; one more is refused with 429.",
        unit="sessions",
        low=1,
    )
    queue_max: int = option(
        4096,
        "Most requests waiting to run; one more is refused with 429.",
        unit="requests",
        low=1,
    )
    queue_tokens_max: int = option(
        16_777_216,
        "Most prompt tokens waiting to run; more are refused with 429.",
        unit="tokens",
        low=1,
    )


@dataclass(frozen=True)
class TenantPolicy:
    """What one tenant may take, as the operator's keys file has it; None: no limit but those of the whole server."""

    name: str
    weight: int = 1
    """Its share of step tokens beside other tenants' that want some too."""
    requests_max: int | None = None
    """Requests running or waiting."""
    tokens_max: int | None = None
    """Input tokens of these, committed histories not included."""
    sessions_max: int | None = None
    held_tokens_max: int | None = None
    """Tokens of all its sessions' histories together."""
    shares_prefixes: bool = False
    """Whether its prompts are found among, and add to, the prefixes of all tenants that say so; else only its own."""
    remembers: bool = False
    """Whether its requests may ask to be remembered, so that later ones of the same tenant find drafts in them."""

    def __post_init__(self) -> None:
        assert 1 <= self.weight <= 1000, "a weight is from 1 to 1000"


@dataclass(frozen=True)
class Limits:
    """Every bound of one core, as numbers. Built by the engine from SchedulerOptions, model facts and device facts."""

    pages_total: int
    """Pages of the pool, the scratch page included."""
    page_size: int
    rows_max: int
    context_tokens: int
    chunk_tokens: int
    """Token budget of a step; Machine.set_chunk_tokens may lower it while running."""
    mixed_chunk: bool = True
    mixed_chunk_tokens: int = 1024
    drafts_max: int = 0
    """Most draft tokens a row in a step."""
    sessions_max: int = 100_000
    queue_max: int = 4096
    queue_tokens_max: int = 16_777_216
    audit_level: int = 2
    contain_violations: bool = False
    """What a violation of an invariant does. False: it raises, and ends whoever drives the core. True: whoever it names
    leaves, with an error, and everybody else is served on."""
    retract_every: int = 0
    overtakes_max: int = 64
    """Times the request at the head of the line may be overtaken by later ones that fit."""
    admissions_max: int = 64
    """Most requests admitted in one step."""
    share_wait_steps: int = 256
    """Longest wait of an admission for a prefix that a running request is computing."""
    output_estimate_tokens: int = 4096
    """An allowance above this counts as this much where the output of a request is estimated."""
    tenants: tuple[TenantPolicy, ...] = ()

    def __post_init__(self) -> None:
        assert self.pages_total >= 3, "a pool needs the scratch page, one page of prompt and one of output"
        assert self.page_size >= 1 and 1 <= self.rows_max <= 4096 and self.chunk_tokens >= 1
        assert self.context_tokens >= 2 and 0 <= self.drafts_max < 256
        assert self.chunk_tokens >= 1 and self.mixed_chunk_tokens >= 1

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool holds beside the scratch page."""
        return (self.pages_total - 1) * self.page_size

    @property
    def sequence_tokens_max(self) -> int:
        """Longest sequence that can run: the context length or the pool, whichever is less.

        A sequence of n tokens needs KV for n - 1, but a step in flight may write one position more (and its drafts).
        """
        return min(self.context_tokens, self.pool_tokens - self.drafts_max)
