"""What a body may ask of drafts, the same on every surface, and what is told of them."""

from typing import Annotated, Any

from pydantic import Field

from sessile.contract.messages import Done
from sessile.server.body import Body

DRAFTS_MAX = 255
CORPORA_MAX = 64
"""Most corpora that a request may name."""
CorpusName = Annotated[str, Field(min_length=1, max_length=128)]


class DraftFields(Body):
    """Fields about drafts. They change how fast an answer comes, never what it says."""

    speculate: bool | None = None
    """Whether drafts are looked up; null: as the server does by default."""
    drafts_max: int | None = Field(default=None, ge=0, le=DRAFTS_MAX)
    """Most drafts in a step; null: as many as the server allows."""
    corpora: list[CorpusName] | None = Field(default=None, max_length=CORPORA_MAX)
    """Ids of the corpora to look in; null: all that the key may use."""
    remember: bool | None = None
    """Let later requests of the same key find drafts in this one."""

    @property
    def wish(self) -> dict[str, Any]:
        """The fields of Order, and of contract Submit, that these are."""
        return {
            "speculate": self.speculate,
            "drafts_max": -1 if self.drafts_max is None else self.drafts_max,
            "corpora": None if self.corpora is None else tuple(dict.fromkeys(self.corpora)),
            "remember": bool(self.remember),
        }


def draft_figures(done: Done) -> dict[str, Any]:
    """What drafts did for a request, under SGLang's names in meta_info; empty if none were looked up.

    spec_verify_ct counts the steps that gave it tokens, so that tokens by steps is the length SGLang shows.
    """
    if done.drafts_offered < 0:
        return {}
    steps = done.completion_tokens - done.drafts_accepted
    return {
        "spec_accept_length": done.completion_tokens / steps if steps else 0.0,
        "spec_accept_rate": done.drafts_accepted / done.drafts_offered if done.drafts_offered else 0.0,
        "spec_accept_token_num": done.drafts_accepted,
        "spec_draft_token_num": done.drafts_offered,
        "spec_verify_ct": steps,
        "spec_sources": {
            each.source: {"drafts_offered": each.drafts_offered, "drafts_accepted": each.drafts_accepted}
            for each in done.sources
        },
    }
