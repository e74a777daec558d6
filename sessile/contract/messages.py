"""Messages between a server (HTTP front end) and the engine, as msgspec structs, tagged by class name.

Token arrays cross as int32 little-endian bytes (`pack_tokens`, `unpack_tokens`): 100,000 ids as msgpack integers cost
milliseconds, as bytes microseconds. A request is a number (`key`) that the server chose and never uses again; its
string id stays in the server. Operations on sessions carry `op`, a number that comes back in the reply.
"""

from collections.abc import Sequence
from typing import TypeVar

import msgspec
import msgspec.structs
import numpy as np
import numpy.typing as npt

from sessile.contract.corpora import CorpusOperation, CorpusUses
from sessile.contract.patterns import StopPattern
from sessile.contract.pool import PoolView


def pack_tokens(tokens: "Sequence[int] | npt.NDArray[np.int32]") -> bytes:
    """Token ids as int32 little-endian bytes."""
    return np.asarray(tokens, "<i4").tobytes()


def unpack_tokens(packed: bytes) -> npt.NDArray[np.int32]:
    """int32[n], a read-only view of the packed bytes."""
    return np.frombuffer(packed, "<i4")


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How a request's output is chosen and where it ends. Ranges are checked by the server and asserted by the core."""

    seed: int
    """64-bit noise seed ≥ 0; the server draws one where the client gave none."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    max_new_tokens: int | None = None
    """None: what the context leaves. 0: compute the prompt and end."""
    min_new_tokens: int = 0
    """Before this many output tokens neither end-of-sequence nor stop tokens are sampled; stop strings wait too."""
    stop: tuple[bytes, ...] = ()
    """Stop strings as UTF-8. Matched on the bytes of the output (special tokens count as nothing when skipped)."""
    stop_patterns: tuple[StopPattern, ...] = ()
    """Patterns on the same bytes; the output ends with the token in which a match ends, and keeps it."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an output must be. Its text is compiled in the engine, beside the step loop: sessile/grammar.

    kind: "json_schema" (source: a schema as JSON), "json_object" (any object; source is empty), "regex" (of the
    whole output), "ebnf" (GBNF or Lark, from `root` or `start` on), or "lark" (the server's own: Lark as llguidance
    has it, special tokens included). field: the field of the request that it came from, to be named if it is
    refused. lead: of "json_schema" and "json_object": the rule `lead` and those it needs, in Lark, of what stands
    before the JSON, as reasoning does.
    """

    kind: str
    source: str
    field: str = ""
    lead: str = ""


class Branch(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Where a turn of a branching session goes on; fields as in SGLang's `session_params`."""

    parent: str | None = None
    """`rid` of the turn to go on from; None: a new root."""
    offset: int = 0
    """Other than 0: only the first so many tokens of the parent's context count; negative as in Python."""
    replace: bool = False
    """Drop what else descends from the parent, and end it with an abort where it runs; the parent too, if it runs."""
    drop_previous_output: bool = False
    """Go on from the parent's input, without its output."""


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """A plain request, or, with `session`, the next turn of a session. Answered by deltas and exactly one Done."""

    key: int
    tokens: bytes
    sampling: Sampling
    tenant: str = ""
    """Who asks: sessions are found, limits counted, prefixes shared and steps divided by tenant."""
    priority: int = 0
    """Higher goes first among the tenant's own requests."""
    group: int = -1
    """-1, or what requests in flight with the same prompt have in common, a number as keys are: one computes it."""
    session: str | None = None
    rid: str = ""
    """With a session, the name of this turn: the same name again within the last turn repeats its reply."""
    rid_drawn: bool = False
    """The server drew `rid`: it names a turn of a branching session, but nobody can send it again, so the reply is not
    kept."""
    branch: Branch | None = None
    """For branching sessions; None is a new root there. In a streaming session it may only name a parent, which is
    ignored."""
    expect_tokens: int = -1
    """-1, or the length that the client believes the session's history has: another length is 409."""
    logprobs: int = -1
    """-1: none; k ≥ 0: of each output token, with the k most likely beside it."""
    prompt_logprobs_from: int = -1
    """-1: none; p ≥ 0: of the prompt tokens from position max(p, 1) of the whole context on (Scores); what lies in a
    session's committed history is not computed again and has none."""
    speculate: bool | None = None
    """Whether drafts are looked up for it; None: as the engine does by default. True is refused where it never does."""
    drafts_max: int = -1
    """Most drafts in a step; -1: as many as the engine allows."""
    corpora: tuple[str, ...] | None = None
    """The corpora to look in, by id; None: all that the tenant may use."""
    grammar: Grammar | None = None
    """What the output must be; it binds this turn's output alone. An end-of-sequence token may come exactly where the
    grammar may end, and comes where it must."""
    remember: bool = False
    """Let later requests of the tenant look their drafts up in this one, if it comes to its own end."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request now, as an abort. Unknown or finished keys are ignored."""

    key: int
    message: str = "aborted by the client"
    if_waiting: bool = False
    """Only if no step has been planned for it yet; it is refused then, with 503."""


