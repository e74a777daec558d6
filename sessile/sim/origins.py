"""Where a simulated turn goes on from, as its client may expect it, and what has to refuse it."""

from dataclasses import dataclass, field

from sessile.contract.messages import Branch, Submit
from sessile.sim.records import RequestBook, SessionBook


@dataclass(slots=True)
class Origin:
    """The context before a submit's own tokens, and the statuses of which one must refuse it."""

    base: list[int] = field(default_factory=list)
    refusals: set[int] = field(default_factory=set)
    replays: RequestBook | None = None
    """The turn whose reply is to be said again."""
    parent: SessionBook | None = None
    """Of a turn of a branching session: the node that it goes on from."""


def origin_of(submit: Submit, session: SessionBook | None, lines: int, lines_max: int) -> Origin:
    """The origin of a submit. session: the one it names, if its tenant has it; lines: what counts as sessions now."""
    if submit.session is None:
        return Origin()
    if session is None:
        return Origin(refusals={404})
    if session.closing:
        return Origin(refusals={410})
    if session.branching:
        return _branch_origin(submit, session, lines, lines_max)
    replayed = _replayed(submit, session.reply)
    if replayed is not None:
        return replayed
    origin = Origin(base=session.history)
    if session.turn is not None or submit.expect_tokens not in (-1, len(session.history)):
        origin.refusals.add(409)
    branch = submit.branch
    if branch is not None and (branch.offset or branch.replace or branch.drop_previous_output):
        origin.refusals.add(400)
    return origin


def _replayed(submit: Submit, reply: RequestBook | None) -> Origin | None:
    if reply is None or not submit.rid or reply.submit.rid != submit.rid:
        return None
    return Origin(replays=reply) if reply.submit.tokens == submit.tokens else Origin(refusals={400})


def _branch_origin(submit: Submit, session: SessionBook, lines: int, lines_max: int) -> Origin:
    known = session.nodes.get(submit.rid)
    if not submit.rid or known is not None:
        return (known and _replayed(submit, known.reply)) or Origin(refusals={400})
    branch = submit.branch or Branch()
    origin = Origin()
    if branch.parent is not None:
        origin.parent = session.nodes.get(branch.parent)
        if origin.parent is None or (origin.parent.turn is not None and not branch.replace):
            return Origin(refusals={400})
        context = context_of(origin.parent)
        if branch.drop_previous_output:
            turn = origin.parent.turn
            context = context[: len(turn.prompt) if turn is not None else origin.parent.input_end]
        if not -len(context) <= branch.offset <= len(context):
            return Origin(refusals={400})
        origin.base = context[: branch.offset] if branch.offset else context
    elif branch.offset or branch.drop_previous_output:
        return Origin(refusals={400})
    if submit.expect_tokens not in (-1, len(origin.base)):
        origin.refusals.add(409)
    if lines >= lines_max:
        origin.refusals.add(429)
    return origin


def context_of(node: SessionBook) -> list[int]:
    """A node's history, or what the turn that runs on it has been told so far."""
    return node.history if node.turn is None else [*node.turn.prompt, *node.turn.output]


def descendants(session: SessionBook, origin: SessionBook | None) -> list[SessionBook]:
    """The nodes that go on from `origin`, however far; all of them if that is None."""
    found = []
    for node in session.nodes.values():
        above = node.parent
        while above is not None and above is not origin:
            above = above.parent
        if origin is None or above is origin:
            found.append(node)
    return found


def drop_node(session: SessionBook, rid: str) -> list[int]:
    """Forget one turn; what went on from it has its tokens. Returns the status of a refusal, which changes nothing."""
    if not session.branching:
        return [400]
    node = session.nodes.get(rid)
    if node is None or node.turn is not None:
        return [404 if node is None else 409]
    for child in session.nodes.values():
        if child.parent is node:
            child.parent = node.parent
    del session.nodes[rid]
    return []


def place_of(session: SessionBook, tokens: int | None, turn: int | None) -> int | None:
    """The length of history that a fork or rewind means; None if there is no such place."""
    if tokens is not None and turn is not None:
        return None
    if turn is not None:
        return [0, *session.turn_ends][turn] if 0 <= turn <= len(session.turn_ends) else None
    place = len(session.history) if tokens is None else tokens
    return place if 0 <= place <= len(session.history) else None
