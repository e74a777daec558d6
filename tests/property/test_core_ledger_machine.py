"""The ledger against a dictionary of who owns which page, over any order of its arrows."""

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sessile.core.ledger import FREE, LIMBO, QUARANTINE, SCRATCH, TREE, Lease, PageLedger

PAGES = 80
choice = st.integers(0, 1000)


class LedgerAgainstDictionary(RuleBasedStateMachine):
    """Holders do what they may with their leases; a plain dictionary is told the same."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(PAGES)
        self.leases: list[Lease] = []
        self.owners: dict[int, int | str] = {page: "free" for page in range(1, PAGES)}
        """page → account of a sequence, or what else owns it; limbo as "limbo until <step>"."""
        self.published: list[int] = []
        self.step = 0

    def pick(self, choice: int) -> Lease:
        return self.leases[choice % len(self.leases)]

    def leaves(self, pages: list[int], step: int) -> None:
        self.owners |= {page: f"limbo until {step}" for page in pages}

    @rule()
    def open(self) -> None:
        lease = self.ledger.open()
        assert lease.account not in [other.account for other in self.leases]
        self.leases.append(lease)

    @precondition(lambda self: self.leases and self.ledger.free_pages)
    @rule(choice=choice, share=st.sampled_from([1, 2, 30, 79]))
    def draw(self, choice: int, share: int) -> None:
        lease = self.pick(choice)
        drawn = list(self.ledger.draw(lease, min(share, self.ledger.free_pages)))
        assert {self.owners[page] for page in drawn} == {"free"}
        assert list(lease.pages[-len(drawn) :]) == drawn
        self.owners |= dict.fromkeys(drawn, int(lease.account))

    @precondition(lambda self: any(len(lease) for lease in self.leases))
    @rule(choice=choice, start=choice, count=choice)
    def publish(self, choice: int, start: int, count: int) -> None:
        full = [lease for lease in self.leases if len(lease)]
        lease = full[choice % len(full)]
        start %= len(lease)
        pages = list(self.ledger.publish(lease, start, 1 + count % (len(lease) - start)))
        self.owners |= dict.fromkeys(pages, "tree")
        self.published += pages

    @precondition(lambda self: self.published)
    @rule(count=choice, ahead=st.integers(0, 2))
    def evict(self, count: int, ahead: int) -> None:
        kept = count % len(self.published)
        pages, self.published = self.published[kept:], self.published[:kept]
        self.ledger.evict(array("i", pages), self.step + ahead)
        self.leaves(pages, self.step + ahead)

    @precondition(lambda self: self.leases)
    @rule(choice=choice, kept=choice, ahead=st.integers(0, 2))
    def drop_tail(self, choice: int, kept: int, ahead: int) -> None:
        lease = self.pick(choice)
        kept %= len(lease) + 1
        pages = list(lease.pages[kept:])
        assert self.ledger.drop_tail(lease, kept, self.step + ahead) == len(pages)
        self.leaves(pages, self.step + ahead)

    @precondition(lambda self: self.leases)
    @rule(choice=choice, ahead=st.integers(0, 2))
    def release(self, choice: int, ahead: int) -> None:
        lease = self.leases.pop(choice % len(self.leases))
        self.leaves(list(lease.pages), self.step + ahead)
        self.ledger.release(lease, self.step + ahead)

    @precondition(lambda self: self.leases)
    @rule(choice=choice)
    def hand_over(self, choice: int) -> None:
        index = choice % len(self.leases)
        self.leases[index] = self.leases[index].hand_over()

    @precondition(lambda self: len(self.leases) > 3)
    @rule(choice=choice)
    def quarantine(self, choice: int) -> None:
        lease = self.leases.pop(choice % len(self.leases))
        self.owners |= dict.fromkeys(lease.pages, "quarantine")
        pages = len(lease)
        lease.abandon()
        held = [(each.account, each.pages) for each in self.leases] + [(TREE, array("i", self.published))]
        assert self.ledger.restore(held, array("i"), self.step) == pages

    @rule()
    def free_quarantined(self) -> None:
        self.ledger.free_quarantined()
        self.owners |= {page: "free" for page, owner in self.owners.items() if owner == "quarantine"}

    @rule()
    def settle(self) -> None:
        self.step += 1
        self.ledger.settle(self.step)
        for page, owner in self.owners.items():
            if isinstance(owner, str) and owner.startswith("limbo") and int(owner.split()[-1]) <= self.step:
                self.owners[page] = "free"

    @invariant()
    def tags_are_what_the_dictionary_says(self) -> None:
        names = {int(FREE): "free", int(TREE): "tree", int(QUARANTINE): "quarantine"}
        tags = self.ledger.tags.tolist()
        assert tags[0] == SCRATCH
        for page, owner in self.owners.items():
            found = "limbo" if tags[page] == LIMBO else names.get(tags[page], tags[page])
            assert found == (owner.split()[0] if isinstance(owner, str) else owner)

    @invariant()
    def balances_and_holdings_are_what_the_dictionary_says(self) -> None:
        assert sorted(self.ledger.free_stack) == [page for page, owner in self.owners.items() if owner == "free"]
        for lease in self.leases:
            owned = [page for page, owner in self.owners.items() if owner == lease.account]
            assert sorted(lease.pages) == owned
            assert self.ledger.balance(lease.account) == len(owned)
        assert self.ledger.lost == []

    def teardown(self) -> None:
        for lease in self.leases:
            self.ledger.release(lease, self.step)


LedgerAgainstDictionary.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLedgerAgainstDictionary = LedgerAgainstDictionary.TestCase
