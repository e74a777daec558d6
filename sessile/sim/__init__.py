"""The simulator: the shipped core under a toy device, hostile schedules and virtual time. Run `python -m sessile.sim`.

Nothing here waits, reads a clock or depends on hash order: a seed is a world, a workload and a trace.

    hashing      the toy model: cells, digests, tokens
    toy          a device that runs it over real pages and page tables
    reference    the same model over contiguous tokens
    world        limits and temper of one seed
    workload     which message comes next
    books        what clients may expect, kept from messages alone
    checkers     the claims of device and machine against both
    simulation   the loop of one seed
    narrate      what happened, in words
    run          many seeds, totals, replay, shrinking
    mutants      planted faults (faults, planting) that must be caught
    closure      small worlds (small_world, canonical, twin) explored to their last state
"""
