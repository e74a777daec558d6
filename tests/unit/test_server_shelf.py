"""What the server keeps for its clients is bounded for each tenant, and each thing is let go exactly once."""

from dataclasses import dataclass

from sessile.server.responses.shelf import Shelf


@dataclass(eq=False)
class Thing:
    id: str
    tenant: str = "acme"
    size_bytes: int = 10
    used_s: float = 0.0


class Kept:
    """A shelf of three things, thirty-five bytes and a minute, with a clock to be set."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.gone: list[str] = []
        self.shelf: Shelf[Thing] = Shelf(
            count_max=3, bytes_max=35, idle_s=60, let_go=lambda thing: self.gone.append(thing.id),
            clock=lambda: self.now_s,
        )  # fmt: skip

    def put(self, *names: str, **fields: object) -> None:
        for name in names:
            self.shelf.put(Thing(name, **fields))  # type: ignore[arg-type]


def test_the_least_recently_used_is_let_go_beyond_the_count() -> None:
    kept = Kept()
    kept.put("a", "b", "c")
    assert kept.shelf.find("acme", "a") is not None
    kept.put("d")
    assert kept.gone == ["b"]


def test_bytes_are_bounded_and_counted_anew_when_a_thing_grows() -> None:
    kept = Kept()
    kept.put("a", "b")
    grown = kept.shelf.find("acme", "b")
    assert grown is not None
    kept.shelf.resize(grown, 30)
    assert kept.gone == ["a"]
    kept.put("c")
    assert kept.gone == ["a", "b"]


def test_a_thing_beyond_the_bound_by_itself_is_not_kept() -> None:
    kept = Kept()
    kept.put("a", size_bytes=36)
    assert kept.gone == ["a"] and kept.shelf.find("acme", "a") is None


def test_one_tenants_things_do_not_push_anothers_out() -> None:
    kept = Kept()
    kept.put("a", tenant="umbra")
    kept.put("b", "c", "d", "e")
    assert kept.gone == ["b"]
    assert kept.shelf.find("umbra", "a") is not None and kept.shelf.find("acme", "a") is None


def test_what_nobody_uses_is_let_go_in_time_whoever_comes_by() -> None:
    kept = Kept()
    kept.put("a", "b")
    kept.now_s = 50
    assert kept.shelf.find("acme", "b") is not None
    kept.now_s = 70
    kept.put("c", tenant="umbra")
    assert kept.gone == ["a"]


def test_a_thing_is_let_go_once() -> None:
    kept = Kept()
    thing = Thing("a")
    kept.shelf.put(thing)
    kept.shelf.remove(thing)
    kept.shelf.remove(thing)
    assert kept.gone == ["a"]
