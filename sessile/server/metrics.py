"""What /metrics shows: the engine's figures as they are now, and latencies as the clients of this server saw them.

Every figure has one name of ours (sessile_…); those that dashboards for SGLang and vLLM look for appear under their
names as well.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from sessile.contract.messages import Done, Stats
from sessile.server.link import EngineLink
from sessile.server.logs import lines_dropped

OWN_PREFIX = "sessile_"
SECONDS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
    5.0,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    320.0,
)

TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
"""Bounds of histograms of tokens."""

# Field of Stats → its names, ours first, and help. Counters' names lose _total: the exposition adds it.
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "requests_running": (
        ("sessile_requests_running", "sglang:num_running_reqs", "vllm:num_requests_running"),
        "Requests with a row.",
    ),
    "requests_waiting": (
        ("sessile_requests_waiting", "sglang:num_queue_reqs", "vllm:num_requests_waiting"),
        "Requests without a row.",
    ),
    "requests_draining": (("sessile_requests_draining",), "Ended requests whose last step has not settled."),
    "rows_total": (("sessile_rows",), "Batch rows."),
    "rows_held": (("sessile_rows_held",), "Batch rows that have an owner."),
    "page_size": (("sessile_page_tokens",), "Tokens a KV page holds."),
    "sessions_open": (("sessile_sessions_open", "sglang:num_streaming_sessions"), "Open sessions."),
    "sessions_idle": (("sessile_sessions_idle",), "Open sessions without a turn in flight."),
    "session_tokens": (("sessile_session_tokens",), "Tokens of all session histories."),
    "pages_reserved": (("sessile_reserved_pages",), "KV pages promised to sessions, used or not."),
}
PAGE_OWNERS = ("free", "limbo", "tree", "tree_pinned", "requests", "sessions", "quarantine", "scratch")
COUNTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "steps_total": (("sessile_steps",), "Steps planned."),
    "settled_steps_total": (("sessile_settled_steps",), "Steps settled."),
    "turns_committed_total": (("sessile_turns_committed",), "Session turns that became history."),
    "turns_rolled_back_total": (("sessile_turns_rolled_back",), "Session turns that left no trace."),
    "turns_replayed_total": (("sessile_turns_replayed",), "Replies said again to a client that had lost them."),
    "forks_total": (("sessile_forks",), "Forks of sessions, branches included."),
    "rewinds_total": (("sessile_rewinds",), "Sessions cut back to an earlier place."),
    "prompt_tokens_total": (
        ("sessile_prompt_tokens", "sglang:prompt_tokens", "vllm:prompt_tokens", "vllm:prefix_cache_queries"),
        "Prompt tokens of admitted requests, histories included.",
    ),
    "cached_tokens_total": (
        ("sessile_cached_tokens", "sglang:cached_tokens", "vllm:prefix_cache_hits"),
        "Prompt tokens whose KV was there already.",
    ),
    "computed_tokens_total": (("sessile_computed_tokens",), "Prompt tokens computed."),
    "generated_tokens_total": (
        ("sessile_generated_tokens", "sglang:generation_tokens", "vllm:generation_tokens"),
        "Tokens sampled and kept.",
    ),
    "preemptions_total": (("sessile_preemptions", "vllm:num_preemptions"), "Requests that lost their row for a while."),
    "recomputed_tokens_total": (("sessile_recomputed_tokens",), "Tokens computed again after a preemption."),
    "evicted_pages_total": (("sessile_evicted_pages",), "Pages of the prefix tree given up."),
    "demoted_pages_total": (("sessile_demoted_pages",), "Pages of idle sessions given up."),
    "drafts_offered_total": (("sessile_drafts_offered", "vllm:spec_decode_num_draft_tokens"), "Draft tokens verified."),
    "drafts_accepted_total": (
        ("sessile_drafts_accepted", "vllm:spec_decode_num_accepted_tokens"),
        "Draft tokens accepted.",
    ),
    "verifications_total": (
        ("sessile_verifications", "vllm:spec_decode_num_drafts"),
        "Times that a request had drafts in a step.",
    ),
    "draft_wall_s_total": (("sessile_draft_seconds",), "Wall time of looking drafts up; a part of planning."),
    "audit_checks_total": (("sessile_audit_checks",), "Audits of page and row ownership."),
    "audit_failures_total": (("sessile_audit_failures",), "Audits that found a difference."),
    "quarantined_pages_total": (("sessile_quarantined_pages",), "Pages taken out of circulation after a violation."),
    "step_wall_s_total": (("sessile_step_seconds",), "Wall time of steps."),
    "plan_wall_s_total": (("sessile_plan_seconds",), "Wall time of planning."),
    "memory_shortages_total": (
        ("sessile_device_out_of_memory",),
        "Times that the device ran out of memory in a step, and ran it in smaller ones.",
    ),
}


REPREFILLED = {
    "preempted": "recomputed_tokens_total",
    "reclaimed": "reclaimed_tokens_total",
}
"""Why tokens were computed again → field of Stats."""
TENANT_GAUGES = {
    "requests": ("sessile_tenant_requests_in_flight", "Requests of a tenant that run or wait."),
    "input_tokens": ("sessile_tenant_input_tokens_in_flight", "Their tokens, committed histories not included."),
    "sessions": ("sessile_tenant_sessions_open", "Open sessions of a tenant."),
    "held_tokens": ("sessile_tenant_held_tokens", "Tokens of a tenant's session histories."),
}
"""Field of TenantFigures → name and help."""
TENANT_COUNTERS = {
    "prompt_tokens": ("sessile_tenant_prompt_tokens", "Prompt tokens of a tenant's ended requests."),
    "cached_tokens": ("sessile_tenant_cached_tokens", "Of these, tokens whose KV was there already."),
    "completion_tokens": ("sessile_tenant_generated_tokens", "Tokens that a tenant's ended requests were sent."),
}
"""Field of Done → name and help."""


CORPUS_STATES = ("loading", "ready", "removing", "failed")


class Histogram:
    """Counts of values by bucket; its only writer is the event loop, so it needs no lock."""

    def __init__(self, names: Sequence[str], help: str, bounds: Sequence[float] = SECONDS) -> None:
        self._names = names
        self._help = help
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add `count` observations of the same value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def families(self, model: str) -> Iterator[Metric]:
        """The histogram under each of its names."""
        buckets: list[tuple[str, float]] = []
        cumulated = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            cumulated += count
            buckets.append((bound, float(cumulated)))
        for name in self._names:
            family = HistogramMetricFamily(name, self._help, labels=["model_name"])
            family.add_metric([model], buckets, self._sum)
            yield family


class Metrics:
    """What this server measures itself. tenants: those that get figures of their own, all known from the start."""

    def __init__(self, tenants: Sequence[str] = ()) -> None:
        self._tenant_ends: dict[str, dict[str, int]] = {tenant: {} for tenant in tenants}
        self._tenant_tokens = {tenant: dict.fromkeys(TENANT_COUNTERS, 0) for tenant in tenants}
        self._earlier: Stats | None = None
        self.first_token_s = Histogram(
            (
                "sessile_time_to_first_token_seconds",
                "sglang:time_to_first_token_seconds",
                "vllm:time_to_first_token_seconds",
            ),
            "From the request's arrival to its first token.",
        )
        self.inter_token_s = Histogram(
            (
                "sessile_inter_token_latency_seconds",
                "sglang:inter_token_latency_seconds",
                "vllm:inter_token_latency_seconds",
                "sglang:time_per_output_token_seconds",
                "vllm:time_per_output_token_seconds",
            ),
            "Between two tokens of one request.",
        )
        self.request_s = Histogram(
            ("sessile_request_seconds", "sglang:e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"),
            "From the request's arrival to its end.",
        )
        self.prompt_tokens = Histogram(
            ("sessile_request_prompt_tokens", "vllm:request_prompt_tokens"),
            "Prompt tokens of a request, its history included.",
            TOKENS,
        )
        self.completion_tokens = Histogram(
            ("sessile_request_generated_tokens", "vllm:request_generation_tokens"),
            "Output tokens of a request.",
            TOKENS,
        )
        self.ended: dict[str, int] = {}
        """Requests that ended, by reason: stop, length, abort, error, disconnect."""

    def count_end(self, reason: str, tenant: str, done: Done) -> None:
        """Count one ended request."""
        self.ended[reason] = self.ended.get(reason, 0) + 1
        if done.prompt_tokens:
            self.prompt_tokens.observe(done.prompt_tokens)
            self.completion_tokens.observe(done.completion_tokens)
        if tenant in self._tenant_ends:
            ends, tokens = self._tenant_ends[tenant], self._tenant_tokens[tenant]
            ends[reason] = ends.get(reason, 0) + 1
            for field in TENANT_COUNTERS:
                tokens[field] += getattr(done, field)

    def render(
        self,
        stats: Stats | None,
        *,
        model: str,
        in_flight: int,
        corpora: "CorporaFigures | None" = None,
        supply: "SupplyFigures | None" = None,
        peers_names: bool = True,
    ) -> bytes:
        """The Prometheus text; without stats (the engine does not answer) only what the server itself knows.

        peers_names: whether figures appear under peers' names as well.
        """
        registry = CollectorRegistry(auto_describe=False)
        families = [
            *self._families(model, in_flight),
            *self._tenant_families(model),
            *_corpora_families(corpora, model),
            *_supply_families(supply or SupplyFigures(), model),
            *_engine_families(stats, model),
            *self._throughput(stats, model),
        ]
        shown = [family for family in families if peers_names or family.name.startswith(OWN_PREFIX)]
        registry.register(_Collected(shown))
        return generate_latest(registry)

    def _families(self, model: str, in_flight: int) -> Iterator[Metric]:
        for histogram in (
            self.first_token_s, self.inter_token_s, self.request_s, self.prompt_tokens, self.completion_tokens
        ):  # fmt: skip
            yield from histogram.families(model)
        yield _gauge("sessile_http_requests_in_flight", "Requests whose client waits.", in_flight, model)
        for name, label in (
            ("sessile_http_requests", "reason"),
            ("vllm:request_success", "finished_reason"),
        ):
            ended = CounterMetricFamily(name, "Requests that ended, by reason.", labels=["model_name", label])
            for reason, count in sorted(self.ended.items()):
                ended.add_metric([model, reason], count)
            yield ended
        total = CounterMetricFamily("sglang:num_requests", "Requests that ended.", labels=["model_name"])
        total.add_metric([model], sum(self.ended.values()))
        yield total
        aborted = CounterMetricFamily("sglang:num_aborted_requests", "Requests that broke off.", labels=["model_name"])
        aborted.add_metric([model], self.ended.get("abort", 0) + self.ended.get("disconnect", 0))
        yield aborted

    def _tenant_families(self, model: str) -> Iterator[Metric]:
        labels = ["model_name", "tenant", "reason"]
        ends = CounterMetricFamily("sessile_tenant_requests", "Ended requests of a tenant, by reason.", labels=labels)
        for tenant, by_reason in self._tenant_ends.items():
            for reason, count in sorted(by_reason.items()):
                ends.add_metric([model, tenant, reason], count)
        yield ends
        for field, (name, help) in TENANT_COUNTERS.items():
            counter = CounterMetricFamily(name, help, labels=["model_name", "tenant"])
            for tenant, tokens in self._tenant_tokens.items():
                counter.add_metric([model, tenant], tokens[field])
            yield counter

    def _throughput(self, stats: Stats | None, model: str) -> Iterator[Metric]:
        """Tokens a second since the last look: a gauge that SGLang's dashboard shows as it is."""
        earlier, self._earlier = self._earlier, stats or self._earlier
        if stats is None or earlier is None or stats.time_s <= earlier.time_s:
            return
        generated = stats.generated_tokens_total - earlier.generated_tokens_total
        if generated < 0:
            generated = stats.generated_tokens_total  # of another engine, which counts from zero
        rate = generated / (stats.time_s - earlier.time_s)
        yield _gauge("sglang:gen_throughput", "Generated tokens a second since the last look.", rate, model)


