"""How requests and sessions come in: every check first, then the change; what is refused has touched nothing (H16).

A turn goes on from a history. In a streaming session that is the session's own, and a second turn is refused while one
is in flight. In a branching session each turn is a node of its own that begins as a fork of the turn it goes on from,
so turns run side by side, and the right to be in flight belongs to the turn.
"""

from array import array
from dataclasses import dataclass

import numpy as np

from sessile.contract.grammar import GrammarLine
from sessile.contract.messages import Branch, CommittedTurn, OpenSession, RestoreSession, Submit, unpack_tokens
from sessile.core.books import Books
from sessile.core.constraining import constraint_of
from sessile.core.drafting import drafts_of
from sessile.core.ending import discard_turns, end_request
from sessile.core.forking import fork_session
from sessile.core.history import NO_HISTORY, TOKEN_BYTES, History, Packed
from sessile.core.marks import Mark
from sessile.core.request import Drafts, Request
from sessile.core.reserving import reserve
from sessile.core.session import Session, StoredReply
from sessile.core.tenants import Tenant
from sessile.errors import (
    DuplicateSession,
    HistoryMismatch,
    InvalidRequest,
    LimitReached,
    SessionBusy,
    SessionClosed,
    TooLong,
)
from sessile.units import RequestKey, ceil_div

_NS = 1_000_000_000
_NEW_ROOT = Branch()


def enter_plain(books: Books, message: Submit) -> None:
    """Put a plain request into the line. Raises UserError, with nothing changed."""
    if not message.tokens:
        raise InvalidRequest("the prompt is empty: send at least one token", param="input_ids")
    tenant = books.tenants.named(message.tenant)
    if message.group >= 0:
        books.groups.check(message, tenant)
    goal = _goal(books, message, tenant, 0, message.tokens, books.limits.context_tokens)
    drafts, constraint = drafts_of(books, message, tenant), constraint_of(books, message)
    _enter(books, message, tenant, NO_HISTORY, message.tokens, goal, drafts, constraint, None)


def enter_turn(books: Books, message: Submit, session: Session) -> None:
    """Put the next turn of a session into the line. Raises UserError, with nothing changed."""
    if message.group >= 0:
        books.groups.check(message, session.tenant)
    if session.closing:
        raise SessionClosed(f"session {session.id!r}: close was requested", param="session_params.id")
    if session.branching:
        _enter_branch(books, message, session)
        return
    if _replays(books, message, session):
        return
    if session.turn is not None:
        raise SessionBusy(
            f"session {session.id!r} already has an active request. Wait for it, or abort it.",
            param="session_params.id",
        )
    _refuse_branch(session, message.branch)
    base_tokens = len(session.history)
    _expect(session, message, base_tokens)
    tokens = _without_bos(books, message.tokens, base_tokens)
    goal = _goal(books, message, session.tenant, base_tokens, tokens, session.tokens_max)
    drafts, constraint = drafts_of(books, message, session.tenant), constraint_of(books, message)
    _start_turn(books, message, session, tokens, goal, drafts, constraint)


def open_session(
    books: Books,
    session_id: str,
    tenant: Tenant,
    *,
    idle_timeout_ns: int | None,
    tokens_max: int,
    metadata: dict[str, str],
    branching: bool = False,
) -> Session:
    """A new session with an empty history. Raises UserError, with nothing changed."""
    if (tenant.policy.name, session_id) in books.sessions:
        raise DuplicateSession(f"session {session_id!r} already exists", param="session_id")
    _check_room_for_session(books)
    most = tenant.policy.sessions_max
    if most is not None and tenant.sessions >= most:
        raise LimitReached(f"{most} sessions of this key are open, which is its limit: close some first")
    session = _new_session(books, session_id, tenant, idle_timeout_ns, tokens_max, metadata, branching)
    books.sessions[session.key] = session
    tenant.sessions += 1
    books.start_idle_timer(session)
    return session


