"""The turns of a branching session as the server holds them, each as what it adds to the turn that it goes on from."""

from collections.abc import Iterable
from dataclasses import dataclass

from sessile.contract.messages import Branch, CommittedTurn, Done, Submit

TOKEN_BYTES = 4
NODE_BYTES = 256
"""What a turn counts as beside its tokens."""


@dataclass(eq=False, slots=True)
class Node:
    """A committed turn. number: its place among all messages. tokens: packed, of its history behind its parent's."""

    number: int
    rid: str
    parent: "Node | None"
    base_tokens: int
    """How much of its parent's history it begins with."""
    tokens: bytes
    input_end: int
    told: CommittedTurn | None
    """As it is answered again; None: it cannot be."""

    @property
    def length(self) -> int:
        """Tokens of its history."""
        return self.base_tokens + len(self.tokens) // TOKEN_BYTES

    @property
    def bytes(self) -> int:
        """What it counts as."""
        return NODE_BYTES + len(self.tokens) + (len(self.told.input) if self.told else 0)


class Branches:
    """The nodes of one session, by the names of their turns, each behind its parent."""

    def __init__(self) -> None:
        self.bytes = 0
        """What all nodes count as."""
        self._nodes: dict[str, Node] = {}
        self._dropped: dict[str, Node] = {}
        """Turns that were dropped one by one while others were in flight, which may go on from them."""

    def __contains__(self, rid: str) -> bool:
        return rid in self._nodes

    def replaced_by(self, branch: Branch | None, number: int) -> list[str]:
        """The turns that the message with this number drops: what descended from its parent then, or every one."""
        if branch is None or not branch.replace:
            return []
        earlier = [node for node in self._nodes.values() if node.number < number]
        if branch.parent is None:
            return [node.rid for node in earlier]
        origin = self._nodes.get(branch.parent)
        return [node.rid for node in earlier if origin is not None and _descends(node, origin)]

    def drop(self, rids: Iterable[str]) -> None:
        """Forget turns, of which all descendants are among them or gone."""
        for rid in rids:
            if (node := self._nodes.pop(rid, None)) is not None:
                self.bytes -= node.bytes

    def drop_one(self, rid: str) -> None:
        """Forget one turn; those that went on from it have all of its tokens, and go on from above."""
        node = self._nodes.pop(rid, None)
        if node is None:
            return
        self.bytes -= node.bytes
        self._dropped[rid] = node
        for child in self._nodes.values():
            if child.parent is node:
                self.bytes -= child.bytes
                _go_on_from_above(child, node)
                self.bytes += child.bytes

    def forget_dropped(self) -> None:
        """Nothing is in flight that may go on from a turn that was dropped."""
        self._dropped.clear()

    def commit(
        self, number: int, submit: Submit, output: bytes, done: Done, bos_id: int | None, told: CommittedTurn | None
    ) -> bool:
        """Add the turn that has ended; False if that cannot be what the engine has."""
        assert submit.rid not in self._nodes
        branch = submit.branch or Branch()
        parent = self._nodes.get(branch.parent or "") or self._dropped.get(branch.parent or "")
        base_tokens = _origin(parent, branch)
        tokens = submit.tokens
        if base_tokens and bos_id is not None and tokens.startswith(bos_id.to_bytes(TOKEN_BYTES, "little")):
            tokens = tokens[TOKEN_BYTES:]  # the engine leaves it out behind a history
        if base_tokens + len(tokens) // TOKEN_BYTES != done.prompt_tokens or (branch.parent and parent is None):
            return False
        node = Node(number, submit.rid, parent, base_tokens, tokens + output, done.prompt_tokens, told)
        if node.length != done.session_tokens:
            return False
        while (above := node.parent) is not None and self._nodes.get(above.rid) is not above:
            _go_on_from_above(node, above)
        self._nodes[submit.rid] = node
        self.bytes += node.bytes
        return True

    def restoring(self) -> tuple[CommittedTurn, ...]:
        """All of them for another engine, parents first."""
        return tuple(_restored(node) for node in self._nodes.values())


def _origin(parent: Node | None, branch: Branch) -> int:
    """How much of its parent's history a turn begins with, by the rules of the engine."""
    if parent is None:
        return 0
    length = parent.input_end if branch.drop_previous_output else parent.length
    return length if not branch.offset else branch.offset if branch.offset > 0 else length + branch.offset


def _go_on_from_above(child: Node, node: Node) -> None:
    """Take a node out from between a child and its own parent."""
    assert child.parent is node
    if child.base_tokens > node.base_tokens:
        taken = (child.base_tokens - node.base_tokens) * TOKEN_BYTES
        child.tokens = node.tokens[:taken] + child.tokens
        child.base_tokens = node.base_tokens
    child.parent = node.parent


def _descends(node: Node, origin: Node) -> bool:
    above = node.parent
    while above is not None and above is not origin:
        above = above.parent
    return above is origin


def _restored(node: Node) -> CommittedTurn:
    told = node.told
    return CommittedTurn(
        rid=node.rid,
        input=told.input if told else b"",
        done=told.done if told else None,
        parent=node.parent.rid if node.parent else None,
        base_tokens=node.base_tokens,
        tokens=node.tokens,
        input_end=node.input_end,
    )