@dataclass(frozen=True, slots=True)
class CorporaFigures:
    """How many corpora there are by state, the room that they have claimed, and how many loads have failed."""

    by_state: Mapping[str, int]
    tokens: int
    bytes: int
    failures: int


@dataclass(frozen=True, slots=True)
class SupplyFigures:
    """How often the engine was replaced, what is held and was lost of its sessions, and log lines that were lost."""

    restarts: int = 0
    held_sessions: int = 0
    held_bytes: int = 0
    restored: int = 0
    lost: int = 0
    log_lines_dropped: int = 0

    @classmethod
    def of(cls, link: EngineLink, restarts: int) -> "SupplyFigures":
        """As they are now."""
        histories, request_log = link.histories, link.request_log
        return cls(
            restarts, histories.held, histories.bytes, histories.restored_total, histories.lost_total,
            lines_dropped() + (request_log.dropped if request_log else 0),
        )


def _supply_families(supply: SupplyFigures, model: str) -> Iterator[Metric]:
    yield _gauge("sessile_held_sessions", "Sessions that outlive their engine.", supply.held_sessions, model)
    yield _gauge("sessile_held_bytes", "Memory of the server for open sessions.", supply.held_bytes, model)
    for name, help, count in (
        ("sessile_engine_restarts", "Engines started after the first.", supply.restarts),
        ("sessile_sessions_restored", "Sessions that went on in another engine.", supply.restored),
        ("sessile_sessions_lost", "Sessions that could not go on in another engine.", supply.lost),
        ("sessile_log_lines_dropped", "Log lines that could not be written.", supply.log_lines_dropped),
    ):
        counter = CounterMetricFamily(name, help, labels=["model_name"])
        counter.add_metric([model], count)
        yield counter


