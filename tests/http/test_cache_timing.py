"""What a tenant's prompts cost tells nothing of another's: neither in tokens that were cached, nor in time (H71)."""

import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from random import Random

import httpx
import pytest

from sessile.core.limits import TenantPolicy
from tests.http.conftest import Running, ring_of, running_server
from tests.http.toy_engine import ToyEngine

pytestmark = pytest.mark.long

PAIRS = 200
PROMPT_TOKENS, CHUNK_TOKENS, PAGE_TOKENS = 64, 16, 4
STEP_S = 0.004
"""A prompt takes four steps, and one where it is found: what is looked for is far above what else takes time."""
BY_CHANCE = 50
"""How far off half of the pairs a coin may be: seven standard deviations."""


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    policies = (TenantPolicy("acme"), TenantPolicy("umbra"))
    engine = partial(ToyEngine, tenants=policies, audit_level=1, chunk_tokens=CHUNK_TOKENS, page_size=PAGE_TOKENS)
    with running_server(engine, key_ring=ring_of(acme="user", umbra="user")) as running:
        running.engine.device.step_s = STEP_S
        yield running


prompts = (Random(number).choices(range(1, 250), k=PROMPT_TOKENS) for number in count())
"""Each of its own, so that none begins as another does."""


def taken(client: httpx.Client, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token of an answer, and how much of the prompt was cached."""
    started_s = time.perf_counter()
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    meta = client.post("/generate", json=body).json()["meta_info"]
    return time.perf_counter() - started_s, meta["cached_tokens"]


def paired(client: httpx.Client, before: httpx.Client) -> tuple[int, list[int]]:
    """How often a prompt that `before` sent is faster for a client than one that nobody did; what is cached of it."""
    faster, cached = 0, []
    for number in range(PAIRS):
        known, unknown = next(prompts), next(prompts)
        taken(before, known)
        pair = [known, unknown] if number % 2 else [unknown, known]
        took = {id(prompt): taken(client, prompt) for prompt in pair}
        faster += took[id(known)][0] < took[id(unknown)][0]
        cached.append(took[id(known)][1])
        assert took[id(unknown)][1] == 0
    return faster, cached


def test_h71_a_prompt_is_found_again_by_its_own_tenant_and_that_shows_in_time(acme: httpx.Client) -> None:
    faster, cached = paired(acme, acme)
    assert cached == [(PROMPT_TOKENS - 1) // PAGE_TOKENS * PAGE_TOKENS] * PAIRS
    assert faster > PAIRS / 2 + BY_CHANCE


def test_h71_anothers_prompt_shows_neither_in_cached_tokens_nor_in_time(
    acme: httpx.Client, umbra: httpx.Client
) -> None:
    faster, cached = paired(umbra, acme)
    assert cached == [0] * PAIRS
    assert abs(faster - PAIRS / 2) <= BY_CHANCE
