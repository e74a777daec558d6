"""What clients may expect, kept from the messages they sent and got and from nothing else.

The books are a second, naive implementation of the session contract: histories are Python lists, a turn that ends as
abort or error leaves no trace, and every token is the reference's. Anything that differs raises CheckFailed.
"""

from collections import Counter

import numpy as np

from sessile.contract import messages as wire
from sessile.contract.corpora import CorpusOperation
from sessile.sim import hashing, replies
from sessile.sim.origins import Origin, context_of, descendants, drop_node, origin_of, place_of
from sessile.sim.records import RequestBook, SessionBook, check, fail
from sessile.sim.reference import Speaker, ending_of
from sessile.sim.refusals import count_lines, refusals_of_prompt, refusals_of_room, refusals_of_tenant, refusals_of_wish
from sessile.sim.telling import check_logprobs, check_repeated, check_replayed
from sessile.sim.world import World
from sessile.units import ceil_div

Operation = (
    wire.CancelAll
    | wire.OpenSession
    | wire.CloseSession
    | wire.ForkSession
    | wire.RewindSession
    | wire.DropTurn
    | wire.GetSession
    | wire.ListSessions
    | wire.SessionTokens
    | wire.Flush
    | wire.GetStats
)
"""What is answered by one Reply."""


class Books:
    """All open sessions and all requests of one simulation, and the ops that await a reply."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.now_ns = 0
        self._settled_ns = -1
        """The time at which nothing was due; -1 since something happened."""
        self.sessions: dict[str, SessionBook] = {}
        self.requests: dict[int, RequestBook] = {}
        self.live: dict[int, RequestBook] = {}
        self.by_seed: dict[int, RequestBook] = {}
        self.is_unsure = False
        """Whether the last message's outcome is open until its effects were taken."""
        self.just_idle: list[str] = []
        """Sessions whose turn ended in the last effects: their clients may be quick."""
        self.totals: Counter[str] = Counter()
        self._reclaims_at_last_end = 0
        self._awaited: dict[int, replies.Verdict] = {}
        self._flushes: set[int] = set()
        """Flushes without a reply: they may wait until the last rows have drained."""
        self._due_gone: dict[str, int] = {}
        self._undecided: tuple[RequestBook, SessionBook, Origin] | None = None
        """A branching turn that the waiting line may have refused."""

    # -- what clients send ----------------------------------------------------------------------------------------

    def note_sent(self, message: wire.ToEngine, waiting_requests: int) -> None:
        """Take a message into account before the machine gets it. waiting_requests: as the machine counts them."""
        self.just_idle = []
        self.is_unsure = False
        self._settled_ns = -1
        if isinstance(message, wire.Submit):
            self._note_submit(message, waiting_requests)
        elif isinstance(message, wire.Cancel):
            self._note_cancel(message.key)
        else:
            assert not isinstance(message, wire.Shutdown | wire.GetPool | wire.RestoreSession | CorpusOperation)
            assert message.op not in self._awaited
            self._awaited[message.op] = self._note_op(message)
            if isinstance(message, wire.Flush):
                self._flushes.add(message.op)
        self.totals[type(message).__name__] += 1

    def _note_op(self, message: Operation) -> replies.Verdict:
        """Apply an operation to the books; returns what its reply has to say, as of this very moment."""
        if isinstance(message, wire.CancelAll):
            keys = [key for key, request in self.live.items() if not request.is_over]
            for key in keys:
                self._note_cancel(key)
            return replies.outcome(cancelled=len(keys))
        if isinstance(message, wire.OpenSession):
            return self._note_open(message)
        if isinstance(message, wire.Flush):
            return self._note_flush()
        if isinstance(message, wire.ListSessions):
            own = [session for session in self.sessions.values() if session.tenant == message.tenant]
            if message.after is not None and self._find(message.tenant, message.after) is None:
                return self._refused(404)
            return replies.page_of(message, own)
        if isinstance(message, wire.GetStats):
            return replies.stats_of(message)
        session = self._find(message.tenant, message.session)
        if session is None:
            return self._refused(404)
        if isinstance(message, wire.ForkSession):
            return self._note_fork(message, session)
        if isinstance(message, wire.RewindSession):
            return self._note_rewind(message, session)
        if isinstance(message, wire.DropTurn):
            refusals = drop_node(session, message.rid)
            self.totals["dropped turns"] += not refusals
            return self._refused(*refusals) if refusals else replies.outcome()
        if isinstance(message, wire.GetSession):
            return replies.view_of(session)
        if isinstance(message, wire.SessionTokens) and session.branching:
            return self._refused(400)
        if isinstance(message, wire.SessionTokens):
            return replies.outcome(tokens=wire.pack_tokens(session.history))
        return self._note_close(session)

    def _note_submit(self, submit: wire.Submit, waiting_requests: int) -> None:
        session = self._find(submit.tenant, submit.session) if submit.session is not None else None
        origin = origin_of(submit, session, count_lines(self.sessions.values()), self._world.limits.sessions_max)
        if origin.replays is not None:
            self._note_replay(submit, origin.replays)
            return
        delta = wire.unpack_tokens(submit.tokens).tolist()
        if origin.base and delta and delta[0] == self._world.facts.bos_id:
            delta = delta[1:]
        prompt = [*origin.base, *delta]
        limits = self._world.limits
        longest = min(limits.sequence_tokens_max, session.tokens_max) if session else limits.sequence_tokens_max
        refusals = frozenset(
            origin.refusals
            | refusals_of_prompt(prompt, longest, submit.sampling.max_new_tokens)
            | refusals_of_tenant(submit, len(delta), limits, self.live.values(), self.sessions.values())
            | refusals_of_wish(submit, limits, self.live.values())
        )
        wanted = submit.sampling.max_new_tokens
        room = max(0, longest - len(prompt))
        waiting_tokens = sum(len(request.prompt) + len(request.output) for request in self.live.values())
        crowded = waiting_requests >= limits.queue_max or waiting_tokens + len(prompt) > limits.queue_tokens_max
        request = RequestBook(
            submit=submit,
            session=session,
            prompt=prompt,
            output_limit=room if wanted is None else min(wanted, room),
            speaker=Speaker(prompt if not refusals else (), submit.sampling, self._world.facts, submit.grammar),
            refusals=refusals,
            excuses=frozenset({429} if crowded else ()),
            reclaim_mark=session.reclaim_mark if session else None,
            scored_to=max(submit.prompt_logprobs_from, 1, len(origin.base)),
            input_tokens=len(delta),
        )
        self._note_live(request)
        self.is_unsure = bool(request.excuses)
        if session is None or refusals:
            return
        if not session.branching:
            session.turn = request
        elif self.is_unsure:
            self._undecided = (request, session, origin)
        else:
            self._branch(request, session, origin)

    def _note_live(self, request: RequestBook) -> None:
        submit = request.submit
        assert submit.key not in self.requests, "a client used a key twice"
        self.requests[submit.key] = self.live[submit.key] = self.by_seed[submit.sampling.seed] = request

    def _note_replay(self, submit: wire.Submit, replays: RequestBook) -> None:
        """A turn that was sent again: its reply once more, at once, and nothing else."""
        self._note_live(
            RequestBook(
                submit=submit,
                session=None,
                prompt=replays.prompt,
                output_limit=replays.output_limit,
                speaker=Speaker((), submit.sampling, self._world.facts),
                refusals=frozenset(),
                excuses=frozenset(),
                replays=replays,
            )
        )

    def _branch(self, request: RequestBook, session: SessionBook, origin: Origin) -> None:
        """The turn is in: it gets a node of its own, and those that it replaces are gone."""
        branch = request.submit.branch
        if branch is not None and branch.replace:
            parent = origin.parent
            if parent is not None and parent.turn is not None:
                turn = parent.turn
                turn.cancelled = turn.kept = True
                parent.history, parent.input_end = context_of(parent), len(turn.prompt)
                parent.turn_ends = [len(parent.history)]
                parent.turn = None
                parent.reply = turn if turn.submit.rid else None
                self.totals["replaced parents"] += 1
            for node in descendants(session, parent):
                if node.turn is not None:
                    self._note_cancel(node.turn.key)
                else:
                    del session.nodes[node.rid]
                self.totals["replaced"] += 1
        node = SessionBook(
            id=session.id,
            opened_ns=self.now_ns,
            idle_since_ns=self.now_ns,
            idle_timeout_ns=None,
            tokens_max=session.tokens_max,
            metadata={},
            history=origin.base,
            turn=request,
            tenant=session.tenant,
            root=session,
            rid=request.submit.rid,
            parent=origin.parent,
        )
        session.nodes[node.rid] = node
        request.session = node
        self.totals["branches"] += 1

    def _find(self, tenant: str, session_id: str) -> SessionBook | None:
        """A session, if it is this tenant's."""
        session = self.sessions.get(session_id)
        return session if session is not None and session.tenant == tenant else None

    def _note_cancel(self, key: int) -> None:
        request = self.live.get(key)
        if request is None or request.is_over:
            return
        request.cancelled = True
        self._release_turn(request)

    def _release_turn(self, request: RequestBook) -> None:
        """The turn ends here: whatever comes next may use the session, or close it."""
        session = request.session
        if session is None or session.turn is not request:
            return
        session.turn = None
        if session.root is not None:
            if not session.turn_ends:
                del session.root.nodes[session.rid]
            session = session.root
        session.idle_since_ns = self.now_ns
        if session.closing and not session.in_flight:
            del self.sessions[session.id]
            self._due_gone[session.id] = self._due_gone.get(session.id, 0) + 1

    def _refused(self, *statuses: int) -> replies.Verdict:
        self.totals[f"refused op {statuses[0]}"] += 1
        return replies.refused(*statuses)

    def _note_open(self, message: wire.OpenSession) -> replies.Verdict:
        limits = self._world.limits
        refusals = refusals_of_room(message.tenant, limits, self.sessions.values())
        refusals += [400] * (message.session in self.sessions)
        tokens_max = min(message.tokens_max or limits.sequence_tokens_max, limits.sequence_tokens_max)
        reserved_pages = ceil_div(message.reserve_tokens, limits.page_size)
        if reserved_pages:
            reserved = sum([session.reserved_pages for session in self.sessions.values()])
            longest_pages = ceil_div(limits.sequence_tokens_max + limits.drafts_max, limits.page_size)
            refusals += [400] * (message.branching or message.reserve_tokens > tokens_max)
            refusals += [429] * (reserved + reserved_pages > limits.pages_total - 1 - longest_pages)
        if refusals:
            return self._refused(*refusals)
        session = SessionBook(
            id=message.session,
            opened_ns=self.now_ns,
            idle_since_ns=self.now_ns,
            idle_timeout_ns=None if message.idle_timeout_s is None else round(message.idle_timeout_s * 1e9),
            tokens_max=tokens_max,
            metadata=message.metadata,
            tenant=message.tenant,
            branching=message.branching,
            reserved_pages=reserved_pages,
        )
        self.sessions[session.id] = session
        self.totals["branching sessions"] += session.branching
        self.totals["reservations"] += reserved_pages > 0
        return replies.view_of(session)

    def _note_close(self, session: SessionBook) -> replies.Verdict:
        if not session.in_flight:
            del self.sessions[session.id]
            return replies.outcome(closed=True, deferred=False)
        session.closing = True
        return replies.outcome(closed=False, deferred=True)

    def _note_fork(self, message: wire.ForkSession, parent: SessionBook) -> replies.Verdict:
        tokens = place_of(parent, message.at_tokens, message.at_turn)
        refusals = self._refusals_of_busy(parent)
        refusals += refusals_of_room(message.tenant, self._world.limits, self.sessions.values())
        if tokens is None or message.child in self.sessions:
            refusals.append(400)
        if tokens is None or refusals:
            return self._refused(*refusals)
        child = SessionBook(
            id=message.child,
            opened_ns=self.now_ns,
            idle_since_ns=self.now_ns,
            idle_timeout_ns=parent.idle_timeout_ns,
            tokens_max=parent.tokens_max,
            metadata=parent.metadata,
            history=parent.history[:tokens],
            tenant=parent.tenant,
            turn_ends=[end for end in parent.turn_ends if end <= tokens],
        )
        self.sessions[child.id] = child
        self.totals["forks"] += 1
        return replies.view_of(child)

    def _note_rewind(self, message: wire.RewindSession, session: SessionBook) -> replies.Verdict:
        tokens = place_of(session, message.to_tokens, message.to_turn)
        refusals = self._refusals_of_busy(session)
        if tokens is None or (message.to_tokens is None and message.to_turn is None):
            refusals.append(400)
        if tokens is None or refusals:
            return self._refused(*refusals)
        session.history = session.history[:tokens]
        session.turn_ends = [end for end in session.turn_ends if end <= tokens]
        session.lost_part = True
        session.reply = None
        self.totals["rewinds"] += 1
        return replies.view_of(session)

    def _refusals_of_busy(self, session: SessionBook) -> list[int]:
        return [410] * session.closing + [409] * session.in_flight + [400] * session.branching

    def _note_flush(self) -> replies.Verdict:
        if any(not request.is_over for request in self.live.values()):
            return self._refused(400)
        for session in self.sessions.values():
            for line in session.lines:
                line.reclaim_mark = None
        return replies.flushed()

    # -- what clients get -----------------------------------------------------------------------------------------

    def note_batch(self, batch: wire.Batch, reclaims: int, faulty_seeds: set[int]) -> None:
        """Check all effects of one batch. reclaims: evictions and demotions so far; faulty_seeds: rows that failed."""
        self._settled_ns = -1
        self._decide({done.key for done in batch.done if done.reason == "error" and 400 <= done.status < 500})
        self._note_scores(batch)
        delivered = self._note_deltas(batch)
        for done in batch.done:
            self._note_done(done, reclaims, faulty_seeds)
        self._reclaims_at_last_end = reclaims if batch.done else self._reclaims_at_last_end
        for key in delivered:
            request = self.requests[key]
            if request.done is None and request.ending is not None:
                fail("end", f"request {key} had to end ({request.ending}) with this batch and did not")
        for reply in batch.replies:
            self._note_reply(reply)
        for gone in batch.gone:
            self._note_gone(gone)

    def _decide(self, refused: set[int]) -> None:
        """Whether a branching turn that could be refused was: only then does it replace what it wanted to."""
        undecided, self._undecided = self._undecided, None
        if undecided is not None and undecided[0].key not in refused:
            self._branch(*undecided)

    def check_settled(self) -> None:
        """After all effects were taken: nobody may still wait for what is decided at once."""
        self._decide(set())
        if self._settled_ns == self.now_ns:
            return  # Neither a message nor an effect nor time has come since.
        overdue = [key for key, request in self.live.items() if request.is_over]
        check(not overdue, "end", f"requests {overdue} were cancelled or refused and did not end at once")
        overdue_ops = self._awaited.keys() - self._flushes
        check(not overdue_ops, "reply", f"no reply to operations {overdue_ops}")
        check(not self._due_gone, "session", f"sessions {self._due_gone} had to close with their turn")
        timed = [session for session in self.sessions.values() if session.idle_timeout_ns is not None]
        late = [session.id for session in timed if (at := session.expires_ns) is not None and at <= self.now_ns]
        check(not late, "timer", f"sessions {late} had to expire by {self.now_ns} ns")
        self._settled_ns = self.now_ns

    def _note_deltas(self, batch: wire.Batch) -> list[int]:
        if not (batch.delta_keys or batch.delta_counts or batch.delta_tokens or batch.details):
            return []
        keys: list[int] = np.frombuffer(batch.delta_keys, "<i8").tolist()
        counts = np.frombuffer(batch.delta_counts, "<i4").tolist()
        tokens = wire.unpack_tokens(batch.delta_tokens).tolist()
        check(len(keys) == len(counts) == len(set(keys)) and sum(counts) == len(tokens), "delta", "ragged deltas")
        details = {detail.key: detail for detail in batch.details}
        check(len(details) == len(batch.details), "delta", "two details for one request")
        start = 0
        for key, count in zip(keys, counts, strict=True):
            request = self.live.get(key)
            if request is None:
                fail("delta", f"tokens for request {key}, which is not live")
            self._note_tokens(request, tokens[start : start + count], details.pop(key, None))
            start += count
        check(not details, "delta", f"details without tokens for {list(details)}")
        return keys

    def _note_tokens(self, request: RequestBook, tokens: list[int], detail: wire.TokenDetail | None) -> None:
        logprobs: list[float] = []
        tops: list[tuple[int, float]] = []
        if detail is not None:
            request.told.append(detail)
        if request.replays is not None:
            check_repeated(request, request.replays, tokens, detail)
            return
        for token in tokens:
            if request.ending is not None:
                fail("delta", f"request {request.key} got token {token} after {request.ending}")
            if request.submit.logprobs >= 0:
                digest = request.speaker.chain.digest
                logprobs.append(hashing.logprob_of(digest, token))
                tops += hashing.top_of(digest, request.submit.logprobs, self._world.facts.vocab_size)
            right = request.speaker.peek()
            if token != right:
                fail("token", f"request {request.key}: output {len(request.output)} is {token}, the reference says "
                              f"{right} (prompt {len(request.prompt)} tokens)")
            request.output.append(token)
            request.speaker.push(token)
            request.ending = ending_of(request.output, request.submit.sampling, self._world.facts, request.output_limit)
        wants_detail = request.submit.logprobs >= 0 and bool(tokens)
        if (detail is not None) != wants_detail:
            fail("logprob", f"request {request.key}: wants detail {wants_detail}")
        if detail is not None:
            check_logprobs(request.key, detail, logprobs, tops)
        self.totals["tokens"] += len(tokens)

    def _note_scores(self, batch: wire.Batch) -> None:
        for scores in batch.scores:
            request = self.live.get(scores.key)
            check(request is not None, "scores", f"scores for request {scores.key}, which is not live")
            assert request is not None
            tokens = wire.unpack_tokens(scores.tokens).tolist()
            end = scores.start + len(tokens)
            request.told.append(scores)
            if request.replays is not None:
                continue
            check(not request.output, "scores", f"request {scores.key}: scores after output")
            check(scores.start == request.scored_to and request.submit.prompt_logprobs_from >= 0, "scores",
                  f"request {scores.key}: scores from {scores.start}, next is {request.scored_to}")
            check(tokens == request.prompt[scores.start : end], "scores", f"request {scores.key}: not its own tokens")
            logprobs: list[float] = []
            tops: list[tuple[int, float]] = []
            chain = Speaker(request.prompt[: scores.start], request.submit.sampling, self._world.facts).chain
            for token in tokens:
                logprobs.append(hashing.logprob_of(chain.digest, token))
                tops += hashing.top_of(chain.digest, max(request.submit.logprobs, 0), self._world.facts.vocab_size)
                chain.push(token)
            check_logprobs(scores.key, scores, logprobs, tops)
            request.scored_to = end
            self.totals["scores"] += len(tokens)

    def _note_done(self, done: wire.Done, reclaims: int, faulty_seeds: set[int]) -> None:
        request = self.requests.get(done.key)
        if request is None:
            fail("end", f"end of request {done.key}, which nobody sent")
        if request.done is not None:
            fail("end", f"request {done.key} ended twice: {request.done}, {done}")
        request.done = done
        del self.live[done.key]
        if request.replays is not None:
            check_replayed(request, request.replays, done)
            self.totals["replays"] += 1
            return
        self.totals[f"done {done.reason}"] += 1
        self.totals["preemptions"] += done.preemptions
        is_astray = request.speaker.is_astray and request.ending is None
        if done.reason == "error" and 400 <= done.status < 500 and not is_astray:
            self._note_refusal(request, done)
            return
        if request.refusals:
            fail("refusal", f"request {done.key} had to be refused {set(request.refusals)}: {done}")
        if (done.prompt_tokens, done.completion_tokens) != (len(request.prompt), len(request.output)):
            fail("count", f"the prompt is {len(request.prompt)}, {len(request.output)} tokens came: {done}")
        if done.reason == "abort":
            check(request.cancelled, "end", f"nobody cancelled: {done}")
        elif done.reason == "error":
            excused = is_astray or request.submit.sampling.seed in faulty_seeds
            check(excused, "end", f"no row of it was faulty: {done}")
            self.totals["astray"] += is_astray
        else:
            self._note_finish(request, done)
        self._end_turn(request, done, reclaims)

    def _note_refusal(self, request: RequestBook, done: wire.Done) -> None:
        if done.status not in request.refusals | request.excuses:
            fail("refusal", f"refused with {done.status}, allowed {set(request.refusals | request.excuses)}: {done}")
        if request.output or not (done.code and done.message):
            fail("refusal", f"after output or silent: {done}")
        if request.session and request.session.turn is request:
            request.session.turn = None
        self.totals[f"refused {done.status}"] += 1

    def _note_finish(self, request: RequestBook, done: wire.Done) -> None:
        """A request that came to its own end: the right end, and counts that agree."""
        ending = request.ending
        if not request.output:
            ending = ending_of([], request.submit.sampling, self._world.facts, request.output_limit)
        if ending is None or request.cancelled:
            fail("end", f"ended after {request.output}: {done}")
        matched = not ending.matched or done.matched in ending.matched
        if not (done.reason == ending.reason and matched and done.kept_bytes in ending.kept_bytes):
            fail("end", f"had to be {ending}: {done}")
        if not 0 <= done.cached_tokens < len(request.prompt):
            fail("count", f"cached: {done}")
        # Without output the last prompt token is left to the next turn; after a preemption others may have helped.
        most = done.prompt_tokens - (request.output_limit == 0)
        counted = done.cached_tokens + done.computed_tokens
        if counted != most and not (counted < most and done.preemptions > 0):
            fail("count", f"cached + computed is not {most}: {done}")
        if request.submit.prompt_logprobs_from >= 0:
            check(request.scored_to >= len(request.prompt), "scores", f"scored to {request.scored_to}: {done}")
        if not done.preemptions and request.device_prompt_tokens != done.computed_tokens:
            fail("count", f"the device ran {request.device_prompt_tokens} prompt tokens: {done}")
        self.totals["cached"] += done.cached_tokens
        if request.session is None:
            self.totals["prefix hits"] += done.cached_tokens > 0
            followed = request.submit.group >= 0 and done.cached_tokens == len(request.prompt) - 1
            self.totals["prompts followed"] += followed
            if done.cached_tokens % self._world.limits.page_size and not followed:
                fail("count", f"shared part of a page: {done}")

    def _end_turn(self, request: RequestBook, done: wire.Done, reclaims: int) -> None:
        """Commit a finished turn, roll back any other; then the session is free for the next."""
        session = request.session
        if session is None:
            if done.session_tokens != -1:
                fail("history", f"no session: {done}")
            return
        finished = done.reason in ("stop", "length")
        if request.kept:
            self.totals["turns"] += 1
            if done.session_tokens != len(session.history):
                fail("history", f"what was delivered has {len(session.history)} tokens: {done}")
            return
        if finished:
            self._check_warmth(request, session, done, reclaims)
            session.input_end = len(request.prompt)
            session.reply = request if request.submit.rid else None
            session.history = [*request.prompt, *request.output]
            session.turn_ends.append(len(session.history))
            session.lost_part = False
            # A turn that found all of its KV ended in the plan, which may have reclaimed some of it since.
            session.reclaim_mark = reclaims if done.computed_tokens else self._reclaims_at_last_end
            self.totals["turns"] += 1
        else:
            if done.preemptions or done.reason == "error":
                session.reclaim_mark = None
            self.totals["roll-backs"] += 1
        if done.session_tokens != (len(session.history) if finished else -1):
            fail("history", f"history is {len(session.history)}: {done}")
        self._release_turn(request)
        if session.root is None and session.id in self.sessions:
            self.just_idle.append(session.id)

    def _check_warmth(self, request: RequestBook, session: SessionBook, done: wire.Done, reclaims: int) -> None:
        """A turn on KV that nothing was taken from reuses all of it but the last token, at any page size."""
        if not session.history:
            return
        if session.root is not None:
            # A node begins as a fork: what its parent could share, less than a page not counted.
            self.totals["warm branches"] += done.cached_tokens > 0
            return
        if session.reserved_pages and request.reclaim_mark is not None and not session.lost_part:
            least = min(len(session.history) - 1, session.reserved_pages * self._world.limits.page_size)
            if done.cached_tokens < least:
                fail("reservation", f"{least} tokens were kept for this session: {done}")
        check(done.cached_tokens <= len(session.history) - 1 or done.cached_tokens % self._world.limits.page_size == 0,
              "count", f"more KV than history: {done}")
        if request.reclaim_mark == reclaims:
            self.totals["warm turns"] += 1
            # The tree may have more of it than the session itself would keep.
            page_size = self._world.limits.page_size
            kept = len(session.history) - 1
            shared = done.cached_tokens > kept and done.cached_tokens % page_size == 0
            lost = session.lost_part and kept > done.cached_tokens >= kept // page_size * page_size
            check(done.cached_tokens == kept or shared or lost, "warm",
                  f"history of {len(session.history)} was not reclaimed: {done}")
        elif done.cached_tokens >= len(session.history):
            self.totals["turns found ahead"] += 1
        elif done.cached_tokens < len(session.history) - 1:
            self.totals["cold turns"] += 1

    def _note_gone(self, gone: wire.SessionGone) -> None:
        if gone.reason == "closed":
            check(self._due_gone.get(gone.session, 0) > 0, "session", f"{gone.session} closed without being due")
            self._due_gone[gone.session] -= 1
            if not self._due_gone[gone.session]:
                del self._due_gone[gone.session]
            self.totals["deferred closes"] += 1
            return
        session = self.sessions.get(gone.session)
        due_ns = session.expires_ns if session else None
        check(gone.reason == "expired" and due_ns is not None and due_ns <= self.now_ns, "timer",
              f"{gone} at {self.now_ns} ns, due {due_ns}")
        del self.sessions[gone.session]
        self.totals["expirations"] += 1

    def _note_reply(self, reply: wire.Reply) -> None:
        if reply.op not in self._awaited:
            fail("reply", f"nobody awaits {reply}")
        self._flushes.discard(reply.op)
        self._awaited.pop(reply.op)(reply)
