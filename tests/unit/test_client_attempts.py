"""When a client sends a request again, and when it gives up."""

import httpx
import pytest

from sessile.client.protocol import PATIENCE_S, Attempts, refusal
from sessile.errors import InvalidRequest, SessionBusy, UserError

URL = "http://127.0.0.1:1"
SEEN_TWICE = "rid: a request '0f' is in flight already"
"""What the server says of a request whose stream broke, and which it has not seen leave."""


def told(message: str) -> UserError:
    """A refusal of the native surface, which has no code."""
    return refusal(400, message)


def test_a_request_that_is_in_flight_already_is_sent_again_after_its_stream_broke() -> None:
    attempts = Attempts(URL, PATIENCE_S)
    attempts.pause_after(httpx.ReadError("reset"))
    error = told(SEEN_TWICE)
    assert isinstance(error, SessionBusy)
    assert 0 < attempts.pause_after(error) < PATIENCE_S


def test_a_name_that_another_request_has_is_no_reason_to_wait() -> None:
    with pytest.raises(SessionBusy, match="in flight already"):
        Attempts(URL, PATIENCE_S).pause_after(told(SEEN_TWICE))


def test_what_is_wrong_with_a_request_is_told_at_once_even_after_its_stream_broke() -> None:
    attempts = Attempts(URL, PATIENCE_S)
    attempts.pause_after(httpx.ReadError("reset"))
    with pytest.raises(InvalidRequest, match="unknown field"):
        attempts.pause_after(refusal(400, "colour: unknown field", code="invalid_request"))
