"""Coverage marks: the rare branches of the core, counted, so that a simulation can show that it took each of them."""

from enum import StrEnum


class Mark(StrEnum):
    """A branch that everyday load seldom takes."""

    PREEMPTED = "preempted at once"
    PREEMPTED_LATER = "preempted when the step in flight had settled"
    LIMBO_SHORTAGE = "a row sat out a step because limbo covers what it lacks"
    NEWEST_SAT_OUT = "a row sat out a step because no newer one could give way"
    EVICTED = "pages evicted from the prefix tree"
    DEMOTED = "pages taken from a parked session"
    DEMOTED_TO_NOTHING = "a parked session lost its last KV"
    DEMOTED_WAITING = "pages taken from a session whose turn waits"
    SURPLUS = "pages beyond a committed length dropped at hand-over"
    CUT_IN_SHARED_PAGE = "a cut gave up a shared page that it fell into"
    ROLLED_BACK_RUNNING = "a running turn rolled back"
    ROLLED_BACK_QUEUED = "a queued turn rolled back"
    DRAINED = "a row outlived its request by a step"
    COPIED = "the head of a page copied for a fork or rewind"
    NOT_COPIED = "no page free to copy to, or the source still written"
    SHARE_WAITED = "an admission waited for a prefix that is being computed"
    OVERTAKEN = "a later request admitted before one that did not fit"
    OVERTAKEN_ENOUGH = "a request went first because it was overtaken too often"
    ROW_GONE = "a row ended between the early and the late part of a plan"
    COPIES_ALONE = "a plan of copies alone"
    DRAFTS_CUT_BY_PAGES = "drafts cut because pages were short"
    DRAFT_PAGES_GIVEN_UP = "pages drawn for drafts given up before anybody was preempted"
    RESERVE_SPENT = "pages of a reserve set free for their session"
    RESERVE_OWED = "a reserve waited for pages"
    REPLAYED = "a lost reply said again"
    REPLACED_RUNNING = "a turn that ran ended because another replaced it"
