"""Tenants: nobody finds, reuses or starves what is another's; limits are counted before anything changes."""

from collections import Counter
from typing import Any

import pytest

from sessile.contract.messages import (
    CloseSession,
    ForkSession,
    GetSession,
    ListSessions,
    RewindSession,
    SessionPage,
    SessionTokens,
)
from sessile.core.limits import TenantPolicy
from tests.unit.stage import Stage, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]


def staged(*policies: TenantPolicy, **settings: Any) -> Stage:
    return Stage(tenants=policies, **settings)


def status(stage: Stage, key: int) -> int:
    return stage.done[key].status


# -- whose it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation", [CloseSession, GetSession, SessionTokens, ForkSession, RewindSession], ids=lambda kind: kind.__name__
)
def test_h55_another_tenants_session_is_not_found(operation: type) -> None:
    stage = staged()
    stage.open("s", tenant="ada")
    more = {"child": "c"} if operation is ForkSession else {"to_tokens": 0} if operation is RewindSession else {}
    reply = stage.ask(operation, session="s", tenant="bob", **more)
    assert reply.error is not None and reply.error.status == 404
    assert stage.stats().sessions_open == 1


def test_h55_a_turn_on_another_tenants_session_is_not_found() -> None:
    stage = staged()
    stage.open("s", tenant="ada")
    stage.submit(1, PROMPT, session="s", tenant="bob")
    assert status(stage, 1) == 404


def test_h55_two_tenants_may_use_one_id_and_each_lists_its_own() -> None:
    stage = staged()
    for tenant in ("ada", "bob"):
        assert stage.open("s", tenant=tenant).error is None
        stage.submit(len(stage.done) + 1, [len(stage.done) + 5] * 3, session="s", tenant=tenant)
        stage.run()
    for tenant, key in (("ada", 1), ("bob", 2)):
        page = stage.ask(ListSessions, tenant=tenant).value
        assert isinstance(page, SessionPage)
        assert [(view.id, view.tenant) for view in page.sessions] == [("s", tenant)] and page.total == 1
        assert stage.output[key] == expected([key + 4] * 3)


@pytest.mark.parametrize("in_session", [False, True])
def test_h71_a_prompt_of_another_tenant_is_never_found(in_session: bool) -> None:
    stage = staged()
    cached = []
    for key, tenant in enumerate(("ada", "bob", "ada"), 1):
        session = f"s{key}" if in_session else None
        if session:
            stage.open(session, tenant=tenant)
        stage.submit(key, PROMPT, session=session, tenant=tenant)
        stage.run()
        cached.append(stage.done[key].cached_tokens)
    assert cached == [0, 0, 12]


def test_h71_a_fork_shares_with_its_own_tenant_only() -> None:
    stage = staged()
    stage.open("s", tenant="ada")
    stage.submit(1, PROMPT, session="s", tenant="ada")
    stage.run()
    stage.ask(ForkSession, session="s", child="f", tenant="ada")
    stage.submit(2, PROMPT + stage.output[1] + [8], tenant="bob")
    stage.run()
    assert stage.done[2].cached_tokens == 0


def test_tenants_that_say_so_share_their_prefixes() -> None:
    stage = staged(TenantPolicy("ada", shares_prefixes=True), TenantPolicy("bob", shares_prefixes=True))
    for key, tenant in enumerate(("ada", "bob", "eve"), 1):
        stage.submit(key, PROMPT, tenant=tenant)
        stage.run()
    assert [stage.done[key].cached_tokens for key in (1, 2, 3)] == [0, 12, 0]


# -- limits ---------------------------------------------------------------------------------------------------------


def test_h43_a_tenants_sessions_are_limited_and_a_closed_one_makes_room() -> None:
    stage = staged(TenantPolicy("ada", sessions_max=2))
    for name in ("a", "b"):
        assert stage.open(name, tenant="ada").error is None
    refused = stage.open("c", tenant="ada")
    assert refused.error is not None and refused.error.status == 429
    assert stage.open("c", tenant="bob").error is None
    fork = stage.ask(ForkSession, session="a", child="d", tenant="ada")
    assert fork.error is not None and fork.error.status == 429
    stage.ask(CloseSession, session="a", tenant="ada")
    assert stage.open("d", tenant="ada").error is None


