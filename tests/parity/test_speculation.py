"""Speculation on a real device changes how many steps there are, and nothing that anybody is told (H49)."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sessile.contract.messages import Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.gguf import default_gguf_path
from sessile.model.options import ModelOptions
from sessile.text.load import load_tokenizer
from sessile.text.tokenizer import Tokenizer
from tests.parity.speculation import ChanceDrafter, Clients, Script, Told
from tests.parity.tiny_models import CONTEXT, VOCAB, Tiny, make_tiny
from tests.unit.drafters import ToldDrafter

DRAFTS_MAX = 5
ROWS = 8
FACTS = ModelFacts(VOCAB, CONTEXT, eos_ids=(2,), token_bytes=tuple(bytes([97 + token % 26]) for token in range(VOCAB)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def device(tiny: Tiny) -> Iterator[Any]:
    device = open_device(
        ModelOptions(model=str(tiny.folder), dtype="float32"), DeviceOptions(device="cpu", kv_memory="4M", threads=1),
        page_size=4, context_tokens=CONTEXT, rows_max=ROWS, drafts_max=8, progress=lambda stage, done: None,
    )  # fmt: skip
    yield device
    device.close()


@pytest.fixture(scope="module")
def plain(device: Any) -> Told:
    """What the clients of the script are told without drafts."""
    clients = Clients(device, FACTS, chunk_tokens=512)
    Script(11, VOCAB).play(clients)
    return clients.told


@pytest.mark.parametrize("drafts_max", [DRAFTS_MAX, 8])
@pytest.mark.parametrize(
    ("chunk_tokens", "retract_every", "overlap"),
    [(512, 0, True), (512, 0, False), (16, 0, True), (16, 7, True)],
    ids=["whole", "no overlap", "chunked", "chunked and retracted"],
)
def test_h49_two_hundred_requests_are_told_the_same_with_and_without_drafts(
    device: Any, plain: Told, chunk_tokens: int, retract_every: int, overlap: bool, drafts_max: int
) -> None:
    drafter = ChanceDrafter(plain, VOCAB, drafts_max)
    drafted = Clients(
        device, FACTS, chunk_tokens=chunk_tokens, drafter=drafter, drafts_max=drafts_max, overlap=overlap,
        retract_every=retract_every,
    )  # fmt: skip
    Script(11, VOCAB).play(drafted)
    told = drafted.told
    assert len(told.done) == 200
    assert told.output == plain.output
    assert told.ends() == plain.ends()
    assert told.top_ids == plain.top_ids
    for key, logprobs in plain.logprobs.items():
        np.testing.assert_allclose(told.logprobs[key], logprobs, atol=2e-4)
    # In small chunks the budget seldom leaves room for more.
    most = drafts_max if chunk_tokens == 512 else min(drafts_max, 5)
    assert set(drafter.verdicts) >= set(range(most + 1)), "not every number of accepted drafts occurred"
    assert (told.preemptions > 20) == (retract_every > 0)
    if chunk_tokens == 512:
        assert told.steps < plain.steps


def test_the_script_has_every_kind_of_end(plain: Told) -> None:
    kinds = Counter((done.reason, type(done.matched).__name__) for done in plain.done.values())
    assert {("length", "NoneType"), ("stop", "int"), ("stop", "bytes")} <= set(kinds)
    assert min(kinds.values()) >= 10


SAMPLES = 3000
TOP_K = 3


@pytest.mark.parametrize("drafts", [False, True])
def test_h49_unseeded_requests_are_distributed_as_the_model_says(device: Any, tiny: Tiny, drafts: bool) -> None:
    """Chi-square over all outputs of three tokens; seeds as a server would draw them, but always the same ones."""
    prompt, likeliest = [5, 9, 77, 31], {}
    expected = {}
    for text, probability in _texts(tiny, prompt, 3):
        expected[text] = probability * SAMPLES
        for place in range(1, 3):
            likeliest.setdefault(text[:place], text[place])  # The first text with a beginning is its likeliest.
    drafter = ToldDrafter(lambda text, count: [likeliest[tuple(text[len(prompt) :])]][:count])
    clients = Clients(
        device, FACTS, chunk_tokens=512, drafter=drafter if drafts else None, drafts_max=4 * drafts, audit_level=0
    )
    seeds = np.random.default_rng(2).integers(0, 1 << 62, SAMPLES).tolist()
    sampling = {"temperature": 1.0, "top_k": TOP_K, "max_new_tokens": 3, "ignore_eos": True}
    clients.run([Submit(key=key, tokens=pack_tokens(prompt), sampling=Sampling(seed=seed, **sampling))
                 for key, seed in enumerate(seeds)])  # fmt: skip
    seen = Counter(tuple(output) for output in clients.told.output.values())
    assert set(seen) <= set(expected)
    assert sum(line.verdicts == [1] for line in drafter.lines) >= SAMPLES // 5 * drafts
    assert _chi_square_p(seen, expected) > 0.01


def _texts(tiny: Tiny, prompt: list[int], count: int) -> list[tuple[tuple[int, ...], float]]:
    """Every output of so many tokens within top-k, likeliest continuations first, with its probability."""
    texts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(count):
        longer = []
        for text, probability in texts:
            tops = tiny.logits([*prompt, *text])[-1].topk(TOP_K)
            shares = tops.values.softmax(dim=-1).tolist()
            longer += [((*text, token), probability * share)
                       for token, share in zip(tops.indices.tolist(), shares, strict=True)]  # fmt: skip
        texts = longer
    return texts


def _chi_square_p(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The chance of so large a chi-square; what is expected less than five times is one class."""
    rare = [text for text, count in expected.items() if count < 5]
    classes = [(seen[text], count) for text, count in expected.items() if count >= 5]
    classes.append((sum(seen[text] for text in rare), sum(expected[text] for text in rare)))
    classes = [each for each in classes if each[1]]
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in classes)
    freedom = torch.tensor((len(classes) - 1) / 2)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2)))


