"""One seed's world: the core's limits, the model's facts, and the temper of clients and device.

Every seed switches features on and off as a whole, so that rare mixes are somebody's everyday life.
"""

from dataclasses import dataclass, replace
from random import Random

from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits, TenantPolicy

EOS, BOS, SPECIAL = 2, 1, 3
"""Special tokens of the toy vocabulary; all others add one to three letters to the text."""

FAULTS = (
    "retract", "cancel", "close", "late", "faulty", "drafts", "expire", "flush", "fork", "branch", "reserve", "tenants",
    "replay", "grammar",
)  # fmt: skip
"""What `--faults` can switch on: forced retraction, cancels and disconnects, closes at any time, late and delayed
results, rows whose logits are not finite, drafts, idle timeouts, flushes, forks and rewinds, branching sessions,
reservations, several tenants and priorities, lost replies, outputs that follow a grammar."""


CALM = 2
"""Of every eight worlds, the one in which little happens, by its seed."""


@dataclass(frozen=True)
class Temper:
    """How clients and device behave; rates are chances a turn of the loop unless said otherwise."""

    live_max: int
    """Requests that clients keep in flight, about."""
    submit_rate: float
    session_share: float
    """Of all submits, those that are turns of sessions."""
    sessions_wanted: int
    prompt_tokens_max: int
    shared_prompts: float
    """Of all prompts, those that begin like another one."""
    cancel_rate: float
    close_rate: float
    cancel_all_rate: float
    flush_rate: float
    fork_rate: float
    """Forks and rewinds."""
    branch_share: float
    """Of all sessions, those that branch."""
    reserve_rate: float
    """Chance that a session opens with a reservation."""
    replay_rate: float
    """Lost replies: turns that are sent again."""
    priorities: bool
    echo_rate: float
    """Plain prompts that say what a session is about to say."""
    nonsense_rate: float
    """Messages that must be refused or ignored."""
    look_rate: float
    """Requests for stats, views, lists and tokens."""
    chatty: float
    """Chance that effects are taken after a message instead of at the end of the turn of the loop."""
    delay_rate: float
    """Chance that the step in flight goes on while only messages come in."""
    late_rate: float
    faulty_rate: float
    """Chance a row and step."""
    draft_rate: float
    """Chance that a draft token is right."""
    pace_rate: float
    """Chance that the step budget is changed."""
    logprob_rate: float
    sampling_variety: float
    """Chance of each unusual sampling setting."""
    timeouts: bool
    tick_ns_max: int
    grammar_rate: float
    """Of all submits, those that bring a grammar."""
    group_rate: float
    """Of all plain prompts, those that are answered several times."""


@dataclass(frozen=True)
class World:
    """Everything that a simulation of one seed is built from."""

    seed: int
    limits: Limits
    facts: ModelFacts
    overlap: bool
    strict: bool
    temper: Temper
    audit_turns: int = 1
    """Every so many turns the simulation checks everything, whatever the machine does by itself. Not always after each:
    who looks at rows makes the core write what it had only noted."""

    @property
    def is_calm(self) -> bool:
        """Whether it is one of those in which little happens."""
        return self.seed % 8 == CALM


def make_world(seed: int, faults: frozenset[str] = frozenset(FAULTS)) -> World:
    """The world of a seed, with only the named faults at work."""
    draw = Random(f"world {seed}")
    facts = _facts(draw)
    audits = Random(f"audit {seed}")
    limits = _limits(draw, facts, faults, audit_level=audits.choice([1, 2]))
    world = World(
        seed=seed,
        limits=limits,
        facts=facts,
        overlap=draw.random() < 0.8,
        strict=draw.random() < 0.5,
        temper=_temper(draw, limits, faults),
        audit_turns=audits.choice([1, 1, 4, 16]),
    )
    return _calmed(world) if world.is_calm and "drafts" in faults else world


def _calmed(world: World) -> World:
    """The same with few requests that ask for nothing unusual, room for all of them, and drafts.

    What many steps in a row have in common is looked at once: only here the same rows go on for as long. An audit of
    level 2 would have what was noted of steps written behind each, and indexes are told of noted steps by another way.
    """
    context_tokens = 200
    limits = replace(
        world.limits, pages_total=100, page_size=16, rows_max=6, context_tokens=context_tokens, chunk_tokens=64,
        mixed_chunk=True, mixed_chunk_tokens=64, drafts_max=4, audit_level=1, retract_every=0, tenants=(),
    )  # fmt: skip
    temper = replace(
        world.temper, live_max=4, submit_rate=0.1, cancel_all_rate=0.0, flush_rate=0.0, nonsense_rate=0.0,
        look_rate=0.02, pace_rate=0.0, logprob_rate=0.0, sampling_variety=0.0, grammar_rate=0.0, group_rate=0.0,
    )  # fmt: skip
    facts = replace(world.facts, context_tokens=context_tokens)
    return replace(world, limits=limits, temper=temper, facts=facts, overlap=True, audit_turns=16)


def _facts(draw: Random) -> ModelFacts:
    vocab_size = draw.choice([16, 24, 48, 96])
    token_bytes = [b"<unk>", b"<s>", b"</s>", b"<tool>"]
    while len(token_bytes) < vocab_size:
        token_bytes.append(bytes(draw.choice(b"abc") for _ in range(draw.choice([1, 1, 2, 3]))))
    return ModelFacts(
        vocab_size=vocab_size,
        context_tokens=draw.choice([8, 16, 32, 100, 200, 400]),
        eos_ids=(EOS,),
        bos_id=BOS if draw.random() < 0.7 else None,
        token_bytes=tuple(token_bytes),
        special_ids=frozenset({BOS, EOS, SPECIAL}),
    )


