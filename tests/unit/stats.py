"""Statistics of an engine that has done nothing, for tests that need some."""

import msgspec

from sessile.contract.messages import SourceFigures, Stats, TenantFigures


def stats_of_nothing() -> Stats:
    """All zero and empty."""
    empty = {int: 0, float: 0.0, list[TenantFigures]: [], list[SourceFigures]: []}
    return Stats(**{field.name: empty.get(field.type, {}) for field in msgspec.structs.fields(Stats)})