def open_as_asked(books: Books, message: OpenSession) -> Session:
    """A new session as a message asks for it. Raises UserError, with nothing changed."""
    _check_opening(books, message)
    if message.reserve_tokens > (most := _longest_history(books, message)):
        raise InvalidRequest(
            f"reserve_tokens must be at most {most}, the most tokens that this session can have", param="reserve_tokens"
        )
    return _opened(books, message, message.reserve_tokens)


def _check_opening(books: Books, message: OpenSession) -> None:
    timeout_s, context = message.idle_timeout_s, books.limits.context_tokens
    if timeout_s is not None and not 0 < timeout_s <= 1e9:
        raise InvalidRequest("idle_timeout_s must be above 0 and at most 1e9 seconds", param="timeout")
    if message.tokens_max is not None and not 2 <= message.tokens_max <= context:
        raise InvalidRequest(f"max_tokens must be from 2 to {context}, the context length", param="max_tokens")


def _longest_history(books: Books, message: OpenSession) -> int:
    longest = books.limits.sequence_tokens_max
    return min(message.tokens_max or longest, longest)


def _opened(books: Books, message: OpenSession, reserve_tokens: int) -> Session:
    reserved_pages = ceil_div(reserve_tokens, books.limits.page_size)
    if reserved_pages:
        _check_reservation(books, message, reserved_pages)
    timeout_s = message.idle_timeout_s
    session = open_session(
        books,
        message.session,
        books.tenants.named(message.tenant),
        idle_timeout_ns=None if timeout_s is None else int(timeout_s * _NS),
        tokens_max=_longest_history(books, message),
        metadata=dict(message.metadata),
        branching=message.branching,
    )
    if reserved_pages:
        reserve(books, session, reserved_pages)
    return session


def restore_as_asked(books: Books, message: RestoreSession) -> Session:
    """A session with the history of one that an earlier engine had, and no KV. Raises UserError, with nothing changed.

    Nothing is shared and nothing parked, so the first turn computes the history as that of a session gone cold.
    """
    opening, ends = message.opening, message.turn_ends
    tokens = len(message.tokens) // TOKEN_BYTES
    if opening.branching:
        assert not tokens, "a branching session has no single history"
        return _restore_branching(books, message)
    assert list(ends) == sorted(ends) and (ends[-1] if ends else 0) == tokens, "the turns are not those of the history"
    longest = _longest_history(books, opening)
    if tokens > longest:
        raise TooLong(f"the history of session {opening.session!r} has {tokens} tokens, {longest} fit")
    _check_tokens(books, message.tokens)
    _check_opening(books, opening)
    # What it reserved before may be more than it can have of this engine.
    session = _opened(books, opening, min(opening.reserve_tokens, longest))
    session.history.append(message.tokens)
    session.turn_ends = array("q", ends)
    session.tenant.held_tokens += tokens
    session.reply = _restored_reply(message.last)
    return session


def _restore_branching(books: Books, message: RestoreSession) -> Session:
    """The same of a branching session: each turn is a node again, behind its parent."""
    most = books.limits.sessions_max
    if len(books.sessions) + books.node_count + 1 + len(message.nodes) > most:
        raise LimitReached(f"{most} sessions and branches are open, which is the limit: close some first")
    for turn in message.nodes:
        _check_tokens(books, turn.tokens)
        if turn.base_tokens + len(turn.tokens) // TOKEN_BYTES > books.limits.sequence_tokens_max:
            raise TooLong(f"turn {turn.rid!r} of session {message.opening.session!r} does not fit any more")
    session = open_as_asked(books, message.opening)
    for turn in message.nodes:
        parent = None if turn.parent is None else session.nodes[turn.parent]
        assert turn.base_tokens <= (len(parent.history) if parent else 0), "a turn begins with more than its parent has"
        node = _add_node(books, session, turn.rid, parent, turn.base_tokens)
        if parent is not None:
            fork_session(books, parent, node, turn.base_tokens)
        node.history.append(turn.tokens)
        node.turn_ends.append(len(node.history))
        node.input_end = turn.input_end
        node.tenant.held_tokens += len(turn.tokens) // TOKEN_BYTES
        node.reply = _restored_reply(turn)
    return session


