"""Figures that are made of two looks at an engine."""

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sessile.server.metrics import Metrics
from tests.unit.stats import stats_of_nothing


def rate_of(metrics: Metrics, *, time_s: float, generated: int) -> float | None:
    """sglang:gen_throughput at a look; None if it is not shown."""
    stats = msgspec.structs.replace(stats_of_nothing(), pages_total=2, time_s=time_s, generated_tokens_total=generated)
    text = metrics.render(stats, model="m", in_flight=0).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return next((sample.value for sample in samples if sample.name == "sglang:gen_throughput"), None)


def test_the_rate_of_tokens_counts_those_of_the_next_engine_from_zero() -> None:
    metrics = Metrics(())
    assert rate_of(metrics, time_s=10.0, generated=1000) is None
    assert rate_of(metrics, time_s=20.0, generated=1500) == 50.0
    assert rate_of(metrics, time_s=30.0, generated=40) == 4.0
