"""A log of what a server was asked (`--request-log`), played to the core on a toy device with every checker looking.

What is kept: the order of everything, about when it came, how long prompts and answers were, which prompts begin alike
and which are of one group, sessions and their turns, forks, rewinds, cancels. What is not: texts, so tokens are made
up, the same for the same beginnings; limits of tenants; drafts; pauses, which are cut short. If the core misbehaved in
that order of events, it does so here.

Where one engine followed another, the same core goes on: all that ran is cancelled, all KV is dropped, and sessions
that did not come back are closed.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

from sessile.contract import messages as wire
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits, TenantPolicy
from sessile.sim.log_lines import (
    AnyLine,
    CancelAllLine,
    CancelLine,
    CloseLine,
    DoneLine,
    DropLine,
    EngineLine,
    FlushLine,
    ForkLine,
    OpenLine,
    RestoreLine,
    RewindLine,
    SessionLine,
    SubmitLine,
    read_log,
)
from sessile.sim.records import Report
from sessile.sim.simulation import Simulation
from sessile.sim.world import World, quiet_temper

VOCABULARY, SPECIAL_TOKENS = 96, 4
CHUNK_TOKENS = 64
"""Tokens between two numbers of a prompt, as the log has them."""
TURN_S = 0.01
"""What a turn of the loop stands for."""
SLACK_TURNS = 8
"""From a request's coming to its first token, about."""
PAUSE_TURNS_MAX = 50
"""Longer pauses are cut to this: nothing happens in them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `replay`."""
    parser.add_argument("file", type=Path, help="a file that --request-log wrote")


def main(options: argparse.Namespace) -> int:
    """Replay a file; 0 if nothing was found. Raises StartupError for a file that is no such log."""
    report = replay(read_log(options.file))
    for name, count in sorted(report.totals.items()):
        if count and not name.startswith("mark: "):
            print(f"  {name:<24} {count:>12,}")
    if report.failure is None:
        print(f"{report.steps:,} steps: nothing found; trace {report.trace[:16]}")
        return 0
    print("\n".join(report.failure.events))
    print(f"step {report.failure.step}: {report.failure.checker}: {report.failure.message}")
    return 1


def replay(lines: Sequence[AnyLine]) -> Report:
    """Run the lines of a log, an engine's among them."""
    engine = next(line for line in lines if isinstance(line, EngineLine))
    tenants = sorted({_tenant(line) for line in lines if isinstance(line, SubmitLine | SessionLine)})
    return Simulation(world_of(engine, tenants), script_of(lines)).run_script()


def world_of(engine: EngineLine, tenants: Iterable[str]) -> World:
    """The machine of the log, without drafts and without limits of tenants."""
    limits = Limits(
        pages_total=engine.pages_total,
        page_size=engine.page_size,
        rows_max=engine.rows_max,
        context_tokens=engine.context_tokens,
        chunk_tokens=engine.chunk_tokens,
        mixed_chunk_tokens=engine.chunk_tokens,
        queue_max=max(1, engine.queue_max),
        audit_level=1,
        tenants=tuple(TenantPolicy(name) for name in tenants),
    )
    texts = tuple(bytes([byte]) for byte in range(VOCABULARY))
    facts = ModelFacts(vocab_size=VOCABULARY, context_tokens=engine.context_tokens, eos_ids=(), token_bytes=texts)
    temper = quiet_temper(tick_ns_max=int(2 * TURN_S * 1e9))
    return World(seed=0, limits=limits, facts=facts, overlap=True, strict=False, temper=temper)


def script_of(lines: Sequence[AnyLine]) -> dict[int, list[wire.ToEngine]]:
    """The messages of a log by turn of the loop."""
    ends = {line.key: line for line in lines if isinstance(line, DoneLine)}
    script: dict[int, list[wire.ToEngine]] = {}
    turn, before_s = 1, 0.0
    sent: dict[int, int] = {}
    ops = itertools.count(1)
    for index, line in enumerate(lines):
        turn += min(PAUSE_TURNS_MAX, max(0, round((line.at_s - before_s) / TURN_S)))
        before_s = line.at_s
        if isinstance(line, SubmitLine):
            sent[line.key] = turn
        elif isinstance(line, DoneLine) and line.status == 200:
            # However fast the real steps were: who waited for this answer does not come before it.
            turn = max(turn, sent.get(line.key, 0) + SLACK_TURNS + 2 * line.completion_tokens)
        script.setdefault(turn, []).extend(_messages_of(line, next(ops), ends))
        if isinstance(line, EngineLine):
            script[turn].extend(_restart(lines[:index], lines[index + 1 :], ops))
    return script


