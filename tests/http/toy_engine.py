"""The real core behind the link, on the simulator's toy device: every token depends on all KV that was read for it."""

import threading
import time

import msgspec
import zmq

from sessile.contract.drafting import Drafter
from sessile.contract.messages import EngineReady
from sessile.contract.model import ModelFacts
from sessile.contract.plan import StepPlan
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.draft.drafter import LookupDrafter
from sessile.draft.pace import StepTimes
from sessile.draft.shelf import Shelf
from sessile.engine.clock import MonotonicClock
from sessile.engine.corpora import CorpusDesk
from sessile.engine.executor import Executor, Ticket
from sessile.engine.grammars import GrammarDesk
from sessile.engine.inbox import SocketInbox
from sessile.engine.loop import EngineLoop
from sessile.engine.outbox import SocketOutbox
from sessile.grammar.compiler import GrammarCompiler
from sessile.grammar.following import CompiledGrammars
from sessile.sim.toy import ToyDevice

VOCAB_SIZE = 256
"""Every byte is a token; no token ends an output."""
CONTEXT_TOKENS = 512
FREE_DRAFTS = StepTimes((1, 64), (1_000_000, 1_000_001))
"""A step costs the same whatever is verified in it, so that drafts are worth it wherever there are any."""


class Paced:
    """A device whose steps take at least `step_s`, so that a test can act while a request runs."""

    def __init__(self, device: Executor) -> None:
        self.step_s = 0.0
        self._device = device

    def launch(self, plan: StepPlan) -> Ticket:
        time.sleep(self.step_s)
        return self._device.launch(plan)

    def prepare(self) -> bool:
        return self._device.prepare()

    def close(self) -> None:
        self._device.close()


class ToyEngine:
    """An engine in a thread: connects to a server's link on start(), and is audited after every step.

    drafts_max: with it, it drafts; where no drafter is given, from what is on its shelf, as if drafts cost nothing.
    eos: the token that ends an output; with one, grammars are followed.
    """

    def __init__(
        self,
        address: str,
        *,
        pages: int = 400,
        overlap: bool = True,
        vocab_size: int = VOCAB_SIZE,
        drafter: Drafter | None = None,
        eos: int | None = None,
        **limits: object,
    ) -> None:
        self._address = address
        self._overlap = overlap
        settings = {"page_size": 4, "rows_max": 8, "chunk_tokens": 32, "audit_level": 2} | limits
        self.limits = Limits(pages_total=pages, context_tokens=CONTEXT_TOKENS, **settings)  # type: ignore[arg-type]
        self.facts = ModelFacts(
            vocab_size, CONTEXT_TOKENS, eos_ids=() if eos is None else (eos,),
            token_bytes=tuple(bytes([byte]) for byte in range(vocab_size)),
            special_ids=frozenset() if eos is None else frozenset({eos}),
        )  # fmt: skip
        grammars = None if eos is None else CompiledGrammars(vocab_size, threads=1)
        self._desk = None if grammars is None else GrammarDesk(GrammarCompiler(self.facts), grammars, MonotonicClock())
        self.shelf = Shelf()
        if self.limits.drafts_max and drafter is None:
            drafter = LookupDrafter(self.shelf, FREE_DRAFTS)
        self.machine = Machine(self.limits, self.facts, drafter=drafter, grammars=grammars)
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._loop: EngineLoop | None = None
        device = ToyDevice(
            pages_total=pages, page_size=self.limits.page_size, rows_max=self.limits.rows_max,
            context_tokens=CONTEXT_TOKENS, drafts_max=self.limits.drafts_max, vocab_size=vocab_size,
        )  # fmt: skip
        self.device = Paced(device)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        assert self._loop is not None, "the engine did not start, or what it ran raised"
        self._loop.begin_shutdown(0)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the engine did not stop"

    def run(self) -> None:
        """Connect, and work until told to stop."""
        limits = self.limits
        context = zmq.Context()
        socket = context.socket(zmq.PAIR)
        socket.connect(self._address)
        ready = EngineReady(
            model_name="toy", model_path="toy", architecture="toy", dtype="none", device="toy",
            vocab_size=self.facts.vocab_size, context_tokens=CONTEXT_TOKENS, page_size=limits.page_size,
            pages_total=limits.pages_total, rows_max=limits.rows_max, chunk_tokens=limits.chunk_tokens,
            queue_max=limits.queue_max,
            drafts_max=limits.drafts_max or 1, kv_bytes=0,
            weight_bytes=0, start_s=0.0,
        )  # fmt: skip
        socket.send(msgspec.msgpack.encode(ready))
        ends = SocketInbox(socket), SocketOutbox(socket)
        self._loop = EngineLoop(
            self.machine, self.device, *ends, MonotonicClock(), overlap=self._overlap,
            corpora=CorpusDesk(self.shelf, VOCAB_SIZE), grammars=self._desk,
        )  # fmt: skip
        self._loop.run()
        socket.close(linger=200)
        context.term()
