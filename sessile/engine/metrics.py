"""Totals that the core does not know: wall time and shortages of memory. The loop counts, and stamps its answers."""

import msgspec

from sessile.contract.messages import Batch, Reply, Stats
from sessile.engine.drafting import TimedDrafter


class StepTimes:
    """Running totals: time the device spent on steps and time the host spent on planning and settling them.

    drafter: what of the latter went into drafts. shortages: how often the device ran out of memory.
    """

    def __init__(self, drafter: TimedDrafter | None = None) -> None:
        self._drafter = drafter
        self.step_ns_total = 0
        self.plan_ns_total = 0
        self.shortages_total = 0

    def stamp(self, batch: Batch) -> Batch:
        """The batch with the totals written into every Stats among its replies."""
        if not any(isinstance(reply.value, Stats) for reply in batch.replies):
            return batch
        return msgspec.structs.replace(batch, replies=[self._stamp_reply(reply) for reply in batch.replies])

    def _stamp_reply(self, reply: Reply) -> Reply:
        if not isinstance(reply.value, Stats):
            return reply
        stamped = msgspec.structs.replace(
            reply.value,
            step_wall_s_total=self.step_ns_total / 1e9,
            plan_wall_s_total=self.plan_ns_total / 1e9,
            draft_wall_s_total=self._drafter.ns_total / 1e9 if self._drafter else 0.0,
            memory_shortages_total=self.shortages_total,
        )
        return msgspec.structs.replace(reply, value=stamped)