def test_a_tenants_requests_in_flight_are_limited() -> None:
    stage = staged(TenantPolicy("ada", requests_max=2))
    for key in (1, 2, 3):
        stage.submit(key, PROMPT, tenant="ada")
    stage.submit(4, PROMPT, tenant="bob")
    assert status(stage, 3) == 429
    stage.run()
    stage.submit(5, PROMPT, tenant="ada")
    stage.run()
    assert [stage.done[key].reason for key in (1, 2, 4, 5)] == ["length"] * 4


def test_a_tenants_input_tokens_in_flight_are_limited() -> None:
    stage = staged(TenantPolicy("ada", tokens_max=20))
    stage.submit(1, PROMPT, tenant="ada")
    stage.submit(2, PROMPT[:5], tenant="ada")
    stage.submit(3, PROMPT[:4], tenant="ada")
    assert status(stage, 2) == 429
    stage.run()
    assert stage.done[3].reason == "length"


def test_the_tokens_that_a_tenants_sessions_hold_are_limited_and_a_rewind_makes_room() -> None:
    stage = staged(TenantPolicy("ada", held_tokens_max=30))
    stage.open("s", tenant="ada")
    stage.submit(1, PROMPT, session="s", tenant="ada")
    stage.run()
    stage.submit(2, PROMPT, session="s", tenant="ada")
    assert status(stage, 2) == 429 and "close or rewind" in stage.done[2].message
    stage.submit(3, PROMPT, tenant="ada")
    stage.ask(RewindSession, session="s", to_tokens=4, tenant="ada")
    stage.submit(4, PROMPT, session="s", tenant="ada")
    stage.run()
    assert (stage.done[3].reason, stage.done[4].reason) == ("length", "length")


def test_a_request_that_exceeds_a_limit_by_itself_is_refused_for_good() -> None:
    stage = staged(TenantPolicy("ada", tokens_max=10), TenantPolicy("bob", held_tokens_max=10))
    stage.open("s", tenant="bob")
    stage.submit(1, PROMPT, tenant="ada")
    stage.submit(2, PROMPT, session="s", tenant="bob")
    stage.submit(3, PROMPT, tenant="bob")
    assert [(stage.done[key].status, stage.done[key].code) for key in (1, 2)] == [(413, "too_long")] * 2
    stage.run()
    assert stage.done[3].reason == "length"


def test_what_may_never_wait_is_refused_for_good() -> None:
    stage = staged(queue_tokens_max=10)
    stage.submit(1, PROMPT)
    assert (stage.done[1].status, stage.done[1].code) == (413, "too_long")


def test_answers_that_exceed_a_limit_together_are_refused_for_good() -> None:
    stage = staged(TenantPolicy("ada", tokens_max=40), TenantPolicy("bob", requests_max=2))
    for key, tenant in ((1, "ada"), (2, "ada"), (3, "ada"), (4, "bob"), (5, "bob"), (6, "bob")):
        stage.submit(key, PROMPT, tenant=tenant, group=1 if tenant == "ada" else 2)
    assert (status(stage, 3), stage.done[3].code) == (413, "too_long")
    assert (status(stage, 6), stage.done[6].param) == (400, "n")
    stage.submit(7, PROMPT, tenant="bob")
    assert status(stage, 7) == 429, "of another, which ends"
    stage.run()


def test_h40_a_turn_that_a_limit_refuses_leaves_its_session_as_it_was() -> None:
    stage = staged(TenantPolicy("ada", requests_max=1))
    stage.open("s", tenant="ada", idle_timeout_s=1.0)
    before = stage.ask(GetSession, session="s", tenant="ada").value
    stage.submit(1, PROMPT, tenant="ada", max_new_tokens=50)
    stage.machine.tick(500_000_000)
    stage.submit(2, PROMPT, session="s", tenant="ada")
    assert status(stage, 2) == 429
    assert stage.ask(GetSession, session="s", tenant="ada").value == before
    stage.machine.tick(1_000_000_000)
    stage.settle()
    assert [gone.session for gone in stage.gone] == ["s"]


