"""The audit of a machine while it runs, at the level that its limits say, and what follows if it finds something."""

from dataclasses import dataclass

from sessile.core.audit import check
from sessile.core.books import Books
from sessile.core.containment import contain, restore
from sessile.core.rolling import LOOK_STEPS, RollingAudit
from sessile.errors import AuditError


@dataclass(frozen=True)
class Report:
    """A violation that was contained, for the log."""

    found: list[str]
    """What was found, each with its kind before it."""
    quarantined_pages: int
    events: list[str]
    """The last events of the machine before, oldest first."""


class Watch:
    """Looks at the books after each step. Holds the rolling audit's place and the reports that nobody took yet."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._rolling = RollingAudit(books)
        self._steps_since_look = 0
        self._reports: list[Report] = []

    def settled(self) -> None:
        """A step has settled: at level 2, audit; contain what is found, or raise it, as the limits say."""
        books = self._books
        # Whoever was expelled meanwhile left the books to be restored: there is nothing to look at before.
        error = self._checked() if books.limits.audit_level >= 2 and not books.failures else None
        if error is not None or books.failures:
            self._contain(error)
        self.planning()

    def look(self) -> None:
        """Level 1: every few steps the next part of the rolling audit; contain what is found, or raise it."""
        if self._books.limits.audit_level != 1:
            return
        self._steps_since_look += 1
        if self._steps_since_look < LOOK_STEPS:
            return
        self._steps_since_look = 0
        try:
            self._rolling.look()
        except AuditError as error:
            self._contain(self._caught(error))

    def planning(self) -> None:
        """A step is about to be planned, or could be: what was expelled between steps must not wait for another one."""
        books = self._books
        if books.failures:
            self._contain(None)
        if books.ledger.quarantined and books.ledger.quarantine_step <= books.settled_step:
            # Proven free by a check of everything that passes: nobody lists the pages, and no step can touch them.
            error = self._checked()
            if error is not None:
                self._contain(error)
            else:
                books.ledger.free_quarantined()

    def take_reports(self) -> list[Report]:
        """What was contained since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def _checked(self) -> AuditError | None:
        try:
            check(self._books)
        except AuditError as error:
            return self._caught(error)
        return None

    def _caught(self, error: AuditError) -> AuditError:
        """The error, to be contained; raises it if it is not to be."""
        if not self._books.limits.contain_violations:
            raise error
        return error.with_traceback(None)  # Its frames hold what is about to be taken from its holders.

    def _contain(self, error: AuditError | None) -> None:
        """Expel whom the check names, until it names nobody. Raises AuditError if that does not help."""
        books = self._books
        events = books.events.lines()
        found: list[str] = []
        for kind, failure in books.failures:
            self._count(kind, failure, found)
        books.failures.clear()
        pages = 0
        while True:
            if error is not None:
                repeats = f"{error.kind}: {error}" in found
                self._count(error.kind, str(error), found)
                if repeats or error.kind == "rows":
                    # Who sits where, or which list is wrong, nobody can say: there is no going on.
                    raise error
                contain(books, error)
            pages += restore(books)
            error = self._checked()
            if error is None:
                break
        self._reports.append(Report(found, pages, events))

    def _count(self, kind: str, message: str, found: list[str]) -> None:
        books = self._books
        books.totals.violations[kind] = books.totals.violations.get(kind, 0) + 1
        books.events.noted(f"violation of {kind}: {message}")
        found.append(f"{kind}: {message}")
