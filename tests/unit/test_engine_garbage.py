"""Garbage is collected when the engine is idle, and only then (H69)."""

import gc
from collections.abc import Iterator

import pytest

from sessile.engine.garbage import FULL_COLLECTION_IDLE_NS, IdleCollector


@pytest.fixture
def collector() -> Iterator[IdleCollector]:
    collector = IdleCollector()
    collector.take_over()
    yield collector
    collector.release()


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch, collector: IdleCollector) -> list[int]:
    """Generations that were collected since the engine started."""
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append(generation))
    return collected


def test_h69_nothing_is_collected_by_itself_while_the_engine_runs(collector: IdleCollector) -> None:
    assert not gc.isenabled() and gc.get_freeze_count() > 0


def test_the_collector_is_given_back_as_it_was() -> None:
    collector = IdleCollector()
    collector.take_over()
    collector.release()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_an_idle_engine_collects_what_is_new_once(collector: IdleCollector, collections: list[int]) -> None:
    collector.note_use(0)
    for now_ns in (1, 2, 3):
        collector.note_idle(now_ns)
    assert collections == [1]


def test_a_long_idle_engine_collects_everything_once(collector: IdleCollector, collections: list[int]) -> None:
    collector.note_use(0)
    for now_ns in (1, FULL_COLLECTION_IDLE_NS, FULL_COLLECTION_IDLE_NS + 1):
        collector.note_idle(now_ns)
    assert collections == [1, 2]


def test_an_engine_that_did_nothing_collects_nothing(collector: IdleCollector, collections: list[int]) -> None:
    collector.note_idle(FULL_COLLECTION_IDLE_NS)
    assert collections == []
