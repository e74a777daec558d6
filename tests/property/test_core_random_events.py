"""The machine under short random scripts: whatever is sent in whatever order, outputs are the reference's."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sessile.contract.messages import Cancel, CancelAll, Flush, Sampling
from sessile.contract.model import ModelFacts
from sessile.sim.reference import Speaker
from tests.unit.stage import Stage
from tests.unit.test_core_planning import PerfectDrafter

FACTS = ModelFacts(vocab_size=50, context_tokens=64, eos_ids=(2, 3), bos_id=1)
SESSIONS = ("a", "b", "c")

prompts = st.tuples(st.integers(4, 5), st.integers(0, 14), st.integers(4, 6)).map(
    lambda parts: [parts[0]] * parts[1] + [parts[2]]  # a few beginnings, so that many are shared
)
submits = st.tuples(
    st.just("submit"), st.sampled_from([*SESSIONS, None]), prompts, st.sampled_from([0, 1, 3, 9, None]),
    st.sampled_from([0.0, 0.7]),
)  # fmt: skip
events = st.lists(
    st.one_of(
        submits,
        submits,
        st.tuples(st.sampled_from(["open", "close"]), st.sampled_from(SESSIONS)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.sampled_from(["cancel all", "flush", "settle"])),
        st.tuples(st.just("launch"), st.integers(1, 4)),
        st.tuples(st.just("launch"), st.integers(1, 4)),
        st.tuples(st.just("tick"), st.integers(1, 5)),
    ),
    max_size=30,
)
bounds = st.fixed_dictionaries(
    {
        "pages": st.integers(6, 24),
        "page_size": st.sampled_from([1, 2, 4, 8]),
        "rows": st.integers(1, 4),
        "chunk": st.sampled_from([1, 3, 8, 64]),
        "mixed_chunk": st.booleans(),
        "retract_every": st.sampled_from([0, 0, 2, 5]),
        "output_estimate_tokens": st.sampled_from([1, 4096]),
        "overtakes_max": st.sampled_from([0, 2, 64]),
        "drafts": st.sampled_from([0, 0, 3]),
    }
)


@dataclass
class Sent:
    """A request as its client knows it: the whole context, what it asked for, and its session."""

    context: list[int]
    sampling: Sampling
    session: str | None
    limit: int


@dataclass
class Clients:
    """Sends events to a stage, and keeps what a correct engine must know."""

    stage: Stage
    longest: int
    histories: dict[str, list[int]] = field(default_factory=dict)
    live: dict[int, Sent] = field(default_factory=dict)
    key: int = 0
    now_ns: int = 0

    def do(self, event: tuple[Any, ...]) -> None:
        kind, *arguments = event
        if kind == "submit":
            self.submit(*arguments)
        elif kind == "open" and arguments[0] not in self.histories:
            assert self.stage.open(arguments[0], idle_timeout_s=4.0).error is None
            self.histories[arguments[0]] = []
        elif kind == "close":
            self.stage.close(arguments[0])
        elif kind == "cancel":
            self.stage.send(Cancel(self.key - arguments[0]))
        elif kind == "cancel all":
            self.stage.ask(CancelAll)
        elif kind == "flush":
            self.stage.send(Flush(10_000 + self.key))
        elif kind == "settle":
            self.stage.settle()
        elif kind == "tick":
            self.now_ns += arguments[0] * 1_000_000_000
            self.stage.machine.tick(self.now_ns)
        elif kind == "launch":
            for _ in range(arguments[0]):
                self.stage.launch()
        self.check()

    def submit(self, session: str | None, prompt: list[int], new_tokens: int | None, temperature: float) -> None:
        self.key += 1
        sampling = Sampling(seed=self.key, temperature=temperature, max_new_tokens=new_tokens)
        self.stage.submit(
            self.key, prompt, session=session, seed=self.key, temperature=temperature, max_new_tokens=new_tokens
        )
        if self.key not in self.stage.done:
            context = [*self.histories[session], *prompt] if session else prompt
            room = self.longest - len(context)
            limit = room if new_tokens is None else min(new_tokens, room)
            self.live[self.key] = Sent(context, sampling, session, limit)

    def check(self) -> None:
        """Compare all that was said since with the reference, and commit the turns that ended."""
        for key, sent in list(self.live.items()):
            output = self.stage.output[key]
            speaker = Speaker(sent.context, sent.sampling, FACTS)
            for token in output:
                assert token == speaker.peek(), f"request {key} said {output} after {sent.context}"
                speaker.push(token)
            if key in self.stage.done:
                self.end(key, self.live.pop(key), output)
        for session in list(self.histories):
            if ("", session) not in self.stage.machine._books.sessions:
                del self.histories[session]
            elif not any(sent.session == session for sent in self.live.values()):
                assert self.stage.history(session) == self.histories[session]

    def end(self, key: int, sent: Sent, output: list[int]) -> None:
        reason = self.stage.done[key].reason
        assert reason in ("stop", "length", "abort")
        assert (reason == "stop") <= (bool(output) and output[-1] in FACTS.eos_ids)
        assert (reason == "length") <= (len(output) == sent.limit)
        if sent.session is not None and reason != "abort" and sent.session in self.histories:
            self.histories[sent.session] = sent.context + output


@given(bounds, events)
@settings(max_examples=150)
def test_whatever_is_sent_outputs_are_the_references_and_nothing_is_left(
    bounds: dict[str, Any], events: list[tuple[Any, ...]]
) -> None:
    drafts_max = bounds["drafts"]
    limits = {name: value for name, value in bounds.items() if name != "drafts"}
    longest = min(FACTS.context_tokens, (bounds["pages"] - 1) * bounds["page_size"] - drafts_max)
    stage = Stage(facts=FACTS, drafter=PerfectDrafter() if drafts_max else None, drafts_max=drafts_max, **limits)
    clients = Clients(stage, longest)
    for event in events:
        clients.do(event)
    stage.run()
    clients.check()
    assert clients.live == {}
    for session in list(clients.histories):
        stage.close(session)
    stage.ask(Flush)
    stage.launch()
    stats = stage.stats()
    assert (stats.pages_free, stats.rows_held, stats.pages_tree_pinned) == (bounds["pages"] - 1, 0, 0)
