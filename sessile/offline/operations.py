"""What can be asked of one session beside its turns, as futures: the same for `Session` and `AsyncSession`."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sessile.completion import SessionState
from sessile.contract.messages import (
    CloseSession,
    ForkSession,
    GetSession,
    OpenSession,
    Outcome,
    RewindSession,
    SessionTokens,
    SessionView,
    ToEngine,
    unpack_tokens,
)
from sessile.offline.driver import Driver

Value = TypeVar("Value")


class Operations:
    """Asks a driver about one session. Every future may raise UserError: NotFound for a session that is closed."""

    def __init__(self, driver: Driver, session: str) -> None:
        self.driver = driver
        self.session = session

    def open(
        self, idle_timeout_s: float | None, reserve_tokens: int, max_tokens: int | None
    ) -> "Future[SessionState]":
        """Open it."""
        return self._viewed(
            lambda op: OpenSession(
                op=op,
                session=self.session,
                idle_timeout_s=idle_timeout_s,
                reserve_tokens=reserve_tokens,
                tokens_max=max_tokens,
            )
        )

    def fork(self, child: str, at_tokens: int | None, at_turn: int | None) -> "Future[SessionState]":
        """Fork it; the state of the child."""
        return self._viewed(
            lambda op: ForkSession(op=op, session=self.session, child=child, at_tokens=at_tokens, at_turn=at_turn)
        )

    def rewind(self, to_tokens: int | None, to_turn: int | None) -> "Future[SessionState]":
        """Cut its history."""
        return self._viewed(
            lambda op: RewindSession(op=op, session=self.session, to_tokens=to_tokens, to_turn=to_turn)
        )

    def state(self) -> "Future[SessionState]":
        """Look at it."""
        return self._viewed(lambda op: GetSession(op, self.session))

    def tokens(self) -> "Future[list[int]]":
        """Its history."""
        return mapped(self.driver.ask(lambda op: SessionTokens(op, self.session)), _tokens_of)

    def close(self) -> "Future[Any]":
        """Close it."""
        return self.driver.ask(lambda op: CloseSession(op, self.session))

    def _viewed(self, message: Callable[[int], ToEngine]) -> "Future[SessionState]":
        return mapped(self.driver.ask(message), _state_of)


def mapped(answer: "Future[Any]", convert: Callable[[Any], Value]) -> "Future[Value]":
    """The same answer to come, converted. Raises in it what the answer raises."""
    converted: Future[Value] = Future()

    def settle(done: "Future[Any]") -> None:
        if not converted.set_running_or_notify_cancel():
            return
        try:
            converted.set_result(convert(done.result()))
        except BaseException as error:  # Whatever it is, whoever waits for the answer gets it.
            converted.set_exception(error)

    answer.add_done_callback(settle)
    return converted


def _tokens_of(outcome: Outcome) -> list[int]:
    packed = outcome.values["tokens"]
    assert isinstance(packed, bytes)
    tokens: list[int] = unpack_tokens(packed).tolist()
    return tokens


def _state_of(view: SessionView) -> SessionState:
    return SessionState(
        id=view.id,
        phase=view.phase,
        turns=view.turns,
        tokens=view.tokens,
        kv_tokens=view.kv_tokens,
        own_pages=view.own_pages,
        shared_pages=view.shared_pages,
        tokens_max=view.tokens_max,
    )
