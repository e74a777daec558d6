"""Every exception of ours. What the user caused says what to do; what we caused names the invariant.

SessileError
├── UserError            a request we refuse; state is untouched; becomes a 4xx with message, code and param
│   ├── InvalidRequest   400: malformed, out of range, unsupported
│   │   └── DuplicateSession  a session with this id is open already
│   ├── Unauthenticated  401: no valid key
│   ├── Forbidden        403: a valid key that may not do this
│   ├── NotFound         404: no such session, model or request
│   ├── SessionBusy      409: a turn is in flight
│   ├── HistoryMismatch  409: the session's history is not as long as the client says
│   ├── AnswerChanged    409: raised by a client alone: what was sent again was answered otherwise
│   ├── SessionClosed    410: close was requested
│   ├── TooLong          413: does not fit the context, the pool, the session's cap or the body limit
│   └── LimitReached     429: queue or session limit; try again later
├── NotReady             503: starting, draining, or the engine died
├── CorpusFileError      a file that is no index of a corpus, or not a whole one; nothing was loaded
├── BuildCancelled       the building of a corpus was told to stop; nothing was built
├── OutOfMemory          a step that the device has too little memory for; it may be run again in smaller ones
├── StartupError         a configuration or file we cannot serve with; one line with the remedy; exit code 2
│   └── MachineLacks     memory or a GPU, which may be there at another try; a server's exit code is 1
└── InvariantError       a bug of ours: never caught on the way, except to quarantine or to end the engine
    ├── OwnershipError   a page or row was not owned by whom the caller said
    ├── LeaseError       a consumed lease was used, or a live one was copied or lost
    ├── PlanError        a plan or result that contradicts the core's books
    └── AuditError       the audit found books and holders to differ
"""

from collections.abc import Iterator


class SessileError(Exception):
    """Root of all exceptions that Sessile raises on purpose."""


class UserError(SessileError):
    """A refused request. `status` is the HTTP status, `code` a stable word, `param` the field at fault or None."""

    status = 400
    code = "invalid_request"
    retry_after_s: float | None = None
    """For a client: when the server said to come back."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(UserError):
    """Malformed, out of range, or not supported."""


class DuplicateSession(InvalidRequest):
    """A session with this id is open already."""

    code = "duplicate_session"


class Unauthenticated(UserError):
    """The request has no valid key."""

    status = 401
    code = "invalid_api_key"


class Forbidden(UserError):
    """The request's key is valid, and does not allow this."""

    status = 403
    code = "forbidden"


class NotFound(UserError):
    """No such session, model or request."""

    status = 404
    code = "not_found"


class SessionBusy(UserError):
    """The session already has a turn in flight."""

    status = 409
    code = "session_busy"


class HistoryMismatch(UserError):
    """The session's history is longer or shorter than the client says it is."""

    status = 409
    code = "history_mismatch"


class AnswerChanged(UserError):
    """A client's stream broke, and the answer that was made again differs from what had come of it."""

    status = 409
    code = "answer_changed"


class SessionClosed(UserError):
    """Close was requested for this session."""

    status = 410
    code = "session_closed"


class TooLong(UserError):
    """Does not fit the context length, the pool, the session's cap or the body limit."""

    status = 413
    code = "too_long"


class LimitReached(UserError):
    """A queue or session limit is reached; trying again later may succeed."""

    status = 429
    code = "limit_reached"


class NotReady(UserError):
    """The server is starting or draining, or its engine process has died."""

    status = 503
    code = "not_ready"


def error_of(status: int, code: str, message: str, param: str | None = None) -> UserError:
    """A UserError that crossed a wire: of the class with this code, else of the one with this status."""
    kinds = list(_kinds_of(UserError))
    fitting = [kind for kind in kinds if kind.code == code] or [kind for kind in kinds if kind.status == status]
    error = (fitting or [UserError])[0](message, param=param)
    error.status, error.code = status, code or error.code
    return error


def _kinds_of(kind: type[UserError]) -> Iterator[type[UserError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _kinds_of(child)


class CorpusFileError(SessileError):
    """The file is no index of a corpus, or is truncated, damaged or of another version; nothing was loaded."""


class BuildCancelled(SessileError):
    """Whoever asked for the index of a corpus took the wish back; nothing was built."""


class OutOfMemory(SessileError):
    """The device has too little memory for a step. It may be run again: nothing that it left would be noticed."""


class StartupError(SessileError):
    """We cannot start; the message is one line that says what is wrong and what to do."""


class MachineLacks(StartupError):
    """We cannot start with the free memory or the GPU that is there now. Unlike else, another try may succeed."""


class InvariantError(SessileError, AssertionError):
    """A bug of ours, found by a check that is always on."""


class OwnershipError(InvariantError):
    """A page or row is not owned by whom the caller said it is."""

    @classmethod
    def foreign_page(cls, page: int, *, expected: str, found: str) -> "OwnershipError":
        return cls(f"page {page} should belong to {expected} but belongs to {found}")


class LeaseError(InvariantError):
    """A consumed lease was used again, or a live lease was copied or lost."""


class PlanError(InvariantError):
    """A plan or a result contradicts the core's books."""


class AuditError(InvariantError):
    """Books and holders differ; the message names the account, the page and both views.

    kind: which part of the books: "pages", "pins", "rows", "lengths", "sessions" or "counters". keys, sessions, nodes:
    requests, sessions and tree nodes (both by serial) that the books cannot be right about; none if only a list or a
    counter of ours is wrong.
    """

    def __init__(
        self,
        message: str,
        kind: str = "pages",
        *,
        keys: tuple[int, ...] = (),
        sessions: tuple[int, ...] = (),
        nodes: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.keys = keys
        self.sessions = sessions
        self.nodes = nodes