def _restored_reply(turn: CommittedTurn | None) -> StoredReply | None:
    if turn is None or turn.done is None:
        return None
    return StoredReply(turn.rid, turn.input, turn.done, (), ())


# -- branching ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a branching turn goes on: the first `tokens` of a node's history; no node is a new root."""

    node: Session | None
    tokens: int


def _enter_branch(books: Books, message: Submit, session: Session) -> None:
    if not message.rid:
        raise InvalidRequest(
            f"session {session.id!r} is branching: go on from one of its turns by rid", param="session_params.rid"
        )
    if message.rid in session.nodes and _replays(books, message, session.nodes[message.rid]):
        return
    if message.rid in session.nodes:
        raise InvalidRequest(f"rid: session {session.id!r} has a turn {message.rid!r} already", param="rid")
    branch = message.branch or _NEW_ROOT
    origin = _origin(books, session, branch)
    _expect(session, message, origin.tokens)
    tokens = _without_bos(books, message.tokens, origin.tokens)
    goal = _goal(books, message, session.tenant, origin.tokens, tokens, session.tokens_max)
    drafts, constraint = drafts_of(books, message, session.tenant), constraint_of(books, message)
    _check_room_for_session(books)
    if branch.replace:
        _replace(books, session, origin.node)
    node = _add_node(books, session, message.rid, origin.node, origin.tokens)
    if origin.node is not None:
        fork_session(books, origin.node, node, origin.tokens)
        books.totals.forks += 1
    _start_turn(books, message, node, tokens, goal, drafts, constraint)


def _add_node(books: Books, session: Session, rid: str, parent: Session | None, base_tokens: int) -> Session:
    node = _new_session(books, session.id, session.tenant, None, session.tokens_max, {}, False)
    node.root, node.rid, node.parent, node.base_tokens = session, rid, parent, base_tokens
    session.nodes[rid] = node
    books.node_count += 1
    return node


def _origin(books: Books, session: Session, branch: Branch) -> _Origin:
    if branch.parent is None:
        if branch.offset or branch.drop_previous_output:
            raise InvalidRequest("offset and drop_previous_output need the rid of a turn", param="session_params.rid")
        return _Origin(None, 0)
    node = session.nodes.get(branch.parent)
    if node is None:
        raise InvalidRequest(
            f"session {session.id!r} has no turn {branch.parent!r}: it did not finish, or was replaced",
            param="session_params.rid",
        )
    if node.turn is not None and not branch.replace:
        raise InvalidRequest(
            f"turn {branch.parent!r} has not finished: wait for it, or send replace", param="session_params.rid"
        )
    return _Origin(node, _offset(books, node, branch))


def _offset(books: Books, node: Session, branch: Branch) -> int:
    """How much of a node's context a turn goes on from; of one that runs, its delivered output counts."""
    length, input_end = len(node.history), node.input_end
    if node.turn is not None:
        request = books.requests[node.turn]
        length, input_end = books.delivered_tokens(request), request.prompt_tokens
    if branch.drop_previous_output:
        length = input_end
    if not branch.offset:
        return length
    tokens = branch.offset if branch.offset > 0 else length + branch.offset
    if not 0 <= tokens <= length:
        raise InvalidRequest(
            f"offset must be from {-length} to {length}, the tokens of turn {node.rid!r}",
            param="session_params.offset",
        )
    return tokens


def _replace(books: Books, session: Session, node: Session | None) -> None:
    """Drop what descends from a node, or every turn; a parent that runs ends here, and keeps what it delivered."""
    if node is not None and node.turn is not None:
        books.marks[Mark.REPLACED_RUNNING] += 1
        end_request(books, books.requests[node.turn], "abort", message="replaced by another turn", keep=True)
    discard_turns(books, session, node)


def _replays(books: Books, message: Submit, session: Session) -> bool:
    """Answer a turn that was sent again because its reply was lost: the same reply once more, and nothing changes."""
    reply = session.reply
    if reply is None or not message.rid or reply.rid != message.rid:
        return False
    if reply.input != message.tokens:
        raise InvalidRequest(f"rid: turn {message.rid!r} of session {session.id!r} had another input", param="rid")
    start = reply.done.prompt_tokens
    output = session.history.slice(start, start + reply.done.completion_tokens)
    reply.repeat(books.effects, message.key, unpack_tokens(output).tolist())
    books.totals.turns_replayed += 1
    books.marks[Mark.REPLAYED] += 1
    return True


