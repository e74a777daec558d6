"""However a prompt is cut into chunks and whatever pages it gets, the toy device says what the reference says."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sessile.contract.messages import Sampling
from sessile.contract.model import ModelFacts
from sessile.contract.plan import SAMPLE, StepPlan
from sessile.sim.reference import Speaker
from sessile.sim.toy import ToyDevice

FACTS = ModelFacts(vocab_size=40, context_tokens=48, eos_ids=(2,))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@given(
    prompt=st.lists(st.integers(0, 39), min_size=1, max_size=40),
    cuts=st.sets(st.integers(1, 39), max_size=6),
    page_size=st.sampled_from([1, 2, 3, 5, 16]),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.7]),
)
@settings(max_examples=80, deadline=None)
def test_chunks_and_pages_do_not_matter(prompt, cuts, page_size, order, seed, temperature) -> None:
    sampling = Sampling(seed=seed, temperature=temperature)
    pages = list(range(1, 49))
    order.shuffle(pages)
    device = ToyDevice(
        pages_total=49, page_size=page_size, rows_max=2, context_tokens=48, drafts_max=0, vocab_size=40
    )
    pages = pages[: -(-len(prompt) // page_size)]
    halves = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32).tolist()
    bind = {
        "bind_rows": ints(1), "bind_ints": np.array([[0, 0, *halves]], np.int32),
        "bind_floats": np.array([[temperature, 1, 0, 1, 0, 0]], np.float32),
        "bias_counts": ints(0), "ban_counts": ints(0), "prompt_counts": ints(0), "output_counts": ints(0),
        "table_rows": ints(1), "table_starts": ints(0), "table_counts": ints(len(pages)), "table_pages": ints(*pages),
    }  # fmt: skip
    edges = [0, *sorted(cut for cut in cuts if cut < len(prompt)), len(prompt)]
    said: list[int] = []
    for step, (start, end) in enumerate(pairwise(edges), 1):
        plan = StepPlan.empty(
            step, **bind, rows=ints(1), starts=ints(start), query_counts=ints(end - start), draft_counts=ints(0),
            flags=ints(SAMPLE if end == len(prompt) else 0), output_indices=ints(0), logprob_tops=ints(-1),
            tokens=ints(*prompt[start:end]),
        )  # fmt: skip
        said += device.launch(plan).result().tokens.tolist()
        bind = {}
    assert said == [Speaker(prompt, sampling, FACTS).peek()]