def _corpora_families(corpora: CorporaFigures | None, model: str) -> Iterator[Metric]:
    if corpora is None:
        return
    states = GaugeMetricFamily("sessile_corpora", "Corpora by state.", labels=["model_name", "state"])
    for state in CORPUS_STATES:
        states.add_metric([model, state], corpora.by_state.get(state, 0))
    yield states
    yield _gauge("sessile_corpora_tokens", "Tokens of corpora, loading ones as far as known.", corpora.tokens, model)
    yield _gauge("sessile_corpora_bytes", "Bytes of their indexes, in memory.", corpora.bytes, model)
    failed = CounterMetricFamily("sessile_corpora_loads_failed", "Corpora not loaded.", labels=["model_name"])
    failed.add_metric([model], corpora.failures)
    yield failed


class _Collected:
    """A collector of metrics that are there already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _engine_families(stats: Stats | None, model: str) -> Iterator[Metric]:
    yield _gauge("sessile_engine_up", "1 if the step loop answered just now.", int(stats is not None), model)
    if stats is None:
        return
    for field, (names, help) in GAUGES.items():
        for name in names:
            yield _gauge(name, help, getattr(stats, field), model)
    for field, (names, help) in COUNTERS.items():
        for name in names:
            counter = CounterMetricFamily(name, help, labels=["model_name"])
            counter.add_metric([model], getattr(stats, field))
            yield counter
    pages = GaugeMetricFamily("sessile_pages", "KV pages by owner.", labels=["model_name", "owner"])
    for owner in PAGE_OWNERS:
        pages.add_metric([model, owner], getattr(stats, f"pages_{owner}"))
    yield pages
    yield from _labelled_families(stats, model)
    labels = ["model_name", "reason"]
    finished = CounterMetricFamily("sessile_finished", "Ends the engine gave, by reason.", labels=labels)
    for reason, count in sorted(stats.finished_total.items()):
        finished.add_metric([model, reason], count)
    yield finished
    labels = ["model_name", "kind"]
    violations = CounterMetricFamily("sessile_audit_violations", "Invariants found violated, by kind.", labels=labels)
    for kind, count in sorted(stats.audit_violations_total.items()):
        violations.add_metric([model, kind], count)
    yield violations
    usable = stats.pages_total - stats.pages_scratch
    held = usable - stats.pages_free
    yield _gauge("sglang:max_total_num_tokens", "Tokens that the KV pages hold.", usable * stats.page_size, model)
    yield _gauge("sglang:num_used_tokens", "Tokens of KV pages that have an owner.", held * stats.page_size, model)
    for name in ("sglang:token_usage", "vllm:kv_cache_usage_perc"):
        yield _gauge(name, "Share of KV pages that have an owner, 0 to 1.", held / usable, model)
    hit_rate = stats.cached_tokens_total / max(1, stats.prompt_tokens_total)
    yield _gauge("sglang:cache_hit_rate", "Cached share of all prompt tokens so far, 0 to 1.", hit_rate, model)


def _labelled_families(stats: Stats, model: str) -> Iterator[Metric]:
    """Figures of the engine that have a label of their own."""
    sessions = GaugeMetricFamily("sessile_sessions", "Open sessions by phase.", labels=["model_name", "phase"])
    for phase, count in stats.sessions_by_phase.items():
        sessions.add_metric([model, phase], count)
    yield sessions
    again = CounterMetricFamily(
        "sessile_reprefilled_tokens",
        "Tokens computed again: after a preemption, or because a session's KV had been reclaimed.",
        labels=["model_name", "cause"],
    )
    for cause, field in REPREFILLED.items():
        again.add_metric([model, cause], getattr(stats, field))
    yield again
    yield from _draft_families(stats, model)
    for field, (name, help) in TENANT_GAUGES.items():
        gauge = GaugeMetricFamily(name, help, labels=["model_name", "tenant"])
        for figures in stats.tenants:
            gauge.add_metric([model, figures.name], getattr(figures, field))
        yield gauge


def _draft_families(stats: Stats, model: str) -> Iterator[Metric]:
    """What drafts gained and what they cost, in all and by source."""
    offered, accepted = stats.drafts_offered_total, stats.drafts_accepted_total
    wasted = CounterMetricFamily("sessile_drafts_wasted", "Draft tokens verified in vain.", labels=["model_name"])
    wasted.add_metric([model], offered - accepted)
    yield wasted
    for side in ("offered", "accepted"):
        labels = ["model_name", "source"]
        name, help = f"sessile_source_drafts_{side}", f"Drafts {side}, by source, of ended requests."
        by_source = CounterMetricFamily(name, help, labels=labels)
        for figures in stats.sources:
            by_source.add_metric([model, figures.source], getattr(figures, f"drafts_{side}"))
        yield by_source
    length = 1 + accepted / max(1, stats.verifications_total)
    yield _gauge("sglang:spec_accept_length", "Tokens of a request in a step with drafts, on average.", length, model)
    yield _gauge("sglang:spec_accept_rate", "Accepted share of all drafts, 0 to 1.", accepted / max(1, offered), model)


def _gauge(name: str, help: str, value: float, model: str) -> Metric:
    gauge = GaugeMetricFamily(name, help, labels=["model_name"])
    gauge.add_metric([model], value)
    return gauge
