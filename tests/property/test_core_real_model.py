"""Whatever a session went through, the real model says what a fresh prompt with the same tokens would make it say.

Forked, rewound, branched, demoted and preempted sessions on the CPU device, in fp32, greedy; audited in every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sessile.contract.messages import Branch
from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.model.options import ModelOptions
from tests.parity.core_driver import Core
from tests.parity.tiny_models import CONTEXT, VOCAB, make_tiny

ROWS, NEW_TOKENS = 4, 5
BRANCHING = "tree"

tokens = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=24)
who = st.integers(0, 5)
share = st.floats(0, 1)
deeds = st.lists(
    st.one_of(
        st.tuples(st.just("turns"), st.lists(st.tuples(who, tokens), min_size=1, max_size=4)),
        st.tuples(st.just("fork"), who, share),
        st.tuples(st.just("rewind"), who, share),
        st.tuples(st.just("demote"), who),
        st.tuples(st.just("branch"), who, share, st.booleans(), tokens),
    ),
    min_size=4,
    max_size=14,
)


@pytest.fixture(scope="module", params=[1, 4, 16])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    tiny = make_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))
    device = open_device(
        ModelOptions(model=str(tiny.folder), dtype="float32"), DeviceOptions(kv_memory="12M", threads=1),
        page_size=request.param, context_tokens=CONTEXT, rows_max=ROWS, progress=lambda stage, done: None,
    )  # fmt: skip
    yield device
    device.close()


@dataclass
class Clients:
    """What clients did, and every context that the model was asked to go on from."""

    core: Core
    histories: dict[str, list[int]] = field(default_factory=lambda: {"s0": [], "s1": []})
    nodes: dict[str, list[int]] = field(default_factory=dict)
    """Histories of the branching session's turns."""
    contexts: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.histories:
            self.core.open(name)
        self.core.open(BRANCHING, branching=True)

    def name(self, index: int) -> str:
        return list(self.histories)[index % len(self.histories)]

    def place(self, index: int, part: float) -> tuple[str, int]:
        name = self.name(index)
        return name, round(part * len(self.histories[name]))

    def ask(self, context: list[int]) -> int:
        self.contexts[len(self.contexts) + 1] = context
        return len(self.contexts)

    def turns(self, wanted: list[tuple[int, list[int]]]) -> None:
        """Turns of several sessions at once, beside each other."""
        asked: dict[str, int] = {}
        for index, new in wanted:
            name = self.name(index)
            context = self.histories[name] + new
            if name not in asked and len(context) + NEW_TOKENS <= CONTEXT:
                asked[name] = self.ask(context)
                self.core.submit(asked[name], new, NEW_TOKENS, session=name)
        self.core.run()
        for name, key in asked.items():
            self.histories[name] = self.contexts[key] + self.core.output[key]

    def fork(self, index: int, part: float) -> None:
        name, length = self.place(index, part)
        child = f"s{len(self.histories)}"
        self.core.fork(name, child, length)
        self.histories[child] = self.histories[name][:length]

    def rewind(self, index: int, part: float) -> None:
        name, length = self.place(index, part)
        self.core.rewind(name, length)
        self.histories[name] = self.histories[name][:length]

    def demote(self, index: int) -> None:
        self.core.demote(self.name(index))

    def branch(self, index: int, part: float, cut: bool, new: list[int]) -> None:
        """A turn that goes on from one of the turns, or begins anew."""
        parents = ["", *self.nodes]
        parent = parents[index % len(parents)]
        context = self.nodes[parent] if parent else []
        offset = round(part * len(context)) if cut else 0
        context = (context[:offset] if offset else context) + new
        if len(context) + NEW_TOKENS > CONTEXT:
            return
        key = self.ask(context)
        rid = f"t{key}"
        where = Branch(parent=parent, offset=offset) if parent else None
        self.core.submit(key, new, NEW_TOKENS, session=BRANCHING, rid=rid, branch=where)
        self.core.run()
        self.nodes[rid] = context + self.core.output[key]


@pytest.mark.parametrize("retract_every", [0, 4])
def test_h64_h66_whatever_was_done_to_a_session_it_says_what_a_fresh_prompt_would(
    device: Any, retract_every: int
) -> None:
    @given(deeds)
    @settings(max_examples=12)
    def check(script: list[tuple[Any, ...]]) -> None:
        clients = Clients(Core(device, chunk_tokens=7, retract_every=retract_every))
        for deed, *arguments in script:
            getattr(clients, deed)(*arguments)
        calm = Core(device, chunk_tokens=CONTEXT)
        for key, context in clients.contexts.items():
            calm.submit(key, context, NEW_TOKENS)
            calm.run()
        assert {key: calm.output[key] for key in clients.contexts} == clients.core.output

    check()
