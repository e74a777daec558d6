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
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from sessile.contract import messages as wire
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits, TenantPolicy
from sessile.errors import StartupError
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
Line = Mapping[str, Any]


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


def read_log(path: Path) -> list[Line]:
    """The lines of a log; one that was cut off in the middle, as by a full disk, is left out. Raises StartupError."""
    lines: list[Line] = []
    try:
        for text in path.read_text("utf-8", "replace").splitlines():
            line = _line_of(text)
            if line is not None:
                lines.append(line)
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error
    if not any(line["kind"] == "engine" for line in lines):
        raise StartupError(f"{path} is no request log: no line says what the engine was")
    return lines


def _line_of(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "kind" in line and "at_s" in line else None


def replay(lines: list[Line]) -> Report:
    """Run the lines of a log."""
    engine = next(line for line in lines if line["kind"] == "engine")
    tenants = sorted({_tenant(line) for line in lines if "tenant" in line})
    return Simulation(world_of(engine, tenants), script_of(lines)).run_script()


def world_of(engine: Line, tenants: Iterable[str]) -> World:
    """The machine of the log, without drafts and without limits of tenants."""
    context_tokens = engine["context_tokens"]
    limits = Limits(
        pages_total=engine["pages_total"],
        page_size=engine["page_size"],
        rows_max=engine["rows_max"],
        context_tokens=context_tokens,
        chunk_tokens=engine["chunk_tokens"],
        mixed_chunk_tokens=engine["chunk_tokens"],
        queue_max=max(1, engine["queue_max"]),
        audit_level=1,
        tenants=tuple(TenantPolicy(name) for name in tenants),
    )
    texts = tuple(bytes([byte]) for byte in range(VOCABULARY))
    facts = ModelFacts(vocab_size=VOCABULARY, context_tokens=context_tokens, eos_ids=(), token_bytes=texts)
    temper = quiet_temper(tick_ns_max=int(2 * TURN_S * 1e9))
    return World(seed=0, limits=limits, facts=facts, overlap=True, strict=False, temper=temper)


def script_of(lines: Iterable[Line]) -> dict[int, list[wire.ToEngine]]:
    """The messages of a log by turn of the loop."""
    lines = list(lines)
    ends = {line["key"]: line for line in lines if line["kind"] == "done"}
    script: dict[int, list[wire.ToEngine]] = {}
    turn, before_s = 1, 0.0
    sent: dict[int, int] = {}
    ops = itertools.count(1)
    for index, line in enumerate(lines):
        turn += min(PAUSE_TURNS_MAX, max(0, round((line["at_s"] - before_s) / TURN_S)))
        before_s = line["at_s"]
        if line["kind"] == "submit":
            sent[line["key"]] = turn
        elif line["kind"] == "done" and line["status"] == 200:
            # However fast the real steps were: who waited for this answer does not come before it.
            turn = max(turn, sent.get(line["key"], 0) + SLACK_TURNS + 2 * line["completion_tokens"])
        script.setdefault(turn, []).extend(_messages_of(line, next(ops), ends))
        if line["kind"] == "engine":
            script[turn].extend(_restart(lines[:index], lines[index + 1 :], ops))
    return script


def _restart(before: list[Line], after: list[Line], ops: Iterator[int]) -> Iterator[wire.ToEngine]:
    """What the coming of an engine stands for, unless it is the first one."""
    if not any(line["kind"] == "engine" for line in before):
        return
    yield wire.CancelAll(next(ops))
    own = itertools.takewhile(lambda line: line["kind"] != "engine", after)
    restored = [_place(line) for line in own if line["kind"] == "restore"]
    opened = [_place(line) for line in before if line["kind"] in ("open", "restore")]
    opened += [(_tenant(line), f"s{line['child']}") for line in before if line["kind"] == "fork"]
    for tenant, session in dict.fromkeys(opened):
        if (tenant, session) not in restored:
            yield wire.CloseSession(next(ops), session, tenant)
    yield wire.Flush(next(ops))


def _place(line: Line) -> tuple[str, str]:
    return _tenant(line), f"s{line['session']}"


def _messages_of(line: Line, op: int, ends: Mapping[int, Line]) -> Iterator[wire.ToEngine]:
    """What a line stands for: one message, or none where it only tells what came of others."""
    place: dict[str, Any] = {"session": f"s{line.get('session')}", "tenant": _tenant(line)}
    match line["kind"]:
        case "submit":
            yield _submit_of(line, ends.get(line["key"]))
        case "cancel" if not line["if_waiting"]:
            yield wire.Cancel(line["key"])
        case "open":
            names = ("branching", "reserve_tokens", "idle_timeout_s", "tokens_max")
            yield wire.OpenSession(op=op, **place, **{name: line[name] for name in names})
        case "close":
            yield wire.CloseSession(op, place["session"], place["tenant"])
        case "fork":
            child = f"s{line['child']}"
            yield wire.ForkSession(
                op=op, **place, child=child, at_tokens=line["at_tokens"], at_turn=line["at_turn"]
            )
        case "rewind":
            yield wire.RewindSession(op=op, **place, to_tokens=line["to_tokens"], to_turn=line["to_turn"])
        case "drop":
            yield wire.DropTurn(op, place["session"], f"t{line['turn']}", place["tenant"])
        case "flush":
            yield wire.Flush(op)
        case "cancel all":
            yield wire.CancelAll(op)


def _submit_of(line: Line, end: Line | None) -> wire.Submit:
    """A request that becomes as long as it did, by a limit where a stop ended it."""
    branch, turn = line["branch"], line["turn"]
    ended = end is not None and end["reason"] in ("stop", "length")
    new_tokens = end["completion_tokens"] if end is not None and ended else line["max_new_tokens"]
    return wire.Submit(
        key=line["key"],
        tokens=wire.pack_tokens(tokens_of(line["prefixes"], line["tokens"])),
        sampling=wire.Sampling(seed=line["key"], temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True),
        tenant=_tenant(line),
        priority=line["priority"],
        group=line["group"],
        session=None if line["session"] is None else f"s{line['session']}",
        rid="" if turn is None else f"t{turn}",
        branch=None
        if branch is None
        else wire.Branch(
            parent=None if branch["parent"] is None else f"t{branch['parent']}",
            offset=branch["offset"],
            replace=branch["replace"],
            drop_previous_output=branch["drop_previous_output"],
        ),
    )


def tokens_of(prefixes: Iterable[int], count: int) -> list[int]:
    """Tokens that are alike as far as the numbers are."""
    tokens: list[int] = []
    for prefix in prefixes:
        draw = Random(f"prefix {prefix}")
        tokens += [draw.randrange(SPECIAL_TOKENS, VOCABULARY) for _ in range(min(CHUNK_TOKENS, count - len(tokens)))]
    return tokens


def _tenant(line: Line) -> str:
    return f"tenant {line['tenant']}" if "tenant" in line else ""
