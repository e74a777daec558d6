"""What has to be refused, counted from what clients know: the statuses of which one must come."""

from collections.abc import Iterable

from sessile.contract.messages import Submit
from sessile.core.limits import Limits, TenantPolicy
from sessile.sim.records import RequestBook, SessionBook, corpus_of


def refusals_of_prompt(prompt: list[int], longest: int, wanted: int | None) -> set[int]:
    """An empty prompt, or one that is too long. longest: tokens that a sequence may have; wanted: of output."""
    refusals = set()
    if not prompt:
        refusals.add(400)
    # A prompt as long as the limit leaves room for no token, so only a turn that wants none may have it.
    if len(prompt) > longest - (wanted != 0):
        refusals.add(413)
    return refusals


def refusals_of_tenant(
    submit: Submit, new_tokens: int, limits: Limits, live: Iterable[RequestBook], sessions: Iterable[SessionBook]
) -> set[int]:
    """What comes if a submit is beyond what may wait, or its tenant may have in flight or hold in sessions.

    429 beside others, 413 or 400 if it is so by itself, with those of its group.
    """
    policy = _policy(limits, submit.tenant)
    own = [request for request in live if request.submit.tenant == submit.tenant and not request.is_over]
    tokens = sum([request.input_tokens for request in own])
    group = [request for request in own if submit.group >= 0 and request.submit.group == submit.group]
    group_tokens = sum([request.input_tokens for request in group])
    if new_tokens > limits.queue_tokens_max:
        return {413}
    if group and _exceeds(len(group) + 1, policy.requests_max):
        return {400}
    if _exceeds(group_tokens + new_tokens, policy.tokens_max):
        return {413}
    if submit.session is not None and _exceeds(new_tokens, policy.held_tokens_max):
        return {413}
    held = sum([len(line.history) for each in sessions if each.tenant == submit.tenant for line in each.lines])
    beyond = (
        _exceeds(len(own) + 1, policy.requests_max)
        or _exceeds(tokens + new_tokens, policy.tokens_max)
        or (submit.session is not None and _exceeds(held + new_tokens, policy.held_tokens_max))
    )
    return {429} if beyond else set()


def refusals_of_wish(submit: Submit, limits: Limits, live: Iterable[RequestBook]) -> set[int]:
    """What is asked and cannot be had: of drafts, no drafter, no such corpus or history; of grammars and of groups."""
    asks = bool(submit.speculate or submit.corpora is not None or submit.remember)
    refusals = {400} if asks and not limits.drafts_max else set()
    refusals |= _refusals_of_group(submit, live)
    if submit.remember and submit.tenant and not _policy(limits, submit.tenant).remembers:
        refusals.add(400)
    if limits.drafts_max and submit.corpora and submit.corpora != (corpus_of(submit.key),):
        refusals.add(404)
    if submit.grammar is not None and (submit.sampling.ignore_eos or submit.sampling.min_new_tokens):
        refusals.add(400)
    return refusals


def refusals_of_room(tenant: str, limits: Limits, sessions: Iterable[SessionBook]) -> list[int]:
    """[429] if no further session may be opened."""
    every = list(sessions)
    own = sum([session.tenant == tenant for session in every])
    most = _policy(limits, tenant).sessions_max
    return [429] * (count_lines(every) >= limits.sessions_max or _exceeds(own + 1, most))


def count_lines(sessions: Iterable[SessionBook]) -> int:
    """Sessions and turns of branching ones, which share one limit."""
    return sum([len(session.lines) for session in sessions])


def _policy(limits: Limits, tenant: str) -> TenantPolicy:
    return next((each for each in limits.tenants if each.name == tenant), TenantPolicy(tenant))


def _exceeds(count: int, most: int | None) -> bool:
    return most is not None and count > most


def _refusals_of_group(submit: Submit, live: Iterable[RequestBook]) -> set[int]:
    """A group is of plain requests of one tenant, and all of one prompt."""
    if submit.group < 0:
        return set()
    others = [each.submit for each in live if each.submit.group == submit.group and not each.is_over]
    alike = all(each.tokens == submit.tokens and each.tenant == submit.tenant for each in others)
    return set() if alike and submit.session is None else {400}
