"""Checks of what comes beside tokens, and of replies that are said again."""

import numpy as np

from sessile.contract.messages import Done, Scores, TokenDetail, with_key
from sessile.sim.records import RequestBook, check, fail


def check_repeated(request: RequestBook, first: RequestBook, tokens: list[int], detail: TokenDetail | None) -> None:
    """A reply that is said again has all tokens at once, and the same ones."""
    if request.output or tokens != first.output:
        fail("replay", f"request {request.key} repeats {first.key}, got {tokens} for {first.output}")
    request.output.extend(tokens)
    details = [each for each in first.told if isinstance(each, TokenDetail)]
    for name in ("logprobs", "top_ids", "top_logprobs"):
        found = getattr(detail, name) if detail is not None else b""
        if found != b"".join([getattr(each, name) for each in details]):
            fail("replay", f"request {request.key}: other {name} than request {first.key} was told")


def check_replayed(request: RequestBook, first: RequestBook, done: Done) -> None:
    """It ends as the first one did, after the same tokens and scores."""
    if first.done is None or done != with_key(first.done, request.key) or request.output != first.output:
        fail("replay", f"request {request.key} repeats {first.key}: {done} after {first.done}")
    firsts = [each for each in first.told if isinstance(each, Scores)]
    scores = [each for each in request.told if isinstance(each, Scores)]
    if scores != [with_key(each, request.key) for each in firsts]:
        fail("replay", f"request {request.key}: other scores than request {first.key} was told")


def check_logprobs(
    key: int, found: TokenDetail | Scores, logprobs: list[float], tops: list[tuple[int, float]]
) -> None:
    """Compare log-probabilities with the reference's."""
    same = (
        np.frombuffer(found.logprobs, "<f4").tolist() == logprobs
        and np.frombuffer(found.top_ids, "<i4").tolist() == [token for token, _ in tops]
        and np.frombuffer(found.top_logprobs, "<f4").tolist() == [score for _, score in tops]
    )
    check(same, "logprob", f"request {key}: not the log-probabilities of what it read")
