"""What a request may ask of drafts on every surface, and what is told of them."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from sessile.contract.messages import Done, SourceFigures, Submit
from sessile.server.drafts import draft_figures
from sessile.server.metrics import Metrics
from tests.http.conftest import Running, running_server
from tests.http.toy_engine import ToyEngine
from tests.unit.drafters import ToldDrafter
from tests.unit.stats import stats_of_nothing

WISH = {"speculate": True, "drafts_max": 3, "corpora": ["b", "a", "b"], "remember": True}


class DraftingEngine(ToyEngine):
    """Drafts that what was said last is said again; knows the corpora that ToldDrafter knows."""

    def __init__(self, address: str) -> None:
        drafter = ToldDrafter(lambda text, count: text[-1:] * count, limit=2)
        super().__init__(address, drafter=drafter, drafts_max=4)


@pytest.fixture(scope="module")
def drafting() -> Iterator[Running]:
    with running_server(DraftingEngine) as running:
        yield running


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with running_server(ToyEngine) as running:
        yield running


SURFACES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hello"},
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}
on_every_surface = pytest.mark.parametrize("path", SURFACES)


@on_every_surface
def test_what_is_asked_of_drafts_reaches_the_engine(server: Running, path: str) -> None:
    assert server.client.post(path, json=SURFACES[path] | WISH).status_code == 200
    (submit,) = server.engine.submits()
    assert (submit.speculate, submit.drafts_max, submit.corpora, submit.remember) == (True, 3, ("b", "a"), True)


@on_every_surface
def test_what_is_not_asked_is_left_to_the_engine(server: Running, path: str) -> None:
    assert server.client.post(path, json=SURFACES[path]).status_code == 200
    (submit,) = server.engine.submits()
    unasked = Submit(key=0, tokens=b"", sampling=submit.sampling)
    for field in ("speculate", "drafts_max", "corpora", "remember"):
        assert getattr(submit, field) == getattr(unasked, field)


@on_every_surface
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speculate", 1), ("speculate", "yes"), ("drafts_max", -1), ("drafts_max", 256), ("drafts_max", 1.5),
        ("corpora", "a"), ("corpora", [1]), ("corpora", [""]), ("corpora", ["a" * 129]), ("corpora", ["a"] * 65),
        ("remember", 0),
    ],
)  # fmt: skip
def test_a_wrong_wish_is_refused_by_name(server: Running, path: str, field: str, value: object) -> None:
    reply = server.client.post(path, json=SURFACES[path] | {field: value})
    assert reply.status_code == 400
    assert field in reply.json()["error"]["message"]
    assert server.engine.submits() == []


@on_every_surface
def test_h47_an_unknown_corpus_is_named(drafting: Running, path: str) -> None:
    reply = drafting.client.post(path, json=SURFACES[path] | {"corpora": ["python", "cobol"]})
    assert (reply.status_code, "cobol" in reply.json()["error"]["message"]) == (400, True)
    assert drafting.client.post(path, json=SURFACES[path] | {"corpora": ["python"]}).status_code == 200


@on_every_surface
def test_a_server_that_looks_up_no_drafts_says_so(plain: Running, path: str) -> None:
    reply = plain.client.post(path, json=SURFACES[path] | {"speculate": True})
    assert (reply.status_code, "--speculate" in reply.json()["error"]["message"]) == (400, True)
    assert plain.client.post(path, json=SURFACES[path] | {"speculate": False}).status_code == 200


def test_an_answer_says_what_drafts_did_for_it(drafting: Running) -> None:
    meta = drafting.generate(sampling_params={"max_new_tokens": 20, "temperature": 0}).json()["meta_info"]
    assert meta["spec_draft_token_num"] > meta["spec_accept_token_num"] >= 0
    assert meta["spec_verify_ct"] + meta["spec_accept_token_num"] == meta["completion_tokens"] == 20
    assert meta["spec_sources"]["session"]["drafts_offered"] == meta["spec_draft_token_num"]


def test_an_answer_without_drafts_says_nothing_of_them(drafting: Running) -> None:
    meta = drafting.generate(speculate=False).json()["meta_info"]
    assert [name for name in meta if name.startswith("spec_")] == []


def test_length_and_rate_follow_from_what_was_accepted() -> None:
    done = Done(key=1, reason="length", completion_tokens=30, drafts_offered=40, drafts_accepted=20,
                sources=[SourceFigures("corpus:a", 40, 20)])  # fmt: skip
    figures = draft_figures(done)
    assert (figures["spec_accept_length"], figures["spec_accept_rate"], figures["spec_verify_ct"]) == (3.0, 0.5, 10)
    assert figures["spec_sources"] == {"corpus:a": {"drafts_offered": 40, "drafts_accepted": 20}}


def test_the_metrics_have_what_drafts_gained_and_cost() -> None:
    stats = msgspec.structs.replace(
        stats_of_nothing(), pages_total=9, drafts_offered_total=40, drafts_accepted_total=20, verifications_total=10,
        draft_wall_s_total=0.25, sources=[SourceFigures("corpus:a", 40, 20)],
    )  # fmt: skip
    text = Metrics().render(stats, model="m", in_flight=0).decode()
    for line in (
        'sglang:spec_accept_length{model_name="m"} 3.0', 'sglang:spec_accept_rate{model_name="m"} 0.5',
        'vllm:spec_decode_num_drafts_total{model_name="m"} 10.0',
        'vllm:spec_decode_num_draft_tokens_total{model_name="m"} 40.0',
        'vllm:spec_decode_num_accepted_tokens_total{model_name="m"} 20.0',
        'sessile_drafts_wasted_total{model_name="m"} 20.0', 'sessile_draft_seconds_total{model_name="m"} 0.25',
        'sessile_source_drafts_accepted_total{model_name="m",source="corpus:a"} 20.0',
    ):  # fmt: skip
        assert line in text
