"""When the next step has to be planned: as late as the device allows, so that whoever comes meanwhile is part of it.

A step that is planned at once runs without those who come while the device is still at the one before: they wait for
the rest of that one and for all of the next. Planned just in time, they wait for the rest of that one.
"""

from collections import deque

from sessile.contract.plan import StepPlan

MARGIN_NS = 200_000
"""Kept beside what the host has needed: a device that waits costs everybody, and waiting gains only who comes."""
RECENT_STEPS = 8
"""The shortest of so many steps of a size says how long the next one takes at least."""
SIZES_MAX = 1024
"""Sizes that are remembered."""
ROWS_MAX = 64
"""Larger steps are followed at once: up to here turns were seen to take no longer."""
PEAK_FADES_BY = 8
"""Of what the host needed more than now, a part in so many is forgotten each step."""


class LaunchTime:
    """Learns how long steps of each size take, and how long the host takes from there to a launch."""

    def __init__(self) -> None:
        self._durations_ns: dict[tuple[int, int], deque[int]] = {}
        self._host_ns = {False: 0, True: 0}
        """By whether the step before seats requests: behind that one there is more to do for each of them."""

    def observe_step(self, plan: StepPlan, step_ns: int) -> None:
        """A step took so long on the device, or less. Nothing is learned of one with too many rows."""
        if plan.rows.size > ROWS_MAX:
            return
        size = (plan.tokens.size, plan.rows.size)
        recent = self._durations_ns.get(size)
        if recent is None:
            if len(self._durations_ns) >= SIZES_MAX:
                self._durations_ns.clear()
            recent = self._durations_ns[size] = deque(maxlen=RECENT_STEPS)
        recent.append(step_ns)

    def observe_host(self, plan: StepPlan, host_ns: int) -> None:
        """So long it took to plan a step behind that one and to launch it. The longest of the last ones counts, and
        fades."""
        seats = plan.bind_rows.size > 0
        longest_ns = self._host_ns[seats]
        self._host_ns[seats] = max(host_ns, longest_ns - (longest_ns - host_ns) // PEAK_FADES_BY)

    def due_ns(self, plan: StepPlan, begun_ns: int) -> int:
        """When planning must begin, of what follows a step that the device began at begun_ns.

        In the past, which means at once, if nothing is known of this size.
        """
        recent = self._durations_ns.get((plan.tokens.size, plan.rows.size))
        if recent is None:
            return begun_ns
        return begun_ns + min(recent) - self._host_ns[plan.bind_rows.size > 0] - MARGIN_NS