def _limits(draw: Random, facts: ModelFacts, faults: frozenset[str], audit_level: int) -> Limits:
    drafts_max = draw.choice([0, 1, 4, 8]) if "drafts" in faults else 0
    page_size = draw.choice([1, 1, 2, 3, 4, 8, 16])
    pages_total = 1 + draw.randint(4, 40)
    while (pages_total - 1) * page_size - drafts_max < 2:
        pages_total += 1
    return Limits(
        pages_total=pages_total,
        page_size=page_size,
        rows_max=draw.randint(1, 8),
        context_tokens=facts.context_tokens,
        chunk_tokens=draw.choice([1, 2, 3, 5, 8, 16, 64, 512]),
        mixed_chunk=draw.random() < 0.75,
        mixed_chunk_tokens=draw.choice([1, 2, 4, 8, 32, 1024]),
        drafts_max=drafts_max,
        sessions_max=draw.choice([1, 3, 8, 100]),
        queue_max=draw.choice([2, 8, 100, 100]),
        queue_tokens_max=draw.choice([100, 1000, 100_000, 100_000]),
        audit_level=audit_level,
        retract_every=draw.choice([0, 0, 0, 3, 7, 20]) if "retract" in faults else 0,
        overtakes_max=draw.choice([0, 1, 4, 64]),
        admissions_max=draw.choice([1, 2, 64]),
        share_wait_steps=draw.choice([0, 2, 16, 256]),
        output_estimate_tokens=draw.choice([1, 8, 64, 4096]),
        tenants=_tenants(draw) if "tenants" in faults else (),
    )


def _tenants(draw: Random) -> tuple[TenantPolicy, ...]:
    """None, or two or three with their limits; requests are then always somebody's."""
    if draw.random() < 0.5:
        return ()
    return tuple(
        TenantPolicy(
            name,
            weight=draw.choice([1, 1, 3, 10]),
            requests_max=draw.choice([None, None, 2, 6]),
            tokens_max=draw.choice([None, None, 20, 200]),
            sessions_max=draw.choice([None, None, 1, 3]),
            held_tokens_max=draw.choice([None, None, 30, 300]),
            shares_prefixes=draw.random() < 0.3,
            remembers=name != "bob",
        )
        for name in ("ada", "bob", "eve")[: draw.choice([2, 3])]
    )


def _temper(draw: Random, limits: Limits, faults: frozenset[str]) -> Temper:
    def rate(fault: str, *choices: float) -> float:
        chosen = draw.choice(choices)
        return chosen if not fault or fault in faults else 0.0

    return Temper(
        live_max=draw.choice([1, 3, 6, 12, 24]),
        submit_rate=rate("", 0.2, 0.5, 0.9),
        session_share=rate("", 0.0, 0.4, 0.7, 0.9, 1.0),
        sessions_wanted=draw.choice([1, 3, 6, 12]),
        prompt_tokens_max=min(draw.choice([3, 8, 20, 60, 400]), max(1, limits.sequence_tokens_max - 1)),
        shared_prompts=rate("", 0.0, 0.4, 0.9),
        cancel_rate=rate("cancel", 0.0, 0.01, 0.05, 0.3),
        close_rate=rate("close", 0.0, 0.002, 0.01, 0.1),
        cancel_all_rate=rate("cancel", 0.0, 0.0, 0.005),
        flush_rate=rate("flush", 0.0, 0.0, 0.005, 0.03),
        fork_rate=rate("fork", 0.0, 0.05, 0.2, 0.5),
        branch_share=rate("branch", 0.0, 0.0, 0.3, 0.8),
        reserve_rate=rate("reserve", 0.0, 0.3, 0.8),
        replay_rate=rate("replay", 0.0, 0.05, 0.2),
        priorities="tenants" in faults and draw.random() < 0.3,
        echo_rate=rate("", 0.0, 0.1, 0.3),
        nonsense_rate=rate("", 0.0, 0.02, 0.1),
        look_rate=rate("", 0.02, 0.1),
        chatty=rate("", 0.0, 0.5, 1.0),
        delay_rate=rate("late", 0.0, 0.2, 0.6),
        late_rate=rate("late", 0.0, 0.5, 1.0),
        faulty_rate=rate("faulty", 0.0, 0.0, 0.003, 0.03),
        draft_rate=rate("", 0.0, 0.5, 0.8, 1.0),
        pace_rate=rate("", 0.0, 0.0, 0.05),
        logprob_rate=rate("", 0.0, 0.0, 0.3),
        sampling_variety=rate("", 0.0, 0.1, 0.4),
        timeouts="expire" in faults and draw.random() < 0.5,
        tick_ns_max=draw.choice([1_000_000, 50_000_000]),
        grammar_rate=rate("grammar", 0.0, 0.2, 0.7),
        group_rate=rate("", 0.0, 0.0, 0.3),
    )


def quiet_temper(tick_ns_max: int) -> Temper:
    """Of a world whose clients are a script, and whose device does nothing odd."""
    never = dict.fromkeys(
        (
            "submit_rate", "session_share", "shared_prompts", "cancel_rate", "close_rate", "cancel_all_rate",
            "flush_rate", "fork_rate", "branch_share", "reserve_rate", "replay_rate", "echo_rate", "nonsense_rate",
            "look_rate", "chatty", "delay_rate", "late_rate", "faulty_rate", "draft_rate", "pace_rate", "logprob_rate",
            "sampling_variety", "grammar_rate", "group_rate",
        ),
        0.0,
    )  # fmt: skip
    return Temper(
        live_max=1,
        sessions_wanted=1,
        prompt_tokens_max=1,
        priorities=False,
        timeouts=False,
        tick_ns_max=tick_ns_max,
        **never,
    )
