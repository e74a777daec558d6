"""Corpora come, are replaced and go from many threads while requests decode, in processes as they are served (H44)."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from sessile.contract.model import ModelFacts
from tests.http.corpora_stage import add, added, jsonl, listed, upload
from tests.http.serving import PATIENCE_S, Deployment, deployed
from tests.http.toy_engine import CONTEXT_TOKENS
from tests.unit.stage import expected

pytestmark = pytest.mark.long

WRITERS, READERS = 20, 16
VOCAB_SIZE = 128
FACTS = ModelFacts(VOCAB_SIZE, CONTEXT_TOKENS, eos_ids=(), token_bytes=tuple(bytes([i]) for i in range(VOCAB_SIZE)))
OUTPUT_TOKENS = 48
WARM_UP_S = 20.0
"""Until then allocators find their size: in two minutes more of the storm it did not change."""
LONG_S = 30.0
"""From here on memory is compared."""
MEMORY_SHARE = 0.02
REFUSALS = {("POST", 409), ("DELETE", 404), ("DELETE", 409), ("POST", 429)}
"""What may happen to one writer by another's doing."""


def prompt(number: int) -> list[int]:
    return [(7 * number + step) % VOCAB_SIZE for step in range(12)]


SAID = {number: expected(prompt(number), OUTPUT_TOKENS, FACTS) for number in range(READERS)}


def text_of(number: int) -> str:
    """What the model says after a prompt, and the prompt: a corpus from which every draft is right."""
    return bytes([*prompt(number), *SAID[number]]).decode("ascii")


class Storm:
    """Writers and readers on one server until they are told to stop; whatever is not as it should be is in `wrong`."""

    def __init__(self, deployment: Deployment) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self.accepted = 0
        self.requests = 0
        self._url = deployment.url
        self._stop = threading.Event()

    def blow(self, seconds: float) -> None:
        self._stop.clear()
        with ThreadPoolExecutor(WRITERS + READERS) as pool:
            futures = [pool.submit(self._write, seed) for seed in range(WRITERS)]
            futures += [pool.submit(self._read, number) for number in range(READERS)]
            time.sleep(seconds)
            self._stop.set()
            for future in futures:
                future.result()

    def _write(self, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            while not self._stop.is_set():
                name, number = f"c{chance.randrange(8)}", chance.randrange(READERS)
                kind = chance.randrange(4)
                if kind == 0:
                    method, reply = "DELETE", client.delete(f"/v1/corpora/{name}")
                elif kind == 1:
                    method, reply = "POST", upload(client, name, jsonl(text_of(number)), replace=True)
                else:
                    method, reply = "POST", add(client, name, text_of(number), "and so on", replace=kind == 2)
                self.answers[method, reply.status_code] += 1
                if reply.is_error and (method, reply.status_code) not in REFUSALS:
                    self.wrong.append(f"{method} {reply.status_code}: {reply.text}")

    def _read(self, number: int) -> None:
        body = {"input_ids": prompt(number), "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0}}
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            while not self._stop.is_set():
                reply = client.post("/generate", json=body)
                self.requests += 1
                if reply.status_code != 200 or reply.json()["output_ids"] != SAID[number]:
                    self.wrong.append(f"request {number}: {reply.status_code} {reply.text[:200]}")
                else:
                    self.accepted += reply.json()["meta_info"].get("spec_accept_token_num") or 0


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("storm"), mode="toy") as deployment:
        yield deployment


def remove_all(client: httpx.Client) -> None:
    while names := listed(client):
        for name in names:
            client.delete(f"/v1/corpora/{name}")


def memory_of(deployment: Deployment) -> dict[str, int]:
    """kB of anonymous memory of the server and each of its children, by the last word of their commands."""
    server = deployment.process.pid
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    found = {}
    for pid in (str(server), *children):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        (size,) = [line.split()[1] for line in status if line.startswith("RssAnon")]
        found[next(word for word in words if word.startswith("tests.http."))] = int(size)
    return found


def test_h44_corpora_are_swapped_by_20_threads_while_16_requests_decode(
    deployment: Deployment, request: pytest.FixtureRequest
) -> None:
    seconds = request.config.getoption("--storm-s")
    storm = Storm(deployment)
    with httpx.Client(base_url=deployment.url, timeout=PATIENCE_S) as client:
        if seconds >= LONG_S:
            storm.blow(WARM_UP_S)
            remove_all(client)
            before = memory_of(deployment)
        storm.blow(seconds)
        remove_all(client)
        assert storm.wrong == []
        assert storm.requests >= READERS
        assert storm.accepted > 0 or seconds < LONG_S, "whether a short storm leaves time for drafts is chance"
        assert {("POST", 202), ("DELETE", 200)} <= {(method, 202 if status == 200 and method == "POST" else status)
                                                    for method, status in storm.answers}  # fmt: skip
        assert client.get("/v1/corpora").json()["budget"]["used"] == {"tokens": 0, "bytes": 0}
        assert "Traceback" not in deployment.said()
        if seconds >= LONG_S:
            after = memory_of(deployment)
            grown = {name: after[name] / kb for name, kb in before.items()}
            print(f"{storm.requests} requests, {dict(storm.answers)}, memory {before} -> {after}")
            assert max(grown.values()) <= 1 + MEMORY_SHARE, grown


def test_h49_what_a_corpus_was_good_for_is_told_and_changes_nothing_that_is_said(deployment: Deployment) -> None:
    body = {"input_ids": prompt(3), "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0}}
    with httpx.Client(base_url=deployment.url, timeout=PATIENCE_S) as client:
        added(client, "said", text_of(3))
        reply = client.post("/generate", json=body).json()
        assert reply["output_ids"] == SAID[3]
        corpus = client.get("/v1/corpora/said").json()
        assert 0 < corpus["drafts_accepted"] <= corpus["drafts_offered"]
        steps = corpus["accepted_by_length"]
        assert sum(length * count for length, count in enumerate(steps)) == corpus["drafts_accepted"]
        added(client, "said", "something else", replace=True)
        assert client.get("/v1/corpora/said").json()["drafts_offered"] == 0, "another corpus, another count"
        assert client.delete("/v1/corpora/said").status_code == 200
