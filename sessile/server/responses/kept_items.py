"""What an item_reference may name: the items of all responses and conversations that are kept, by their ids."""

from collections.abc import Iterable
from dataclasses import dataclass

from sessile.server.responses.items import Item
from sessile.server.responses.shelf import Keepable


@dataclass(slots=True)
class _Entry:
    """An item, and how many of those that are kept have it: a response that refers to it does, too."""

    item: Item
    holders: int = 0


class KeptItems:
    """The items of all tenants. An item is there exactly as long as something that is kept has it."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, _Entry]] = {}
        self._by_holder: dict[str, tuple[Item, ...]] = {}

    def find(self, tenant: str, item_id: str) -> Item | None:
        """A tenant's item; None if there is none: another tenant's is not there."""
        entry = self._entries.get(tenant, {}).get(item_id)
        return None if entry is None else entry.item

    def assign(self, holder: Keepable, items: Iterable[Item]) -> None:
        """What something that is kept has from now on; nothing, once it is let go. Its id is that of no other."""
        own = self._entries.setdefault(holder.tenant, {})
        after = tuple(items)
        for item in after:
            own.setdefault(item["id"], _Entry(item)).holders += 1
        for item in self._by_holder.pop(holder.id, ()):
            entry = own[item["id"]]
            entry.holders -= 1
            if not entry.holders:
                del own[item["id"]]
        if after:
            self._by_holder[holder.id] = after
        if not own:
            del self._entries[holder.tenant]