# -- shares ---------------------------------------------------------------------------------------------------------


def tokens_run(stage: Stage, steps: int) -> Counter[str]:
    """Query tokens that each tenant's requests run in so many steps; a request's seed says whose it is."""
    run: Counter[str] = Counter()
    for _ in range(steps):
        before = len(stage.plans)
        stage.launch()
        for plan in stage.plans[before:]:
            for row, count in zip(plan.rows.tolist(), plan.query_counts.tolist(), strict=True):
                run["ada" if stage.device.seed_of(row) < 1000 else "bob"] += count
    return run


@pytest.mark.parametrize("weight", [1, 3])
def test_tenants_with_a_backlog_share_step_tokens_by_weight(weight: int) -> None:
    stage = staged(TenantPolicy("ada", weight=weight), TenantPolicy("bob"), rows=8, chunk=16, pages=200)
    for key in range(1, 200):
        stage.submit(key, [key % 40 + 2] * 40, tenant="ada", max_new_tokens=1)
    for key in range(1001, 1200):
        stage.submit(key, [key % 40 + 2] * 39 + [1], tenant="bob", max_new_tokens=1)
    run = tokens_run(stage, 150)
    assert run["ada"] / run["bob"] == pytest.approx(weight, rel=0.15)


@pytest.mark.parametrize("storm", ["sessions", "plain"])
def test_h77_a_storm_of_one_tenant_does_not_starve_another(storm: str) -> None:
    stage = staged(rows=4, chunk=16, pages=200)
    for key in range(1, 150):
        session = f"s{key}" if storm == "sessions" else None
        if session:
            stage.open(session, tenant="ada")
        stage.submit(key, [key % 40 + 2] * 60, session=session, tenant="ada")
    for _ in range(5):
        stage.launch()
    stage.open("quiet", tenant="bob")
    stage.submit(1001, PROMPT, session="quiet" if storm == "plain" else None, tenant="bob")
    steps = 0
    while 1001 not in stage.done:
        stage.launch()
        steps += 1
    assert steps < 40, "the newcomer waits for no more than the rows that run"
    assert len(stage.done) < 20


def test_a_tenant_that_paused_saved_nothing_up() -> None:
    stage = staged(rows=8, chunk=16, pages=200)
    for key in range(1, 60):
        stage.submit(key, [key % 40 + 2] * 40, tenant="ada", max_new_tokens=1)
    stage.submit(1001, [9], tenant="bob", max_new_tokens=1)
    tokens_run(stage, 60)
    for key in range(1002, 1060):
        stage.submit(key, [key % 40 + 2] * 39 + [1], tenant="bob", max_new_tokens=1)
    run = tokens_run(stage, 60)
    assert run["ada"] / run["bob"] == pytest.approx(1, rel=0.2)


# -- priority -------------------------------------------------------------------------------------------------------


def ends(stage: Stage) -> list[int]:
    """Keys in the order in which their requests end."""
    stage.run()
    return list(stage.done)


def test_higher_priority_goes_first_among_a_tenants_own_requests() -> None:
    stage = staged(rows=1)
    for key, priority in ((1, 0), (2, 5), (3, -1), (4, 5), (5, 9)):
        stage.submit(key, [key + 2] * 4, priority=priority)
    assert ends(stage) == [5, 2, 4, 1, 3]


def test_priority_is_no_argument_against_another_tenant() -> None:
    stage = staged(rows=1)
    for key in range(1, 9):
        stage.submit(key, [key + 2] * 4, tenant="ada", priority=100)
    stage.submit(1001, [9] * 4, tenant="bob", priority=-100)
    assert ends(stage).index(1001) <= 1


def test_h77_low_priority_is_overtaken_a_bounded_number_of_times() -> None:
    stage = staged(rows=1, overtakes_max=3)
    stage.submit(1, [9] * 4, priority=-5)
    for key in range(2, 12):
        stage.submit(key, [key + 2] * 4, priority=5)
    assert ends(stage).index(1) == 3