def _restart(before: Sequence[AnyLine], after: Sequence[AnyLine], ops: Iterator[int]) -> Iterator[wire.ToEngine]:
    """What the coming of an engine stands for, unless it is the first one."""
    if not any(isinstance(line, EngineLine) for line in before):
        return
    yield wire.CancelAll(next(ops))
    own = itertools.takewhile(lambda line: not isinstance(line, EngineLine), after)
    restored = [_place(line) for line in own if isinstance(line, RestoreLine)]
    opened = [_place(line) for line in before if isinstance(line, OpenLine)]
    opened += [(_tenant(line), f"s{line.child}") for line in before if isinstance(line, ForkLine)]
    for tenant, session in dict.fromkeys(opened):
        if (tenant, session) not in restored:
            yield wire.CloseSession(next(ops), session, tenant)
    yield wire.Flush(next(ops))


def _place(line: SessionLine) -> tuple[str, str]:
    return _tenant(line), f"s{line.session}"


def _messages_of(line: AnyLine, op: int, ends: Mapping[int, DoneLine]) -> Iterator[wire.ToEngine]:
    """What a line stands for: one message, or none where it only tells what came of others."""
    match line:
        case SubmitLine():
            yield _submit_of(line, ends.get(line.key))
        case CancelLine(if_waiting=False):
            yield wire.Cancel(line.key)
        case FlushLine():
            yield wire.Flush(op)
        case CancelAllLine():
            yield wire.CancelAll(op)
        case SessionLine():
            yield from _session_messages_of(line, op)


def _session_messages_of(line: SessionLine, op: int) -> Iterator[wire.ToEngine]:
    tenant, session = _place(line)
    match line:
        case RestoreLine():
            return
        case OpenLine():
            yield wire.OpenSession(
                op=op,
                session=session,
                tenant=tenant,
                branching=line.branching,
                reserve_tokens=line.reserve_tokens,
                idle_timeout_s=line.idle_timeout_s,
                tokens_max=line.tokens_max,
            )
        case CloseLine():
            yield wire.CloseSession(op, session, tenant)
        case ForkLine(child=child, at_tokens=at_tokens, at_turn=at_turn):
            yield wire.ForkSession(
                op=op, session=session, tenant=tenant, child=f"s{child}", at_tokens=at_tokens, at_turn=at_turn
            )
        case RewindLine(to_tokens=to_tokens, to_turn=to_turn):
            yield wire.RewindSession(op=op, session=session, tenant=tenant, to_tokens=to_tokens, to_turn=to_turn)
        case DropLine(turn=turn):
            yield wire.DropTurn(op, session, f"t{turn}", tenant)


def _submit_of(line: SubmitLine, end: DoneLine | None) -> wire.Submit:
    """A request that becomes as long as it did, by a limit where a stop ended it."""
    ended = end is not None and end.reason in ("stop", "length")
    new_tokens = end.completion_tokens if end is not None and ended else line.max_new_tokens
    branch = None
    if line.branch is not None:
        branch = wire.Branch(
            parent=None if line.branch.parent is None else f"t{line.branch.parent}",
            offset=line.branch.offset,
            replace=line.branch.replace,
            drop_previous_output=line.branch.drop_previous_output,
        )
    return wire.Submit(
        key=line.key,
        tokens=wire.pack_tokens(tokens_of(line.prefixes, line.tokens)),
        sampling=wire.Sampling(seed=line.key, temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True),
        tenant=_tenant(line),
        priority=line.priority,
        group=line.group,
        session=None if line.session is None else f"s{line.session}",
        rid="" if line.turn is None else f"t{line.turn}",
        branch=branch,
    )


def tokens_of(prefixes: Iterable[int], count: int) -> list[int]:
    """Tokens that are alike as far as the numbers are."""
    tokens: list[int] = []
    for prefix in prefixes:
        draw = Random(f"prefix {prefix}")
        tokens += [draw.randrange(SPECIAL_TOKENS, VOCABULARY) for _ in range(min(CHUNK_TOKENS, count - len(tokens)))]
    return tokens


def _tenant(line: SubmitLine | SessionLine) -> str:
    return f"tenant {line.tenant}"