# -- checks -------------------------------------------------------------------------------------------------------


def _refuse_branch(session: Session, branch: Branch | None) -> None:
    if branch is None:
        return
    for field in ("offset", "replace", "drop_previous_output"):
        if getattr(branch, field):
            raise InvalidRequest(
                f"{field}: session {session.id!r} is a streaming session, whose turns follow one another; "
                f"rewind it, or open a branching one",
                param=f"session_params.{field}",
            )


def _expect(session: Session, message: Submit, base_tokens: int) -> None:
    if message.expect_tokens not in (-1, base_tokens):
        raise HistoryMismatch(
            f"session {session.id!r} has {base_tokens} tokens, not {message.expect_tokens}",
            param="session_params.expect_tokens",
        )


def _without_bos(books: Books, tokens: Packed, base_tokens: int) -> Packed:
    """New input behind a history has no beginning-of-sequence token of its own; without history it is not empty."""
    bos = books.facts.bos_id
    if base_tokens and bos is not None and tokens.startswith(bos.to_bytes(TOKEN_BYTES, "little")):
        return tokens[TOKEN_BYTES:]
    if not base_tokens and not tokens:
        raise InvalidRequest("the first turn of a session cannot be empty", param="input_ids")
    return tokens


def _goal(books: Books, message: Submit, tenant: Tenant, base_tokens: int, tokens: Packed, tokens_max: int) -> int:
    """The tokens at which a request ends at the latest. Raises UserError if it may not come in now."""
    limits = books.limits
    assert message.key not in books.requests, f"request key {message.key} is in use"
    _check_tokens(books, tokens)
    longest = min(limits.sequence_tokens_max, tokens_max)
    new_tokens = len(tokens) // TOKEN_BYTES
    prompt = base_tokens + new_tokens
    wanted = message.sampling.max_new_tokens
    if prompt + (0 if wanted == 0 else 1) > longest:
        raise TooLong(
            f"the input has {prompt} tokens, history included; with one token of output it exceeds the context "
            f"length of {longest} tokens",
            param="input_ids",
        )
    if len(books.waiting) >= limits.queue_max:
        raise LimitReached(f"{limits.queue_max} requests are waiting, which is the limit: try again later")
    if new_tokens > limits.queue_tokens_max:
        raise TooLong(f"the input has {new_tokens} tokens, {limits.queue_tokens_max} may wait", param="input_ids")
    if books.waiting.tokens + new_tokens > limits.queue_tokens_max:
        raise LimitReached(f"{books.waiting.tokens} tokens are waiting, which is the limit: try again later")
    _check_fits_tenant(books, tenant, message, new_tokens)
    _check_tenant(tenant, new_tokens, in_session=message.session is not None)
    return prompt + min(longest - prompt, longest if wanted is None else wanted)


def _check_fits_tenant(books: Books, tenant: Tenant, message: Submit, new_tokens: int) -> None:
    """Refuse for good what exceeds a limit by itself, its whole group counted: no waiting would make room for it."""
    policy = tenant.policy
    requests, tokens = books.groups.size_of(message.group)
    if requests and policy.requests_max is not None and requests >= policy.requests_max:
        raise InvalidRequest(
            f"n: this key may have {policy.requests_max} requests in flight, and each answer is one: ask for fewer",
            param="n",
        )
    if policy.tokens_max is not None and tokens + new_tokens > policy.tokens_max:
        raise TooLong(
            f"the request has {tokens + new_tokens} input tokens, all its answers counted; requests of this key may"
            f" have {policy.tokens_max} in flight: send less",
            param="input_ids",
        )
    most = policy.held_tokens_max
    if message.session is not None and most is not None and new_tokens > most:
        raise TooLong(
            f"the input has {new_tokens} tokens, sessions of this key may hold {most}: send less", param="input_ids"
        )


