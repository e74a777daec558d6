"""The prefix tree: KV pages that any sequence with the same beginning may read.

A radix tree per namespace over whole pages: a node is a run of tokens (a multiple of the page size) and the pages that
hold their KV. All its pages belong to TREE. Readers hold a `Pin`, a receipt for the path from the root to one node:
reading, not owning. Hard pins (a running request) keep a path from being evicted; soft pins (a parked session) mark
who must shrink first. Only the receipt unlocks what it locked, and it survives splits: the lower half keeps the node.
"""

from array import array
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush

from sessile.core.history import TOKEN_BYTES, Packed
from sessile.core.ledger import TREE, Lease, PageLedger
from sessile.errors import OwnershipError


class Node:
    """A run of whole pages. `hard` and `soft` count the pins of this node and of all below it."""

    __slots__ = (
        "children", "hard", "last_step", "last_use", "looked", "pages", "parent", "place", "serial", "soft", "tokens",
    )  # fmt: skip

    def __init__(self, parent: "Node | None", tokens: Packed, pages: "array[int]", serial: int, last_use: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.hard = 0
        self.soft = 0
        self.serial = serial
        self.place = -1
        """Where it stands in `PrefixTree.places`."""
        self.looked = 0
        """The rolling audit's last round that has looked at all its pages."""
        self.last_use = last_use
        self.last_step = 0
        """The newest step that may still touch the pages, once no hard pin is left."""


class Match:
    """The longest prefix found: all pages above `node` and its first `node_pages`. Changes nothing.

    pages: in all, from the root. unpinned_pages: of these, those without a hard pin, which count as reclaimable until
    the match is pinned.
    """

    # No dataclass: what that generates stays interpreted when the core is compiled.
    __slots__ = ("node", "node_pages", "pages", "unpinned_pages")

    def __init__(self, node: Node, node_pages: int, pages: int, unpinned_pages: int) -> None:
        self.node = node
        self.node_pages = node_pages
        self.pages = pages
        self.unpinned_pages = unpinned_pages


class Pin:
    """A receipt for the path from the root to `node`; `pages` lists that path's pages in the order of tokens.

    Held by exactly one holder. Consumed by `PrefixTree.unpin`; using it again raises OwnershipError.
    """

    __slots__ = ("hard", "node", "pages")

    def __init__(self, node: Node, pages: "array[int]") -> None:
        self.node: Node | None = node
        self.pages = pages
        self.hard = True

    def path(self) -> Iterator[Node]:
        """The pinned nodes, deepest first, without the root."""
        node = self.node
        if node is None:
            raise OwnershipError("this pin was given back already")
        while node.parent is not None:
            yield node
            node = node.parent


class PrefixTree:
    """All namespaces' trees over one ledger. `clock` counts uses; it orders eviction."""

    def __init__(self, ledger: PageLedger, page_size: int) -> None:
        self._ledger = ledger
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[str, Node] = {}
        self._evictable: list[tuple[int, int, Node]] = []
        self._offers = 0
        self._serial = 0
        self.places: list[Node | None] = []
        """Every node but the roots at a place of its own as long as it lives, for the rolling audit; read only."""
        self._vacant_places: list[int] = []
        self.splits = 0
        """Nodes split so far: how the rolling audit knows that halves may have got places that it has passed."""
        self.clock = 0
        self.step = 0
        """The newest planned step: what is unlocked or published now, it may still touch."""
        self.nodes = 0
        self.hard_pages = 0
        """Pages under at least one hard pin."""
        self.hard_pins = 0
        """Receipts given out and hard now: as many as requests run."""

    @property
    def unpinned_pages(self) -> int:
        """Pages that can be evicted, once the parked sessions that read them have shrunk."""
        return self._ledger.balance(TREE) - self.hard_pages

    def walk(self) -> Iterator[Node]:
        """Every node, parents first; read only, for the audit."""
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            if node.parent is not None:
                yield node

    # -- reading ------------------------------------------------------------------------------------------------

    def match(self, namespace: str, tokens: Packed, pages_max: int) -> Match:
        """The longest cached prefix of `tokens`, at most `pages_max` pages. Pure: planning may walk away."""
        return self._match_below(self._root(namespace), tokens, pages_max)

    def _match_below(self, node: Node, tokens: Packed, pages_max: int) -> Match:
        """As `match`, but for what follows a node; `pages` and `node_pages` of the result count from there."""
        size = self._page_bytes
        pages = unpinned = 0
        node_pages = len(node.pages)
        while pages < pages_max:
            start = pages * size
            child = node.children.get(tokens[start : start + size])
            if child is None:
                break
            node = child
            node_pages = min(self._equal_pages(child, tokens, start), pages_max - pages)
            pages += node_pages
            if not child.hard:
                unpinned += node_pages
            if node_pages < len(child.pages):
                break
        return Match(node, node_pages, pages, unpinned)

    def _equal_pages(self, node: Node, tokens: Packed, start: int) -> int:
        """How many of a node's pages hold what `tokens` has from byte `start` on."""
        size = self._page_bytes
        low, high = 0, min(len(node.pages), (len(tokens) - start) // size)
        if node.tokens[: high * size] == tokens[start : start + high * size]:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if node.tokens[low * size : middle * size] == tokens[start + low * size : start + middle * size]:
                low = middle
            else:
                high = middle
        return low

    # -- pins ---------------------------------------------------------------------------------------------------

    def pin(self, match: Match) -> Pin:
        """Lock a match's path, hard, and return the receipt. Splits its last node if the match ends inside."""
        node = match.node
        if node.parent is not None and match.node_pages < len(node.pages):
            node = self._split(node, match.node_pages)
        parts = []
        above: Node | None = node
        while above is not None:
            parts.append(above.pages)
            above = above.parent
        pages = array("i")
        for part in reversed(parts):
            pages.extend(part)
        assert len(pages) == match.pages, "the tree changed between match and pin"
        receipt = Pin(node, pages)
        self.hard_pins += 1
        for each in receipt.path():
            self._harden(each)
        return receipt

    def unpin(self, pin: Pin, *, used: bool) -> None:
        """Unlock what the receipt locked, and consume it. used: count this as a use in the order of eviction."""
        self.clock += used
        self.hard_pins -= pin.hard
        for node in pin.path():
            if pin.hard:
                self._soften(node)
            else:
                node.soft -= 1
            assert node.hard >= 0 and node.soft >= 0, "a pin was given back twice"
            if used:
                node.last_use = self.clock
            self._offer(node)
        pin.node = None

    def use(self) -> int:
        """Count a use, and return the clock: later uses have larger numbers."""
        self.clock += 1
        return self.clock

    def soften(self, pin: Pin) -> None:
        """Hard → soft: the holder parks; the path may be evicted after the holder has shrunk."""
        assert pin.hard
        self.use()
        self.hard_pins -= 1
        for node in pin.path():
            self._soften(node)
            node.soft += 1
            node.last_use = self.clock
        pin.hard = False

    def harden(self, pin: Pin) -> None:
        """Soft → hard: the holder runs again."""
        assert not pin.hard
        self.hard_pins += 1
        for node in pin.path():
            self._harden(node)
            node.soft -= 1
        pin.hard = True

    def shorten(self, pin: Pin, pages: int) -> None:
        """Make a hard receipt cover only its first `pages` pages."""
        assert pin.hard and 0 <= pages <= len(pin.pages)
        excess = len(pin.pages) - pages
        node = pin.node
        self.clock += 1
        while excess and node is not None:
            if excess < len(node.pages):
                # The upper half is split off; the lower keeps the node, and loses this pin.
                self._split(node, len(node.pages) - excess)
            excess -= len(node.pages)
            self._soften(node)
            self._touch(node)
            node = node.parent
        assert excess == 0
        pin.node = node
        del pin.pages[pages:]

    def _harden(self, node: Node) -> None:
        if node.hard == 0:
            self.hard_pages += len(node.pages)
        node.hard += 1

    def _soften(self, node: Node) -> None:
        node.hard -= 1
        node.last_step = self.step
        if node.hard == 0:
            self.hard_pages -= len(node.pages)

    # -- growing ------------------------------------------------------------------------------------------------

    def publish_live(self, pin: Pin, lease: Lease, tokens: Packed) -> bool:
        """Adopt a running sequence's settled pages behind its pin, and extend the pin over them.

        tokens: those that follow the pinned ones, whole pages of them. Returns False if the tree already has the next
        page: the sequence then keeps its own copy until it ends, because adopting behind a gap, or remapping a live
        row, would change pages a step in flight reads (H62).
        """
        node = pin.node
        assert node is not None and pin.hard
        if tokens[: self._page_bytes] in node.children:
            return False
        count = len(tokens) // self._page_bytes
        pages = self._ledger.publish(lease, 0, count)
        if node.parent is not None and not node.children and node.hard == 1 and node.soft == 0:
            # A leaf that only we read grows in place: one node a prompt, not one a chunk.
            node.tokens += tokens
            node.pages.extend(pages)
        else:
            node = self._attach(node, tokens, pages[:])
            node.hard = 1
            pin.node = node
        self.hard_pages += count
        pin.pages.extend(pages)
        return True

    def publish_parked(self, pin: Pin, lease: Lease, tokens: Packed) -> None:
        """Adopt a parked sequence's full pages behind its pin, and extend the pin, hard, over all of them.

        Where the tree has a page already, the sequence gives its own copy up and reads the tree's: it has no row, so
        nothing is remapped, and what a step in flight may still read of the copy waits in LIMBO.
        """
        above = pin.node
        assert above is not None and pin.hard
        wanted = len(tokens) // self._page_bytes
        match = self._match_below(above, tokens, wanted)
        if match.pages:
            node = match.node
            if match.node_pages < len(node.pages):
                node = self._split(node, match.node_pages)
            path = [node]
            while path[-1].parent is not above:
                parent = path[-1].parent
                assert parent is not None
                path.append(parent)
            for each in reversed(path):
                self._harden(each)
                pin.pages.extend(each.pages)
            pin.node = node
            self._ledger.drop_head(lease, match.pages, self.step)
        if wanted > match.pages:
            self.publish_live(pin, lease, tokens[match.pages * self._page_bytes :])

    def publish_ended(self, pin: Pin, lease: Lease, tokens: Packed) -> int:
        """Adopt what the tree lacks of an ended sequence; copies of what it has stay in the lease. Returns how many.

        pin: the sequence's, not yet given back. tokens: those that follow the pinned ones, whole pages of them; lease:
        their pages, and maybe more. Nothing is pinned by this.
        """
        assert pin.node is not None and pin.hard
        wanted = len(tokens) // self._page_bytes
        match = self._match_below(pin.node, tokens, wanted)
        count = wanted - match.pages
        if count <= 0:
            return 0
        node = match.node
        if match.pages and match.node_pages < len(node.pages):
            node = self._split(node, match.node_pages)
        pages = self._ledger.publish(lease, match.pages, count)
        self.clock += 1
        self._touch(self._attach(node, tokens[match.pages * self._page_bytes :], pages))
        return count

    def _root(self, namespace: str) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            self._serial += 1
            root = self._roots[namespace] = Node(None, b"", array("i"), self._serial, 0)
        return root

    def _attach(self, parent: Node, tokens: Packed, pages: "array[int]") -> Node:
        self._serial += 1
        node = Node(parent, tokens, pages, self._serial, self.clock)
        self._enlist(node)
        node.last_step = self.step
        key = tokens[: self._page_bytes]
        assert key not in parent.children, "two nodes would begin with the same page"
        parent.children[key] = node
        return node

    def _split(self, node: Node, pages: int) -> Node:
        """Give the first `pages` pages of a node to a new parent, which is returned; receipts stay right (H20)."""
        assert 0 < pages < len(node.pages) and node.parent is not None
        size = self._page_bytes
        self._serial += 1
        upper = Node(node.parent, node.tokens[: pages * size], node.pages[:pages], self._serial, node.last_use)
        upper.hard, upper.soft, upper.last_step = node.hard, node.soft, node.last_step
        upper.looked = node.looked
        self.splits += 1
        self._enlist(upper)
        node.parent.children[upper.tokens[:size]] = upper
        node.tokens = node.tokens[pages * size :]
        node.pages = node.pages[pages:]
        node.parent = upper
        upper.children[node.tokens[:size]] = node
        return upper

    def _enlist(self, node: Node) -> None:
        self.nodes += 1
        if self._vacant_places:
            node.place = self._vacant_places.pop()
            self.places[node.place] = node
        else:
            node.place = len(self.places)
            self.places.append(node)

    def _delist(self, node: Node) -> None:
        self.nodes -= 1
        self.places[node.place] = None
        self._vacant_places.append(node.place)

    # -- eviction -----------------------------------------------------------------------------------------------

    def oldest_use(self) -> int | None:
        """When the node that would be evicted first was last used, in `clock`; None if nothing can be evicted now."""
        heap = self._evictable
        while heap:
            last_use = heap[0][0]
            if self._is_current(heap[0]):
                return last_use
            heappop(heap)
        return None

    def evict_oldest(self, pages_wanted: int) -> int:
        """Evict up to `pages_wanted` pages from the tail of the least recently used free leaf. Returns how many.

        They are free again when the step that was the newest as the leaf was unlocked has settled: mostly it has.
        """
        assert self.oldest_use() is not None
        node = self._evictable[0][2]
        kept = max(0, len(node.pages) - pages_wanted)
        pages = node.pages[kept:]
        if kept:
            node.pages = node.pages[:kept]
            node.tokens = node.tokens[: kept * self._page_bytes]
        else:
            heappop(self._evictable)
            self._detach(node)
        self._ledger.evict(pages, node.last_step)
        return len(pages)

    def _detach(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[node.tokens[: self._page_bytes]]
        node.parent = None
        node.pages = array("i")
        self._delist(node)
        self._offer(parent)

    def _touch(self, node: Node) -> None:
        node.last_use = self.clock
        self._offer(node)

    def _offer(self, node: Node) -> None:
        if self._is_evictable(node):
            self._offers += 1
            heappush(self._evictable, (node.last_use, self._offers, node))
            # Entries that later uses made stale are dropped lazily; never let them outnumber the nodes by much.
            if len(self._evictable) > 4 * self.nodes + 64:
                self._evictable = [entry for entry in self._evictable if self._is_current(entry)]
                heapify(self._evictable)

    def _is_current(self, entry: tuple[int, int, Node]) -> bool:
        return self._is_evictable(entry[2]) and entry[2].last_use == entry[0]

    @staticmethod
    def _is_evictable(node: Node) -> bool:
        return node.parent is not None and not node.children and node.hard == 0 and node.soft == 0

    # -- after a violation --------------------------------------------------------------------------------------

    def cut(self, node: Node) -> None:
        """Forget a node and all below it; nobody's pin may cover it. Their pages are left to `PageLedger.restore`."""
        parent = node.parent
        assert parent is not None
        # By identity: the key of a faulty node may be as wrong as the rest of it.
        parent.children = {key: child for key, child in parent.children.items() if child is not node}
        pending = [node]
        while pending:
            lost = pending.pop()
            pending.extend(lost.children.values())
            lost.children = {}
            lost.parent = None
            lost.pages = array("i")
            self._delist(lost)

    def restore(self, pins: "Iterable[Pin]") -> None:
        """Count pins, nodes and pinned pages anew from the receipts that are left."""
        nodes = list(self.walk())
        locked = [node for node in nodes if node.hard]
        for node in nodes:
            node.hard = node.soft = 0
        self.hard_pins = 0
        for pin in pins:
            self.hard_pins += pin.hard
            for node in pin.path():
                if pin.hard:
                    node.hard += 1
                else:
                    node.soft += 1
        for node in locked:
            if not node.hard:
                node.last_step = self.step
        self.nodes = len(nodes)
        self.hard_pages = sum(len(node.pages) for node in nodes if node.hard)
        self._evictable.clear()
        for node in nodes:
            self._offer(node)


def page_at(pin: Pin, lease: Lease, index: int) -> int:
    """The page with this index in a sequence, shared or own."""
    shared = len(pin.pages)
    return pin.pages[index] if index < shared else lease.pages[index - shared]
