"""Who owns which page: double-entry bookkeeping, and the only writer of page ownership.

Every page carries the tag of exactly one account. `_post` is the only mutation: it checks the tag of each page it
moves, rewrites it and moves the two balances; only `restore`, after a violation, takes the books for what they are. The
arrows, all of them:

    FREE → sequence                 draw
    sequence → TREE                 publish
    sequence, TREE → LIMBO → FREE   drop_tail, drop_head, release, evict; then settle
    anything → QUARANTINE → FREE    restore; then free_quarantined

An account belongs to one line of tokens (a request's, a session's). A `Lease` is the right to that account: an affine
value. Whoever holds it owns the pages; handing it over is O(1) and rewrites no tag.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from sessile.contract.plan import SCRATCH_PAGE
from sessile.errors import LeaseError, OwnershipError
from sessile.units import Account

# Pages are array("i") throughout the core: cheap to append to, and a buffer that numpy reads without a copy.
FREE, TREE, LIMBO, SCRATCH, QUARANTINE = (Account(slot) for slot in range(5))
_FIXED_NAMES = ("FREE", "TREE", "LIMBO", "SCRATCH", "QUARANTINE")
_SLOT_BITS = 20
_SLOT_MASK = (1 << _SLOT_BITS) - 1
_MANY = 64
"""A move of so many pages is faster as an array operation."""
_GENERATION_MASK = (1 << (32 - _SLOT_BITS)) - 1


class Lease:
    """The right to one sequence's account and so the ownership of its pages, in the order of their tokens.

    Affine: `hand_over`, `abandon`, `PageLedger.release` consume it, and a consumed lease raises LeaseError on any use;
    it cannot be copied or pickled; one that is garbage-collected while it owns pages is noted in `PageLedger.lost`.
    """

    __slots__ = ("_account", "_lost", "_pages")

    def __init__(self, account: Account, pages: "array[int]", lost: list[str]) -> None:
        self._account: Account | None = account
        self._pages = pages
        self._lost = lost

    @property
    def account(self) -> Account:
        """The account; raises LeaseError once consumed."""
        if self._account is None:
            raise LeaseError("this lease was consumed: its pages have another holder")
        return self._account

    @property
    def pages(self) -> "array[int]":
        """The owned pages, to be read only; raises LeaseError once consumed."""
        if self._account is None:
            raise LeaseError("this lease was consumed: its pages have another holder")
        return self._pages

    def hand_over(self) -> "Lease":
        """Consume this lease and return the same right as a new value, for the next holder. O(1)."""
        successor = Lease(self.account, self._pages, self._lost)
        self._account = None
        return successor

    @property
    def is_consumed(self) -> bool:
        """Whether the right has another holder."""
        return self._account is None

    def abandon(self) -> None:
        """Consume this lease and leave its pages to `PageLedger.restore`, which must follow. Does no harm twice."""
        self._account = None

    def __len__(self) -> int:
        return len(self.pages)

    def __copy__(self) -> NoReturn:
        raise LeaseError("a lease cannot be copied: hand it over")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise LeaseError("a lease cannot be copied: hand it over")

    def __reduce__(self) -> NoReturn:
        raise LeaseError("a lease cannot be pickled: it is ownership, not a record")

    def __del__(self) -> None:
        if self._account is not None and len(self._pages):
            self._lost.append(f"account {self._account:#x} was dropped with pages {self._pages[:8].tolist()}")


class PageLedger:
    """The owner of every page of a pool. Page 0 is SCRATCH from the start, all others are FREE."""

    def __init__(self, pages_total: int) -> None:
        assert pages_total >= 2, "a pool has the scratch page and at least one more"
        self.pages_total = pages_total
        self.lost: list[str] = []
        """Leases that were dropped while they owned pages; the audit fails on any."""
        self.floor_step = 0
        """What goes to LIMBO waits for this step at least: set while copies wait for the plan that will carry them."""
        # An array: the audit reads it as one of numpy's without a copy, and most moves are of a few pages, for which a
        # loop beats numpy's fixed cost.
        self._tags = array("I", [FREE]) * pages_total
        self._tag_view = np.frombuffer(self._tags, np.uint32)
        self._balances = [pages_total, 0, 0, 0, 0]
        self._generations = [0, 0, 0, 0, 0]
        self._vacant_slots: list[int] = []
        self._sequences: list[array[int]] = [array("i") for _ in _FIXED_NAMES]
        """By slot: the very array that the lease of an open account lists its pages in."""
        # A stack whose top is at the end; draws from a fresh pool ascend, so that neighbours stay neighbours.
        self._free = array("i", range(pages_total - 1, -1, -1))
        self._limbo: dict[int, array[int]] = {}
        self._quarantined = array("i")
        self.quarantine_step = 0
        """The newest step that may touch a page in QUARANTINE."""
        self._post(self._free[-1:], FREE, SCRATCH)
        assert self._free.pop() == SCRATCH_PAGE

    # -- reading ------------------------------------------------------------------------------------------------

    def balance(self, account: Account) -> int:
        """Pages that an open account owns."""
        slot = account & _SLOT_MASK
        assert self._generations[slot] == account >> _SLOT_BITS, f"account {account:#x} is closed"
        return self._balances[slot]

    @property
    def free_pages(self) -> int:
        """Pages that can be drawn now."""
        return self._balances[FREE]

    @property
    def limbo_pages(self) -> int:
        """Pages that become free when steps in flight settle."""
        return self._balances[LIMBO]

    @property
    def tags(self) -> npt.NDArray[np.uint32]:
        """uint32[pages_total]: the account of each page, as it is at any time; read only, for the audit."""
        return self._tag_view

    @property
    def tag_array(self) -> "array[int]":
        """The same for who looks at single pages; read only."""
        return self._tags

    @property
    def slots(self) -> int:
        """Slots of accounts, open and closed, those of the fixed accounts first."""
        return len(self._balances)

    def in_slot(self, slot: int) -> "tuple[Account, int, array[int]]":
        """(account, balance, pages) of the sequence in a slot; no pages if it is vacant. Read only, for the audit."""
        return Account(self._generations[slot] << _SLOT_BITS | slot), self._balances[slot], self._sequences[slot]

    @property
    def balances_total(self) -> int:
        """The balances of all accounts together: the pool, always."""
        return sum(self._balances)

    @property
    def free_stack(self) -> "array[int]":
        """The FREE pages; read only, for the audit."""
        return self._free

    def limbo_by_step(self) -> Iterator[tuple[int, "array[int]"]]:
        """(step, pages) of all that waits for that step; read only, for the audit."""
        yield from self._limbo.items()

    @property
    def quarantined(self) -> "array[int]":
        """The pages in QUARANTINE; read only, for the audit."""
        return self._quarantined

    def name(self, account: int) -> str:
        """An account's name for messages."""
        return _FIXED_NAMES[account] if account < len(_FIXED_NAMES) else f"sequence account {account:#x}"

    def open_accounts(self) -> Iterator[tuple[Account, int]]:
        """(account, balance) of every open sequence account that owns pages."""
        for slot in range(len(_FIXED_NAMES), len(self._balances)):
            if self._balances[slot]:
                yield Account(self._generations[slot] << _SLOT_BITS | slot), self._balances[slot]

    # -- the arrows ---------------------------------------------------------------------------------------------

    def open(self) -> Lease:
        """Open an account for one sequence; it owns nothing yet."""
        if self._vacant_slots:
            slot = self._vacant_slots.pop()
        else:
            slot = len(self._balances)
            assert slot <= _SLOT_MASK, "a million sequences hold KV at once: a limit above us failed"
            self._balances.append(0)
            self._generations.append(0)
            self._sequences.append(array("i"))
        pages = self._sequences[slot] = array("i")
        return Lease(Account(self._generations[slot] << _SLOT_BITS | slot), pages, self.lost)

    def draw(self, lease: Lease, count: int) -> "array[int]":
        """FREE → sequence: append `count` free pages to the lease and return them. The caller checked free_pages."""
        free = self._free
        assert 0 < count <= len(free), f"drew {count} pages of {len(free)} free ones"
        pages = free[: -count - 1 : -1]
        self._post(pages, FREE, lease.account)
        del free[-count:]
        lease.pages.extend(pages)
        return pages

    def draw_each(self, leases: Sequence[Lease]) -> "array[int]":
        """FREE → sequence: one page to each lease, in order. Returns all of them. The caller checked free_pages."""
        count = len(leases)
        free = self._free
        assert 0 < count <= len(free), f"drew {count} pages of {len(free)} free ones"
        pages = free[: -count - 1 : -1]
        self._post(pages, FREE, [lease.account for lease in leases])
        del free[-count:]
        for lease, page in zip(leases, pages, strict=True):
            lease.pages.append(page)
        return pages

    def publish(self, lease: Lease, start: int, count: int) -> "array[int]":
        """sequence → TREE: take pages [start, start + count) out of the lease; the tree must adopt them."""
        pages = lease.pages[start : start + count]
        assert len(pages) == count > 0, "published more pages than the sequence owns"
        self._post(pages, lease.account, TREE)
        del lease.pages[start : start + count]
        return pages

    def drop_tail(self, lease: Lease, pages_kept: int, step: int) -> int:
        """sequence → LIMBO: all pages but the first `pages_kept`; free when `step` settles. Returns how many."""
        pages = lease.pages[pages_kept:]
        if pages:
            self._to_limbo(pages, lease.account, step)
            del lease.pages[pages_kept:]
        return len(pages)

    def drop_head(self, lease: Lease, count: int, step: int) -> None:
        """sequence → LIMBO: the first `count` pages, whose tokens somebody else holds as well; free as above."""
        pages = lease.pages[:count]
        assert len(pages) == count > 0, "dropped more pages than the sequence owns"
        self._to_limbo(pages, lease.account, step)
        del lease.pages[:count]

    def release(self, lease: Lease, step: int) -> None:
        """sequence → LIMBO for all pages, and close the account: the one way a sequence ends. Consumes the lease."""
        account = lease.account
        self.drop_tail(lease, 0, step)
        lease.hand_over()._account = None
        self._close(account)

    def evict(self, pages: "array[int]", step: int) -> None:
        """TREE → LIMBO: pages that the tree gave up; free when `step` settles."""
        self._to_limbo(pages, TREE, step)

    def settle(self, step: int) -> None:
        """LIMBO → FREE: all that waited for steps up to and including `step`."""
        for stamp in [stamp for stamp in self._limbo if stamp <= step]:
            pages = self._limbo.pop(stamp)
            self._post(pages, LIMBO, FREE)
            pages.reverse()
            self._free.extend(pages)

    def free_quarantined(self) -> None:
        """QUARANTINE → FREE. The caller has proven, by a check of everything, that nobody lists the pages, and
        `quarantine_step` has settled.
        """
        pages, self._quarantined = self._quarantined, array("i")
        if pages:
            self._post(pages, QUARANTINE, FREE)
            self._free.extend(pages)

    # -- after a violation --------------------------------------------------------------------------------------

    def restore(
        self, held: "Sequence[tuple[Account, array[int]]]", suspects: "array[int]", step: int
    ) -> int:
        """Make tags, balances and lists agree again; returns how many pages go to QUARANTINE.

        held: the account and pages of every lease and tree node that is left. A page stays where its tag says if it is
        listed there; all others, which nobody can be right about, go to QUARANTINE, and so does what is free or in
        limbo among the suspects: pages that somebody listed wrongly, and that `step`, the newest planned, may still
        touch. Accounts that nobody holds are closed.
        """
        tags = self.tags.copy()
        listed = np.zeros(self.pages_total, np.bool_)
        listed[SCRATCH_PAGE] = True
        for account, pages in held:
            indices = np.array(pages, np.int64)
            listed[indices[tags[indices] == account]] = True
        suspected = np.array(suspects, np.int64)
        suspected = suspected[(tags[suspected] == FREE) | (tags[suspected] == LIMBO)]
        tags[suspected] = QUARANTINE
        lists = [(FREE, self._free), (QUARANTINE, self._quarantined), *((LIMBO, each) for each in self._limbo.values())]
        for account, pages in lists:
            _keep_rightful(account, pages, tags, listed)
        strays = (~listed).nonzero()[0]
        tags[strays] = QUARANTINE
        tags[SCRATCH_PAGE] = SCRATCH
        self._quarantined.extend(strays.tolist())
        self.quarantine_step = max(step, self.floor_step)
        self._tag_view[:] = tags
        self._balances[:] = np.bincount(tags & _SLOT_MASK, minlength=len(self._balances)).tolist()
        self._close_all_but(dict.fromkeys(account for account, _ in held))
        self.lost.clear()
        return len(strays)

    def _close_all_but(self, kept: dict[Account, None]) -> None:
        vacant = dict.fromkeys(self._vacant_slots)
        for slot in range(len(_FIXED_NAMES), len(self._balances)):
            account = self.in_slot(slot)[0]
            if slot not in vacant and account not in kept:
                self._sequences[slot] = array("i")
                self._close(account)

    def _close(self, account: Account) -> None:
        slot = account & _SLOT_MASK
        # A forgotten tail fails here, with its owner's name, not in some later sum (H06, H09).
        if self._balances[slot] != 0:
            raise OwnershipError(f"{self.name(account)} was closed with {self._balances[slot]} pages on its name")
        self._generations[slot] = (self._generations[slot] + 1) & _GENERATION_MASK
        self._vacant_slots.append(slot)

    def _to_limbo(self, pages: "array[int]", source: Account, step: int) -> None:
        self._post(pages, source, LIMBO)
        step = max(step, self.floor_step)
        waiting = self._limbo.get(step)
        if waiting is None:
            self._limbo[step] = pages
        else:
            waiting.extend(pages)

    def _post(self, pages: "array[int]", source: Account, target: "Account | list[Account]") -> None:
        """Move pages from source to target: the only place where ownership changes.

        pages: each owned by source. target: one account for all, or one for each page. Raises OwnershipError naming
        the first page that is not source's, with its owner; nothing has moved then.
        """
        tags, balances = self._tags, self._balances
        if len(pages) >= _MANY and not isinstance(target, list):
            indices = np.array(pages, np.int64)
            wrong = self._tag_view[indices] != source
            if wrong.any():
                raise self._foreign(pages[int(wrong.argmax())], source)
            self._tag_view[indices] = target
            balances[target & _SLOT_MASK] += len(pages)
            balances[source & _SLOT_MASK] -= len(pages)
            return
        for page in pages:
            if tags[page] != source:
                raise self._foreign(page, source)
        if isinstance(target, list):
            for page, account in zip(pages, target, strict=True):
                tags[page] = account
                balances[account & _SLOT_MASK] += 1
        else:
            for page in pages:
                tags[page] = target
            balances[target & _SLOT_MASK] += len(pages)
        balances[source & _SLOT_MASK] -= len(pages)

    def _foreign(self, page: int, expected: Account) -> OwnershipError:
        return OwnershipError.foreign_page(page, expected=self.name(expected), found=self.name(self._tags[page]))


def _keep_rightful(
    account: Account, pages: "array[int]", tags: npt.NDArray[np.uint32], listed: npt.NDArray[np.bool_]
) -> None:
    """Leave in a list of ours what is tagged so and listed nowhere else, once; mark it as listed."""
    indices = np.array(pages, np.int64)
    rightful = (tags[indices] == account) & ~listed[indices]
    first = np.zeros(len(indices), np.bool_)
    first[np.unique(indices, return_index=True)[1]] = True
    rightful &= first
    if not rightful.all():
        pages[:] = array("i", indices[rightful].tolist())
    listed[indices[rightful]] = True
