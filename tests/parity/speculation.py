"""The same clients twice over a real device, without and with drafts: what they are told must be the same."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sessile.contract.messages import (
    CloseSession,
    Done,
    ForkSession,
    OpenSession,
    RewindSession,
    Sampling,
    Submit,
    ToEngine,
    pack_tokens,
    unpack_tokens,
)
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from tests.unit.drafters import ToldDrafter
from tests.unit.stage import deltas_of

STEPS_MAX = 20_000
KEY_TOKENS = 6
"""So many last tokens tell which text is being said."""


@dataclass
class Told:
    """What the clients were told: by key, output, log-probabilities, the most likely ids with theirs, and the end."""

    output: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    top_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    top_logprobs: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    done: dict[int, Done] = field(default_factory=dict)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    """The whole context of each request."""
    steps: int = 0
    preemptions: int = 0

    def ends(self) -> dict[int, tuple[object, ...]]:
        """How each request ended, but for what depends on steps."""
        return {
            key: (done.reason, done.matched, done.kept_bytes, done.prompt_tokens, done.completion_tokens)
            for key, done in self.done.items()
        }


class ChanceDrafter(ToldDrafter):
    """Knows what was said in an earlier run, and is wrong from a place on that the text itself decides: 0 … most."""

    def __init__(self, earlier: Told, vocab_size: int, most: int) -> None:
        self._following: dict[tuple[int, ...], list[int]] = {}
        for key, output in earlier.output.items():
            text = earlier.prompts[key] + output
            for place in range(len(earlier.prompts[key]), len(text)):
                self._following[tuple(text[max(0, place - KEY_TOKENS) : place])] = text[place : place + most]

        def said(text: list[int], count: int) -> list[int]:
            drafts = self._following.get(tuple(text[-KEY_TOKENS:]), [])[:count]
            right = hash(tuple(text[-3:])) % (most + 1)
            return [token if index < right else (token + 1) % vocab_size for index, token in enumerate(drafts)]

        super().__init__(said, limit=most)

    @property
    def verdicts(self) -> Counter[int]:
        """How often so many drafts of a step were accepted."""
        return Counter(accepted for line in self.lines for accepted in line.verdicts)


class Clients:
    """A machine over a device, and all that its clients are told. Overlapped unless said otherwise; audited in full."""

    def __init__(
        self, device: Any, facts: ModelFacts, *, chunk_tokens: int, drafter: ToldDrafter | None = None,
        drafts_max: int = 0, overlap: bool = True, **limits: Any,
    ) -> None:  # fmt: skip
        opened = device.facts
        self.told = Told()
        self._device = device
        self._overlap = overlap
        self._machine = Machine(
            Limits(
                pages_total=opened.pages_total, page_size=opened.page_size, rows_max=opened.rows_max,
                context_tokens=opened.context_tokens, chunk_tokens=chunk_tokens, drafts_max=drafts_max,
                **{"audit_level": 2} | limits,
            ),
            facts,
            drafter=drafter,
        )  # fmt: skip
        self.histories: dict[str, list[int]] = {}

    def send(self, message: ToEngine) -> None:
        self._machine.receive(message)
        self._gather()

    def open(self, session: str) -> None:
        self.send(OpenSession(op=0, session=session))
        self.histories[session] = []

    def fork(self, session: str, child: str, tokens: int) -> None:
        self.send(ForkSession(op=0, session=session, child=child, at_tokens=tokens))
        self.histories[child] = self.histories[session][:tokens]

    def rewind(self, session: str, tokens: int) -> None:
        self.send(RewindSession(op=0, session=session, to_tokens=tokens))
        self.histories[session] = self.histories[session][:tokens]

    def close(self, session: str) -> None:
        self.send(CloseSession(0, session))
        del self.histories[session]

    def run(self, submits: list[Submit]) -> None:
        """Send them all, run them to their ends, and note what became history."""
        for submit in submits:
            base = self.histories.get(submit.session or "", [])
            self.told.prompts[submit.key] = base + unpack_tokens(submit.tokens).tolist()
            self.send(submit)
        in_flight = None
        for _ in range(STEPS_MAX):
            if not self._machine.has_work:
                break
            planned = self._machine.plan()
            if in_flight is not None and (planned is None or planned.late or not self._overlap):
                self._machine.settle(in_flight.result())
                in_flight = None
            plan = self._machine.complete(planned) if planned else None
            ticket = self._device.launch(plan) if plan else None
            self.told.steps += plan is not None
            if in_flight is not None:
                self._machine.settle(in_flight.result())
            in_flight = ticket
            self._gather()
        assert not self._machine.has_work, "work was left"
        self.told.preemptions = self._machine.stats().preemptions_total
        for submit in submits:
            if submit.session is not None:
                self.histories[submit.session] = self.told.prompts[submit.key] + self.told.output[submit.key]

    def _gather(self) -> None:
        batch = self._machine.take_effects()
        if batch is None:
            return
        for key, tokens in deltas_of(batch):
            self.told.output[key] += tokens
        for detail in batch.details:
            self.told.logprobs[detail.key] += np.frombuffer(detail.logprobs, "<f4").tolist()
            self.told.top_ids[detail.key] += np.frombuffer(detail.top_ids, "<i4").tolist()
            self.told.top_logprobs[detail.key] += np.frombuffer(detail.top_logprobs, "<f4").tolist()
        for done in batch.done:
            assert done.reason in ("stop", "length"), done.message
            self.told.done[done.key] = done
        assert not [reply.error for reply in batch.replies if reply.error]


class Script:
    """A fixed draw of clients: rounds of plain requests and turns, and between them forks, rewinds and closes."""

    ROUNDS, PLAIN, TURNS = 8, 10, 15

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._dice = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def play(self, clients: Clients) -> None:
        """Let it happen. What is drawn depends on lengths of histories, which are the same if what is told is."""
        keys = iter(range(1, 10_000))
        names = iter(f"s{number}" for number in range(1000))
        for _ in range(self.ROUNDS):
            while len(clients.histories) < self.TURNS:
                clients.open(next(names))
            sessions = sorted(clients.histories)[: self.TURNS]
            clients.run([*self._submits(keys, [None] * self.PLAIN), *self._submits(keys, sessions)])
            self._rearrange(clients, names)

    def _submits(self, keys: Iterator[int], sessions: "list[str] | list[None]") -> list[Submit]:
        return [
            Submit(
                key=next(keys), tokens=pack_tokens(self._prompt()), sampling=self._sampling(), session=session,
                logprobs=int(self._dice.choice([-1, -1, 0, 3])),
            )
            for session in sessions
        ]  # fmt: skip

    def _rearrange(self, clients: Clients, names: Iterator[str]) -> None:
        sessions = sorted(clients.histories)
        for session in self._dice.choice(sessions, 5, replace=False).tolist():
            kind = self._dice.integers(3)
            place = int(self._dice.integers(1, len(clients.histories[session]) + 1))
            if kind == 0:
                clients.fork(session, next(names), place)
            elif kind == 1:
                clients.rewind(session, place)
            else:
                clients.close(session)

    def _prompt(self) -> list[int]:
        """Some repeat a phrase of their own."""
        tokens = self._dice.integers(3, self._vocab_size, self._dice.integers(1, 24)).tolist()
        return tokens * int(self._dice.choice([1, 1, 3]))

    def _sampling(self) -> Sampling:
        dice, settings = self._dice, {}
        if dice.random() < 0.5:
            settings |= {"temperature": float(dice.choice([0.7, 1.3])), "top_p": float(dice.choice([1.0, 0.9])),
                         "top_k": int(dice.choice([0, 20])), "min_p": float(dice.choice([0.0, 0.02]))}  # fmt: skip
        else:
            settings["temperature"] = 0.0
        if dice.random() < 0.3:
            settings |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2}
        if dice.random() < 0.3:
            settings["logit_bias"] = ((int(dice.integers(self._vocab_size)), float(dice.choice([-4.0, 3.0]))),)
        if dice.random() < 0.3:
            settings["min_new_tokens"] = int(dice.integers(1, 8))
        if dice.random() < 0.4:
            settings["stop"] = tuple(bytes(dice.integers(97, 123, size).tolist()) for size in (1, 2, 2))
        if dice.random() < 0.3:
            settings["stop_token_ids"] = tuple(dice.integers(3, self._vocab_size, 6).tolist())
        return Sampling(
            seed=int(dice.integers(1 << 62)), max_new_tokens=int(dice.integers(1, 28)), ignore_eos=dice.random() < 0.5,
            **settings,
        )  # fmt: skip