TEXTS = ["Once upon a time", "1, 2, 3, 4, 5,", "def fibonacci(n):\n", "Blue, red and yellow are"]


@contextlib.contextmanager
def smollm2(dtype: str, quantize: str, tokenizer: Tokenizer) -> Iterator[tuple[Any, ModelFacts]]:
    """The real model on a device, and what the core is told of it."""
    device = open_device(
        ModelOptions(model=str(default_gguf_path()), dtype=dtype, quantize=quantize),
        DeviceOptions(device="cpu", kv_memory="64M"), page_size=16, context_tokens=256, rows_max=8, drafts_max=7,
        progress=lambda stage, done: None,
    )  # fmt: skip
    with contextlib.closing(device):
        yield device, tokenizer.facts(vocab_size=device.facts.vocab_size, context_tokens=256)


def test_h49_smollm2_says_the_same_with_and_without_drafts() -> None:
    tokenizer = load_tokenizer("default")
    submits = [
        Submit(
            key=key, tokens=pack_tokens(tokenizer.encode(text)),
            sampling=Sampling(seed=key, temperature=temperature, max_new_tokens=40, ignore_eos=True),
        )
        for key, (text, temperature) in enumerate((text, warmth) for text in TEXTS for warmth in (0.0, 0.9))
    ]  # fmt: skip
    with smollm2("float32", "none", tokenizer) as (device, facts):
        plain = Clients(device, facts, chunk_tokens=512)
        plain.run(submits)
        drafter = ChanceDrafter(plain.told, facts.vocab_size, 7)
        drafted = Clients(device, facts, chunk_tokens=512, drafter=drafter, drafts_max=7)
        drafted.run(submits)
    assert drafted.told.output == plain.told.output
    assert set(drafter.verdicts) >= {0, 1, 3, 5, 7}
    assert drafted.told.steps < plain.told.steps


TOP_IDS = 8
NEAR_TIE_TEXTS, NEAR_TIE_TEXTS_WHOLE = 15, 40
NEAR_TIE_TOKENS = 40


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Weights in eight bits as well with --whole-grid: they say nothing else."""
    if "quantize" in metafunc.fixturenames:
        metafunc.parametrize("quantize", ["none", "int8"] if metafunc.config.getoption("whole_grid") else ["none"])


@pytest.mark.long
def test_h49_in_bfloat16_outputs_part_only_where_two_tokens_are_nearer_than_the_kernels_are(
    quantize: str, whole_grid: bool
) -> None:
    """A step that verifies multiplies other shapes than one that decodes. How far that moves two tokens apart is
    measured at all places before two outputs part; where they part, the two tokens are no farther apart than that."""
    tokenizer = load_tokenizer("default")
    dice = np.random.default_rng(8)
    texts = NEAR_TIE_TEXTS_WHOLE if whole_grid else NEAR_TIE_TEXTS
    prompts = [dice.integers(3, 40_000, dice.integers(2, 30)).tolist() for _ in range(texts)]
    submits = [
        Submit(
            key=key, tokens=pack_tokens(prompt), logprobs=TOP_IDS,
            sampling=Sampling(seed=0, temperature=0.0, max_new_tokens=NEAR_TIE_TOKENS, ignore_eos=True),
        )
        for key, prompt in enumerate(prompts)
    ]  # fmt: skip
    with smollm2("bfloat16", quantize, tokenizer) as (device, facts):
        plain = Clients(device, facts, chunk_tokens=512)
        plain.run(submits)
        drafter = ChanceDrafter(plain.told, facts.vocab_size, 7)
        drafted = Clients(device, facts, chunk_tokens=512, drafter=drafter, drafts_max=7)
        drafted.run(submits)
        kernels = device.facts.attention
    moved, margins = kernel_difference(plain.told, drafted.told)
    assert sum(drafter.verdicts.values()) > 100 and drafted.told.steps < plain.told.steps
    if kernels.startswith("native") and quantize == "none":
        # Sums in these kernels do not depend on who is beside a token, so that nothing moves at all.
        assert moved == 0 and drafted.told.output == plain.told.output
    else:
        assert moved > 0
    assert all(margin <= moved for margin in margins), (margins, moved)


def kernel_difference(plain: Told, drafted: Told) -> tuple[float, list[float]]:
    """(the largest change of a difference of two log-probabilities where the text is still the same, the difference,
    without drafts, of the two tokens with which each pair of outputs parts)."""
    moved, margins = 0.0, []
    for key, output in plain.output.items():
        other = drafted.output[key]
        same = next((place for place, pair in enumerate(zip(output, other, strict=True)) if len(set(pair)) > 1), None)
        for place in range(len(output) if same is None else same):
            before, after = _likely(plain, key, place), _likely(drafted, key, place)
            changes = [before[token] - after[token] for token in before.keys() & after.keys()]
            moved = max(moved, max(changes) - min(changes))
        if same is not None:
            likely = _likely(plain, key, same)
            margins.append(likely[output[same]] - likely.get(other[same], -np.inf))
    return moved, margins


def _likely(told: Told, key: int, place: int) -> dict[int, float]:
    """Log-probabilities of the TOP_IDS likeliest tokens at a place of an output."""
    here = slice(place * TOP_IDS, (place + 1) * TOP_IDS)
    return dict(zip(told.top_ids[key][here], told.top_logprobs[key][here], strict=True))