def _check_tenant(tenant: Tenant, new_tokens: int, *, in_session: bool) -> None:
    policy = tenant.policy
    if policy.requests_max is not None and tenant.requests >= policy.requests_max:
        raise LimitReached(f"{tenant.requests} requests of this key are in flight, which is its limit: try again later")
    if policy.tokens_max is not None and tenant.tokens + new_tokens > policy.tokens_max:
        raise LimitReached(
            f"requests of this key have {tenant.tokens} input tokens in flight, {policy.tokens_max} is its limit: "
            f"try again later"
        )
    most = policy.held_tokens_max
    if in_session and most is not None and tenant.held_tokens + new_tokens > most:
        raise LimitReached(
            f"sessions of this key hold {tenant.held_tokens} tokens, {most} is its limit: close or rewind some"
        )


def _check_tokens(books: Books, packed: Packed) -> None:
    tokens, vocab_size = unpack_tokens(packed), books.facts.vocab_size
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        wrong = int(tokens[np.argmax((tokens < 0) | (tokens >= vocab_size))])
        raise InvalidRequest(
            f"token id {wrong} is outside the vocabulary of {vocab_size} tokens", param="input_ids"
        )


def _check_room_for_session(books: Books) -> None:
    most = books.limits.sessions_max
    if len(books.sessions) + books.node_count >= most:
        raise LimitReached(f"{most} sessions and branches are open, which is the limit: close some first")


def _check_reservation(books: Books, message: OpenSession, pages: int) -> None:
    """What is reserved leaves room for the longest sequence that may run (H68)."""
    limits = books.limits
    if message.branching:
        raise InvalidRequest("reserve_tokens: a branching session has no single line to keep", param="reserve_tokens")
    room = books.usable_pages - ceil_div(limits.sequence_tokens_max + limits.drafts_max, limits.page_size)
    if books.reserved_pages + pages > room:
        left = max(0, room - books.reserved_pages) * limits.page_size
        raise LimitReached(
            f"{message.reserve_tokens} tokens cannot be reserved: {left} are left beside the longest request and "
            f"what is reserved already; give the server more KV memory or a shorter context"
        )


# -- coming in ----------------------------------------------------------------------------------------------------


def _new_session(
    books: Books,
    session_id: str,
    tenant: Tenant,
    idle_timeout_ns: int | None,
    tokens_max: int,
    metadata: dict[str, str],
    branching: bool,
) -> Session:
    books.session_serials += 1
    return Session(
        session_id,
        books.session_serials,
        tenant,
        now_ns=books.now_ns,
        idle_timeout_ns=idle_timeout_ns,
        tokens_max=tokens_max,
        metadata=metadata,
        branching=branching,
    )


def _start_turn(
    books: Books,
    message: Submit,
    session: Session,
    tokens: Packed,
    goal: int,
    drafts: Drafts,
    constraint: GrammarLine | None,
) -> None:
    """The session's right to be in flight goes to this request."""
    request = _enter(books, message, session.tenant, session.history, tokens, goal, drafts, constraint, session)
    session.turn = RequestKey(request.key)
    if session.root is not None:
        session.root.turns_in_flight += 1
    if session.parked is not None:
        books.rank_parked(session)


def _enter(
    books: Books,
    message: Submit,
    tenant: Tenant,
    base: History,
    tokens: Packed,
    goal: int,
    drafts: Drafts,
    constraint: GrammarLine | None,
    session: Session | None,
) -> Request:
    eos = () if message.sampling.ignore_eos else books.facts.eos_ids
    stop_ids = tuple(dict.fromkeys((*eos, *message.sampling.stop_token_ids)))
    request = Request(
        message, base, tokens, goal_tokens=goal, stop_ids=stop_ids, session=session, tenant=tenant, drafts=drafts,
        constraint=constraint,
    )  # fmt: skip
    books.rows.provide_for(stop_ids, message.logprobs, constrained=constraint is not None)
    books.arrivals += 1
    request.arrival = books.arrivals
    books.requests[request.key] = request
    books.groups.enter(request)
    books.tenants.enter(tenant, request.input_tokens)
    books.enqueue(request)
    return request
