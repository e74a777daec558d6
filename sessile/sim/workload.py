"""What clients send next, by seed: prompts that share and repeat, sessions, cancels, closes, nonsense and looks."""

from random import Random
from typing import Any

import msgspec.structs

from sessile.contract import messages as wire
from sessile.sim.books import Books
from sessile.sim.grammar import KIND, NEVER
from sessile.sim.origins import context_of
from sessile.sim.records import RequestBook, SessionBook, corpus_of
from sessile.sim.world import BOS, World
from sessile.text.patterns import compile_pattern
from sessile.units import ceil_div

_LETTERS = b"abc"
_PATTERNS = [compile_pattern(source, param="") for source in ("a.b", "c{2,3}[ab]", "(ab|ba)+c", "[^a]{4}")]


class Workload:
    """Draws the messages of each turn of the loop. What it sends depends on its seed and the books alone."""

    def __init__(self, world: World, books: Books) -> None:
        self._world = world
        self._books = books
        self._draw = Random(f"workload {world.seed}")
        self._draft_draw = Random(f"drafts {world.seed}")
        self._grammar_draw = Random(f"grammars {world.seed}")
        self._stems = [self._tokens(world.temper.prompt_tokens_max) for _ in range(3)]
        self._sessions_wanted = min(world.temper.sessions_wanted, world.limits.sessions_max)
        self._intended: dict[str, list[int]] = {}
        """What a session's next turn will likely say: its client tries again, or said it elsewhere first."""
        self._echoed: str | None = None
        """A session whose next turn a plain request, `_ahead`, says first; `_doomed` is that turn."""
        self._ahead = 0
        self._doomed = 0
        self._keys = 0
        self._ops = 0

    def messages(self) -> list[wire.ToEngine]:
        """What comes in now, in order."""
        temper = self._world.temper
        sent: list[wire.ToEngine] = []
        if len(self._books.live) < self._live_max() and self._chance(temper.submit_rate):
            sent += self._submits()
        if self._books.just_idle and self._chance(0.5):
            sent.append(self._submit(self._draw.choice(self._books.just_idle)))
        drains = list(self._books.just_idle)
        if self._chance(temper.cancel_rate):
            cancel = self._cancel()
            sent.append(cancel)
            drains += self._left_by(cancel)
        if self._chance(temper.close_rate) and self._books.sessions:
            sent.append(self._close(self._draw.choice(list(self._books.sessions))))
        if self._chance(temper.cancel_all_rate):
            sent.append(wire.CancelAll(self._op()))
        if self._chance(temper.flush_rate):
            sent.append(wire.Flush(self._op()))
        is_quick = bool(drains) and temper.fork_rate > 0 and self._chance(0.5)
        if self._books.sessions and (is_quick or self._chance(temper.fork_rate)):
            sent.append(self._fork_or_rewind(drains))
        if self._chance(temper.replay_rate):
            sent += self._replay()
        if self._echoed or self._doomed in self._books.live:
            sent += self._follow_up()
        elif self._chance(temper.echo_rate):
            sent += self._echo()
        if self._chance(temper.nonsense_rate):
            sent.append(self._nonsense())
        if self._chance(temper.look_rate):
            sent += self._looks()
        return sent

    def _live_max(self) -> int:
        """Clients mostly stay below what the waiting line takes; now and then they storm it."""
        limits, temper = self._world.limits, self._world.temper
        return temper.live_max if self._chance(0.05) else min(temper.live_max, limits.rows_max + limits.queue_max)

    def _chance(self, rate: float) -> bool:
        return self._draw.random() < rate

    def _op(self) -> int:
        self._ops += 1
        return self._ops

    # -- submits --------------------------------------------------------------------------------------------------

    def _submits(self) -> list[wire.ToEngine]:
        burst = self._draw.choice([1, 1, 1, 2, 4])
        sent: list[wire.ToEngine] = []
        for _ in range(burst):
            if not self._chance(self._world.temper.session_share):
                sent += self._plain()
            elif len(self._books.sessions) < self._sessions_wanted:
                sent.append(self._open())
            elif idle := [session for session in self._books.sessions.values() if session.turn is None]:
                session = self._draw.choice(idle)
                is_full = len(session.history) >= self._longest(session) - 1 or len(session.nodes) > 12
                ends = is_full and self._chance(0.8)
                sent.append(self._close(session.id) if ends else self._submit(session.id))
        return sent

    def _plain(self) -> list[wire.ToEngine]:
        """A prompt, or a group of several that are the same; their sampling, wishes and ends differ."""
        first = self._submit(None)
        if not self._chance(self._world.temper.group_rate):
            return [first]
        prompt = wire.unpack_tokens(first.tokens).tolist()
        others = [self._submit(None, prompt) for _ in range(self._draw.choice([1, 2, 7]))]
        alike = [msgspec.structs.replace(each, group=first.key, tenant=first.tenant) for each in [first, *others]]
        if self._chance(0.02):
            alike[-1] = msgspec.structs.replace(alike[-1], tokens=first.tokens + wire.pack_tokens([0]))
        self._books.totals["groups"] += 1
        return list(alike)

    def _tenant_of(self, session_id: str) -> str:
        """Who uses a session id: always the same tenant, so that ids are not mixed up by their clients."""
        tenants = self._world.limits.tenants
        return tenants[sum(session_id.encode()) % len(tenants)].name if tenants else ""

    def _any_tenant(self) -> str:
        tenants = self._world.limits.tenants
        return self._draw.choice(tenants).name if tenants else ""

    def _close(self, session_id: str) -> wire.CloseSession:
        return wire.CloseSession(self._op(), session_id, self._tenant_of(session_id))

    def _open(self) -> wire.OpenSession:
        draw, temper, limits = self._draw, self._world.temper, self._world.limits
        session_id = f"s{draw.randrange(2 * temper.sessions_wanted)}"
        is_branching = self._chance(temper.branch_share)
        reserves = self._chance(temper.reserve_rate) and (not is_branching or self._chance(0.1))
        longest_pages = ceil_div(limits.sequence_tokens_max + limits.drafts_max, limits.page_size)
        room_tokens = max(1, (limits.pages_total - 1 - longest_pages) * limits.page_size)
        room_tokens = min(room_tokens, limits.sequence_tokens_max)
        reserved = draw.choice([1, draw.randint(1, room_tokens), room_tokens, room_tokens + 1])
        return wire.OpenSession(
            op=self._op(),
            session=session_id,
            tenant=self._tenant_of(session_id),
            branching=is_branching,
            reserve_tokens=reserved if reserves else 0,
            idle_timeout_s=draw.choice([None, 0.03, 0.3, 2.0]) if temper.timeouts else None,
            tokens_max=draw.choice([None, None, None, self._world.facts.context_tokens // 2]),
            metadata={"colour": "blue"} if self._chance(0.1) else {},
        )

    def _submit(self, session_id: str | None, said: list[int] | None = None) -> wire.Submit:
        self._keys += 1
        draw, temper = self._draw, self._world.temper
        session = self._books.sessions.get(session_id) if session_id is not None else None
        if said is not None:
            tokens = said
        else:
            tokens = self._turn_tokens(session) if session else self._prompt()
        branches = session is not None and session.branching
        is_named = branches or (session is not None and self._chance(min(1.0, 5 * temper.replay_rate)))
        sampling = self._sampling(draw.choice([0, 1, 1, 2, 3, 5, 8, 50]) if session else self._allowance())
        grammar = self._grammar()
        if grammar is not None and self._grammar_draw.random() < 0.95:
            sampling = msgspec.structs.replace(sampling, ignore_eos=False, min_new_tokens=0)
        return wire.Submit(
            key=self._keys,
            tokens=wire.pack_tokens(tokens),
            sampling=sampling,
            grammar=grammar,
            tenant=self._any_tenant() if session_id is None else self._tenant_of(session_id),
            priority=draw.choice([0, 0, -1, 5]) if temper.priorities else 0,
            session=session_id,
            rid=self._turn_name(session) if is_named else "",
            branch=self._branch(session) if branches else None,
            expect_tokens=self._expectation(session) if session else -1,
            logprobs=draw.choice([0, 2]) if self._chance(temper.logprob_rate) else -1,
            prompt_logprobs_from=draw.choice([0, 1, 5]) if self._chance(temper.logprob_rate) else -1,
            **self._wish(),
        )

    def _wish(self) -> dict[str, Any]:
        """What a request wants of drafts: mostly those that its world knows, sometimes its own, few or none."""
        draw, limits = self._draft_draw, self._world.limits
        if not limits.drafts_max:
            return {}
        kind = draw.random()
        wish: dict[str, Any] = {"corpora": (corpus_of(self._keys),)} if kind < 0.8 else {}
        if kind < 0.01:
            wish["corpora"] = ("nobody's",)
        if kind > 0.95:
            wish["speculate"] = draw.choice([True, False])
        if draw.random() < 0.1:
            wish["drafts_max"] = draw.randint(0, limits.drafts_max + 1)
        wish["remember"] = draw.random() < 0.2
        return wish

    def _grammar(self) -> wire.Grammar | None:
        """Now and then a rule for the output; seldom one that cannot be followed to its end."""
        draw = self._grammar_draw
        if draw.random() >= self._world.temper.grammar_rate:
            return None
        strays_at = draw.choice([1, 3, 9]) if draw.random() < 0.05 else NEVER
        return wire.Grammar(KIND, f"{draw.getrandbits(32)} {draw.choice([0, 1, 3, 8, 20, 60])} {strays_at}")

    def _turn_name(self, session: SessionBook | None) -> str:
        """Mostly a fresh one; now and then one that is in use."""
        if session is not None and session.nodes and self._chance(0.03):
            return self._draw.choice(list(session.nodes))
        return f"t{self._keys}"

    def _branch(self, session: SessionBook | None) -> wire.Branch | None:
        """Where a turn goes on: mostly from a finished turn, at its end; seldom from one that runs or is unknown."""
        assert session is not None
        draw, nodes = self._draw, session.nodes
        finished = [node.rid for node in nodes.values() if node.turn is None]
        replaces = self._chance(0.1)
        if not nodes or self._chance(0.15):
            return wire.Branch(replace=True) if replaces else None
        parent = draw.choice(finished if finished and self._chance(0.9) else list(nodes))
        above = [node.parent.rid for node in nodes.values() if node.turn is not None and node.parent is not None]
        if replaces and above and self._chance(0.7):
            parent = draw.choice(above)  # Something that runs has to end.
        length = len(context_of(nodes[parent]))
        return wire.Branch(
            parent="nobody" if self._chance(0.02) else parent,
            offset=draw.randint(-length - 1, length + 1) if self._chance(0.2) else 0,
            replace=replaces,
            drop_previous_output=self._chance(0.1),
        )

    def _replay(self) -> list[wire.ToEngine]:
        """Send a finished turn again, as a client does whose reply was lost; sometimes it remembers it wrongly."""
        replies = [line.reply for session in self._books.sessions.values() for line in session.lines if line.reply]
        if not replies:
            return []
        reply = self._draw.choice(replies).submit
        self._keys += 1
        again = wire.Submit(
            key=self._keys,
            tokens=reply.tokens if self._chance(0.9) else wire.pack_tokens(self._tokens(3)),
            sampling=self._sampling(3),
            tenant=reply.tenant,
            session=reply.session,
            rid=reply.rid,
            branch=reply.branch,
        )
        return [again]

    def _prompt(self) -> list[int]:
        draw, temper = self._draw, self._world.temper
        earlier = [request for request in self._books.live.values() if request.prompt]
        if self._chance(temper.shared_prompts):
            if self._books.sessions and self._chance(0.3):
                return self._resent(draw.choice(list(self._books.sessions.values())))
            if earlier and self._chance(0.5):
                request = draw.choice(earlier)
                return [*request.prompt, *request.output][: draw.choice([None, len(request.prompt)])]
            stem = draw.choice(self._stems)
            return [*stem[: draw.randint(1, len(stem))], *self._tokens(4)][: temper.prompt_tokens_max]
        if self._chance(0.05):
            longest = self._world.limits.sequence_tokens_max
            return self._exactly(max(1, longest + draw.choice([-2, -1, 0, 1])))
        return self._tokens(temper.prompt_tokens_max)

    def _resent(self, session: SessionBook) -> list[int]:
        """A session's conversation and its next turn as a plain prompt: the turn may find the tree ahead of it."""
        turn = self._intended.setdefault(session.id, self._tokens(8))
        return [*session.history, *turn][: self._world.limits.sequence_tokens_max - 1]

    def _expectation(self, session: SessionBook) -> int:
        """What a client believes the history's length to be: mostly nothing, sometimes the truth, seldom wrong."""
        kind = self._draw.random()
        return -1 if kind < 0.8 else len(session.history) + (kind > 0.97)

    def _left_by(self, cancel: wire.Cancel) -> list[str]:
        """The session whose turn this cancels, if it is one: its client may go on at once."""
        request = self._books.live.get(cancel.key)
        return [request.session.id] if request is not None and request.session and not request.session.root else []

    def _fork_or_rewind(self, drains: list[str]) -> wire.ToEngine:
        """At the end, at a token, at a turn; now and then where there is no place, or while a turn is in flight.

        A branching session has a turn dropped instead. drains: sessions whose last turn may still drain.
        """
        draw, sessions = self._draw, list(self._books.sessions.values())
        branching = [session for session in sessions if session.nodes]
        if branching and self._chance(0.4):
            return self._drop(draw.choice(branching))
        idle = [session for session in sessions if session.turn is None and len(session.history) > 1]
        session = draw.choice(idle if idle and self._chance(0.8) else sessions)
        known = [name for name in drains if name in self._books.sessions]
        if known and self._chance(0.7):
            session = self._books.sessions[draw.choice(known)]
        tokens = draw.choice([None, None, draw.randint(0, len(session.history)), len(session.history) + 1])
        turn = draw.randint(0, len(session.turn_ends) + 1) if tokens is None and self._chance(0.4) else None
        if self._chance(0.5):
            return wire.RewindSession(
                op=self._op(), session=session.id, tenant=session.tenant, to_tokens=tokens, to_turn=turn
            )
        names = [f"s{n}" for n in range(3 * self._world.temper.sessions_wanted + 3)]
        own = [name for name in names if self._tenant_of(name) == session.tenant]
        unused = [name for name in own if name not in self._books.sessions]
        child = draw.choice(unused if unused and self._chance(0.9) else own)
        return wire.ForkSession(
            op=self._op(), session=session.id, child=child, tenant=session.tenant, at_tokens=tokens, at_turn=turn
        )

    def _drop(self, session: SessionBook) -> wire.DropTurn:
        """Mostly a turn that is there, whether it runs or not."""
        rid = "nobody" if self._chance(0.05) else self._draw.choice(list(session.nodes))
        return wire.DropTurn(self._op(), session.id, rid, session.tenant)

    def _echo(self) -> list[wire.ToEngine]:
        """Make a session cold if that is possible now, and let a plain prompt run ahead of its next turn."""
        idle = [s.id for s in self._books.sessions.values() if s.turn is None and len(s.history) > 1]
        if not idle:
            return []
        self._echoed = self._draw.choice(idle)
        session = self._books.sessions[self._echoed]
        ahead = msgspec.structs.replace(self._submit(None, self._resent(session)), tenant=session.tenant)
        self._ahead = ahead.key
        return [wire.Flush(self._op()), ahead]

    def _follow_up(self) -> list[wire.ToEngine]:
        """Send the turn that an echo ran ahead of, and cancel it before it ends."""
        if self._echoed and self._ahead not in self._books.live:
            turn = self._submit(self._echoed, self._intended.get(self._echoed))
            self._echoed, self._doomed = None, turn.key
            return [turn]
        if self._doomed in self._books.live and self._chance(0.4):
            return [wire.Cancel(self._doomed)]
        return []

    def _turn_tokens(self, session: SessionBook) -> list[int]:
        """New tokens of a turn: often few, sometimes none, a lone BOS, or just as many as still fit."""
        draw = self._draw
        length = len(session.history)
        longest = self._longest(session)
        if not length:
            return self._prompt()
        if session.id in self._intended and self._chance(0.7):
            return self._intended[session.id] if self._chance(0.5) else self._intended.pop(session.id)
        kind = draw.random()
        if kind < 0.05:
            return []
        if kind < 0.1:
            return [BOS] if draw.random() < 0.5 else [BOS, *self._tokens(3)]
        if kind < 0.2:
            return self._exactly(max(0, longest - length + draw.choice([-2, -1, 0, 1])))
        room = longest - length
        return self._tokens(min(self._world.temper.prompt_tokens_max, draw.choice([1, 3, 12]), max(1, room)))

    def _longest(self, session: SessionBook) -> int:
        return min(self._world.limits.sequence_tokens_max, session.tokens_max)

    def _tokens(self, longest: int) -> list[int]:
        tokens = self._exactly(self._draw.randint(1, max(1, longest)))
        return [BOS, *tokens[1:]] if self._chance(0.1) else tokens

    def _exactly(self, count: int) -> list[int]:
        vocab_size = self._world.facts.vocab_size
        return [self._draw.randrange(vocab_size) for _ in range(count)]

    def _allowance(self) -> int | None:
        return self._draw.choice([0, 1, 2, 5, 5, 8, 8, 20, 50, None, 1_000_000])

    def _sampling(self, max_new_tokens: int | None) -> wire.Sampling:
        draw, variety = self._draw, self._world.temper.sampling_variety
        settings: dict[str, object] = {}
        if self._chance(variety):
            settings["top_p"] = draw.choice([0.5, 0.9])
            settings["top_k"] = draw.choice([0, 7])
            settings["min_p"] = draw.choice([0.0, 0.05])
        if self._chance(variety):
            settings["repetition_penalty"] = draw.choice([1.0, 1.3])
            settings["frequency_penalty"] = draw.choice([0.0, 0.5])
            settings["presence_penalty"] = draw.choice([0.0, -0.5])
        if self._chance(variety):
            settings["logit_bias"] = ((draw.randrange(self._world.facts.vocab_size), draw.choice([-5.0, 2.5])),)
        if self._chance(variety):
            settings["min_new_tokens"] = draw.choice([1, 3, 6])
        if self._chance(variety):
            settings["ignore_eos"] = True
        if self._chance(variety):
            settings["stop_token_ids"] = tuple(draw.sample(range(4, 16), draw.choice([1, 2, 6])))
        if self._chance(variety):
            settings["stop"] = tuple(self._stop_string() for _ in range(draw.choice([1, 1, 3])))
            settings["skip_special_tokens"] = self._chance(0.5)
        if self._chance(variety):
            settings["stop_patterns"] = tuple(draw.sample(_PATTERNS, draw.choice([1, 1, 2])))
        return wire.Sampling(
            seed=(self._keys * 0x9E3779B97F4A7C15) & (2**64 - 1),
            temperature=draw.choice([0.0, 0.0, 0.7]),
            max_new_tokens=max_new_tokens,
            **settings,  # type: ignore[arg-type]
        )

    def _stop_string(self) -> bytes:
        if self._chance(0.1):
            return b"</s>"
        return bytes(self._draw.choice(_LETTERS) for _ in range(self._draw.choice([1, 2, 3, 4])))

    # -- everything else ------------------------------------------------------------------------------------------

    def _cancel(self) -> wire.Cancel:
        requests: list[RequestBook] = list(self._books.live.values())
        if not requests or self._chance(0.05):
            return wire.Cancel(self._draw.randint(0, self._keys + 1))
        # The newest are queued or in prefill, the oldest decode: both ends deserve to be hit.
        chosen = self._draw.choice([requests[0], requests[-1], self._draw.choice(requests)])
        if chosen.session:
            self._intended[chosen.session.id] = wire.unpack_tokens(chosen.submit.tokens).tolist()
        return wire.Cancel(chosen.key, self._draw.choice(["aborted by the client", "client disconnected"]))

    def _nonsense(self) -> wire.ToEngine:
        draw, sessions = self._draw, list(self._books.sessions)
        known = draw.choice(sessions) if sessions else "s0"
        busy = [session.id for session in self._books.sessions.values() if session.turn]
        candidates: list[wire.ToEngine] = [
            self._submit("nobody"),
            msgspec.structs.replace(self._submit(known), group=self._keys),
            self._submit(draw.choice(busy) if busy else None),
            self._submit(known),
            wire.CloseSession(self._op(), "nobody"),
            self._close(known),
            wire.CloseSession(self._op(), known, "mallory"),
            msgspec.structs.replace(self._submit(known), tenant="mallory"),
            wire.RewindSession(op=self._op(), session=known, tenant="mallory", to_tokens=0),
            wire.GetSession(self._op(), "nobody"),
            wire.SessionTokens(self._op(), "nobody"),
            wire.OpenSession(op=self._op(), session=known, tenant=self._tenant_of(known)),
            wire.Cancel(0),
            wire.Flush(self._op()),
        ]
        return draw.choice(candidates)

    def _looks(self) -> list[wire.ToEngine]:
        listing = wire.ListSessions(self._op(), None, 3, self._any_tenant())
        looks: list[wire.ToEngine] = [wire.GetStats(self._op()), listing]
        for session in list(self._books.sessions.values())[:4]:
            looks.append(wire.GetSession(self._op(), session.id, session.tenant))
            looks.append(wire.SessionTokens(self._op(), session.id, session.tenant))
        return looks