class CancelAll(msgspec.Struct, frozen=True, tag=True):
    """End every request. Reply: Outcome {"cancelled": count}."""

    op: int


class OpenSession(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Open a session. Reply: its SessionView; 400 duplicate_session; 429 too many, or too much reserved."""

    op: int
    session: str
    tenant: str = ""
    branching: bool = False
    """Any finished turn may be gone on from, several side by side; else one line of turns."""
    reserve_tokens: int = 0
    """KV for so many tokens is kept for this session, used or not, and never reclaimed."""
    idle_timeout_s: float | None = None
    """Close by itself when no turn was in flight for so long; None: never."""
    tokens_max: int | None = None
    """Cap on the session's history; None: the context length."""
    metadata: dict[str, str] = {}


class CloseSession(msgspec.Struct, frozen=True, tag=True):
    """Close a session, at the end of its turn if one is in flight.

    Reply: Outcome {"closed": bool, "deferred": bool}; 404 for an unknown session.
    """

    op: int
    session: str
    tenant: str = ""


class ForkSession(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Open a session that begins with the first tokens of an idle one. Reply: SessionView of the child.

    at_tokens or at_turn: where to fork, the end if both are None. The child has the parent's idle time-out and cap.
    404, 409 while a turn is in flight, 410; 400 beyond the history; 400 duplicate_session; 429 too many.
    """

    op: int
    session: str
    child: str
    tenant: str = ""
    at_tokens: int | None = None
    at_turn: int | None = None


class RewindSession(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Cut an idle session's history. Reply: SessionView. Exactly one of to_tokens and to_turn; errors as for forks."""

    op: int
    session: str
    tenant: str = ""
    to_tokens: int | None = None
    to_turn: int | None = None


class CommittedTurn(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A turn that was committed: its name, and what is needed to answer it again. In a branching session, a whole node.

    Without `done` it cannot be answered again: no client knows its name, or it said more than tokens.
    """

    rid: str
    input: bytes = b""
    """What it was sent with."""
    done: "Done | None" = None
    parent: str | None = None
    """Of a node: the turn of this session that it goes on from, restored before it; None: a root."""
    base_tokens: int = 0
    """Of a node: how much of its parent's history it begins with."""
    tokens: bytes = b""
    """Of a node: its history behind that."""
    input_end: int = 0
    """Of a node: where its output begins."""


class RestoreSession(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Open a session with the history, or the turns, that it had in an engine which is gone. It begins without KV.

    Reply and refusals: as of OpenSession; 413 if the history does not fit. What a tenant may hold is not asked again.
    """

    op: int
    opening: OpenSession
    """As it was opened; its own `op` means nothing."""
    tokens: bytes
    turn_ends: tuple[int, ...]
    """Length of the history after each committed turn, rising."""
    last: CommittedTurn | None = None
    nodes: tuple[CommittedTurn, ...] = ()
    """Of a branching session, which has no single history: its turns, each behind its parent."""


class DropTurn(msgspec.Struct, frozen=True, tag=True):
    """Forget one finished turn of a branching session; what goes on from it stays as it is.

    Reply: Outcome {}. 404 for an unknown session or turn, 400 in a streaming session, 409 while the turn is in flight.
    """

    op: int
    session: str
    rid: str
    tenant: str = ""


class GetSession(msgspec.Struct, frozen=True, tag=True):
    """Reply: SessionView, or 404."""

    op: int
    session: str
    tenant: str = ""


class ListSessions(msgspec.Struct, frozen=True, tag=True):
    """Reply: SessionPage of the tenant's sessions in order of opening, after the named one (or from the first)."""

    op: int
    after: str | None = None
    limit: int = 100
    tenant: str = ""


class SessionTokens(msgspec.Struct, frozen=True, tag=True):
    """Reply: Outcome {"tokens": int32 bytes} of the committed history, or 404."""

    op: int
    session: str
    tenant: str = ""


class Flush(msgspec.Struct, frozen=True, tag=True):
    """Drop all KV; sessions keep their tokens. Reply: Outcome {"pages": freed}; 400 while anything runs or waits."""

    op: int


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Reply: Stats. Answered by the step loop itself, so an answer proves that it turns."""

    op: int


class GetPool(msgspec.Struct, frozen=True, tag=True):
    """Reply: PoolView, with the `holders` requests and sessions that own most pages named one by one."""

    op: int
    holders: int = 100


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine process. With drain, refuse new requests and finish what is in flight first."""

    drain_s: float = 0.0


ToEngine = (
    Submit
    | Cancel
    | CancelAll
    | OpenSession
    | CloseSession
    | ForkSession
    | RewindSession
    | RestoreSession
    | DropTurn
    | GetSession
    | ListSessions
    | SessionTokens
    | Flush
    | GetStats
    | GetPool
    | CorpusOperation
    | Shutdown
)


class SourceFigures(msgspec.Struct, frozen=True):
    """What one source of drafts did. source: "session", "history", or "corpus:" and its id."""

    source: str
    drafts_offered: int
    drafts_accepted: int


class Done(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """The one end of a request. All its tokens were in deltas up to and including this batch."""

    key: int
    reason: str
    """"stop", "length", "abort" (cancelled, disconnected, session closed) or "error" (refused or failed)."""
    matched: int | bytes | None = None
    """What stopped it: token id, stop string or pattern."""
    kept_bytes: int = -1
    """With a stop string: bytes of output before the match (counted as the matcher saw them); else -1."""
    prompt_tokens: int = 0
    """The whole context: a session's history and the new input."""
    cached_tokens: int = 0
    """Of these, tokens whose KV was there when the request was first admitted."""
    computed_tokens: int = 0
    """Prompt tokens the device counted as computed, recomputation after a preemption not included."""
    completion_tokens: int = 0
    preemptions: int = 0
    session_tokens: int = -1
    """Length of the session's history after this turn, or -1 without session or commit."""
    drafts_offered: int = -1
    """Drafts that the model has verified; -1: none were looked up for this request."""
    drafts_accepted: int = 0
    """Tokens that it was sent beyond one a step, thanks to these."""
    sources: list[SourceFigures] = []
    """The same by source, as the drafter counts them."""
    status: int = 200
    """HTTP status that describes a refusal: 4xx or 5xx with reason "error" and "abort"; else 200."""
    code: str = ""
    message: str = ""
    param: str | None = None


class TokenDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """Log-probabilities of the tokens of one request in this batch; parallel to its delta tokens.

    logprobs: f32 bytes [tokens]; top_ids: i32 bytes [tokens, k]; top_logprobs: f32 bytes [tokens, k].
    """

    key: int
    logprobs: bytes
    top_ids: bytes = b""
    top_logprobs: bytes = b""


class Scores(msgspec.Struct, frozen=True, omit_defaults=True):
    """Log-probabilities of prompt tokens, chunk by chunk, each position once and in order; before the first delta.

    start: position of the first scored token in the whole context. Arrays as in TokenDetail.
    """

    key: int
    start: int
    tokens: bytes
    logprobs: bytes
    top_ids: bytes = b""
    top_logprobs: bytes = b""


_Keyed = TypeVar("_Keyed", Done, Scores)


def with_key(message: _Keyed, key: int) -> _Keyed:
    """The same message to another request."""
    return msgspec.structs.replace(message, key=key)


def with_drafts(done: Done, offered: int, accepted: int, sources: list[SourceFigures]) -> Done:
    """The same end, with what drafts did for the request."""
    return msgspec.structs.replace(done, drafts_offered=offered, drafts_accepted=accepted, sources=sources)


class SessionView(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A session as shown to its owner."""

    id: str
    tenant: str = ""
    branching: bool = False
    phase: str
    """"idle", "queued", "running", "preempted" or "closing"."""
    tokens: int
    """Committed history."""
    kv_tokens: int
    """Of these, with KV on the device right now."""
    own_pages: int
    shared_pages: int
    turns: int
    opened_s: float
    """Engine time, seconds since the engine started."""
    last_used_s: float
    idle_timeout_s: float | None = None
    tokens_max: int
    reserved_tokens: int = 0
    metadata: dict[str, str] = {}


class SessionPage(msgspec.Struct, frozen=True, tag=True):
    """One page of the list of sessions; `more` says whether another follows."""

    sessions: list[SessionView]
    more: bool
    total: int


class SessionGone(msgspec.Struct, frozen=True):
    """A session ended without being asked to just now: it expired, or a deferred close took effect."""

    session: str
    reason: str
    """"expired" or "closed"; "lost" with an engine, which the server says to itself."""
    tenant: str = ""


class TenantFigures(msgspec.Struct, frozen=True):
    """What one tenant has at this moment."""

    name: str
    requests: int
    """Running or waiting."""
    input_tokens: int
    """Of these requests, committed histories not included."""
    sessions: int
    held_tokens: int
    """Of its sessions' histories together."""


class Stats(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Live figures and running totals of the engine; gauges are of this moment, totals only grow."""

    steps_total: int
    settled_steps_total: int
    time_s: float
    rows_total: int
    rows_held: int
    requests_running: int
    requests_waiting: int
    requests_draining: int
    pages_total: int
    pages_free: int
    pages_limbo: int
    pages_tree: int
    pages_tree_pinned: int
    pages_requests: int
    pages_sessions: int
    pages_quarantine: int
    pages_scratch: int
    pages_reserved: int
    """Promised to sessions; those that hold no KV count among pages_sessions."""
    page_size: int
    sessions_open: int
    sessions_idle: int
    sessions_by_phase: dict[str, int]
    """As in SessionView."""
    session_tokens: int
    tenants: list[TenantFigures]
    """Of every tenant that has a name."""
    finished_total: dict[str, int]
    """By reason: stop, length, abort, error."""
    turns_committed_total: int
    turns_rolled_back_total: int
    turns_replayed_total: int
    """Replies that were said again because a client had lost them."""
    forks_total: int
    """Branches of branching sessions included."""
    rewinds_total: int
    prompt_tokens_total: int
    cached_tokens_total: int
    computed_tokens_total: int
    generated_tokens_total: int
    preemptions_total: int
    recomputed_tokens_total: int
    """Computed again after a preemption."""
    reclaimed_tokens_total: int
    """Of session histories: their KV was gone when a turn was admitted, so they were computed again."""
    evicted_pages_total: int
    demoted_pages_total: int
    drafts_offered_total: int
    drafts_accepted_total: int
    verifications_total: int = 0
    """How often a row had drafts in a step."""
    sources: list[SourceFigures] = []
    """Drafts by source, of ended requests."""
    draft_wall_s_total: float = 0.0
    """Spent on looking drafts up."""
    audit_checks_total: int
    audit_failures_total: int
    audit_violations_total: dict[str, int] = {}
    """By kind: pages, pins, rows, lengths, sessions, counters, and row for one that could not be settled."""
    quarantined_pages_total: int = 0
    step_wall_s_total: float = 0.0
    plan_wall_s_total: float = 0.0
    memory_shortages_total: int = 0
    """How often the device ran out of memory in a step, and ran it in smaller ones."""


class Outcome(msgspec.Struct, frozen=True, tag=True):
    """What an operation did, as named numbers (or token bytes); the operation's docstring lists the names."""

    values: dict[str, int | bool | bytes]


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer to an operation; exactly one for each op. error is None on success."""

    op: int
    value: SessionView | SessionPage | Stats | PoolView | CorpusUses | Outcome | None = None
    error: "Refusal | None" = None


class Refusal(msgspec.Struct, frozen=True, omit_defaults=True):
    """A UserError on the wire."""

    status: int
    code: str
    message: str
    param: str | None = None


class Batch(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """All effects of one step for one front end, in one message.

    delta_keys: i64 bytes [d]; delta_counts: i32 bytes [d]; delta_tokens: i32 bytes [sum counts]. A request has at most
    one delta a batch. Order of meaning: scores, deltas (with details), done, replies, gone.
    """

    step: int
    delta_keys: bytes = b""
    delta_counts: bytes = b""
    delta_tokens: bytes = b""
    details: list[TokenDetail] = []
    scores: list[Scores] = []
    done: list[Done] = []
    replies: list[Reply] = []
    gone: list[SessionGone] = []


class EngineReady(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """First message of an engine: what it serves."""

    model_name: str
    model_path: str
    architecture: str
    dtype: str
    device: str
    attention: str = ""
    """Which kernels attend; empty: it is not said."""
    vocab_size: int
    context_tokens: int
    page_size: int
    pages_total: int
    rows_max: int
    chunk_tokens: int
    queue_max: int = 0
    """Requests that may wait beside those that run; 0: it is not said."""
    drafts_max: int = 0
    """Most drafts of a request in a step; 0: none are looked up, and corpora are of no use."""
    kv_bytes: int
    weight_bytes: int
    start_s: float


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """Last message of an engine that cannot go on; the process exits non-zero after it."""

    message: str


FromEngine = Batch | EngineReady | EngineFailed
