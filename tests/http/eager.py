"""`sessile serve` whose engine drafts whenever it can, whether that pays or not: for tests of what is verified.

Run as `python -m tests.http.eager FLAGS…`, with the flags of `sessile serve`. The server starts this module once more
for its engine: nothing in `sessile` knows of it.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

ENGINE = "--as-engine"


def serve(flags: Sequence[str]) -> int:
    """The server process, as `sessile.commands.serve` runs it but for the command of its engine."""
    from sessile.cli import config_from, parser_for
    from sessile.server.run import serve
    from sessile.text.load import load_tokenizer

    config = config_from(parser_for("serve").parse(flags))
    return serve(
        config.server,
        lambda: load_tokenizer(config.model.model),
        engine_argv=[sys.executable, "-m", "tests.http.eager", ENGINE],
        builder_argv=[sys.executable, "-m", "sessile", "builder"],
        engine_config=config.to_json(),
        settings=dataclasses.asdict(config),
    )


def engine(address: str) -> int:
    """The engine process, with the drafter of sessile/draft but for its thrift."""
    from sessile import commands
    from sessile.draft.drafter import LookupDrafter
    from sessile.draft.history import History, HistoryLimits
    from sessile.draft.pace import StepTimes
    from sessile.offline import opening

    class EagerDrafter(LookupDrafter):
        def limits(self, lines, caps, tokens):  # type: ignore[no-untyped-def]
            return caps

    def eager_drafter(shelf, table):  # type: ignore[no-untyped-def]
        return EagerDrafter(shelf, StepTimes((1, 2), (1, 1)), history=History(HistoryLimits()))

    opening.open_configured_engine = functools.partial(opening.open_configured_engine, make_drafter=eager_drafter)
    return commands.engine(address)


def main(*flags: str) -> int:
    if flags[0] == ENGINE:
        return engine(flags[1].removeprefix("--address="))
    return serve(flags)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
