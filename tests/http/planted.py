"""`sessile serve` with a fault planted in the core of its engine process: for tests that must fail then.

Run as `python -m tests.http.planted FAULT FLAGS…`, with the flags of `sessile serve`; FAULT is a name in
sessile/sim/faults.py. The server starts this module once more for its engine: nothing in `sessile` knows of it.
"""

import dataclasses
import sys
from collections.abc import Sequence

from sessile.sim.faults import MUTANTS
from sessile.sim.planting import planted

ENGINE = "--as-engine"


def serve(fault: str, flags: Sequence[str]) -> int:
    """The server process, as `sessile.commands.serve` runs it but for the command of its engine."""
    from sessile.cli import config_from, parser_for
    from sessile.server.run import serve
    from sessile.text.load import load_tokenizer

    config = config_from(parser_for("serve").parse(flags))
    return serve(
        config.server,
        lambda: load_tokenizer(config.model.model),
        engine_argv=[sys.executable, "-m", "tests.http.planted", fault, ENGINE],
        builder_argv=[sys.executable, "-m", "sessile", "builder"],
        engine_config=config.to_json(),
        settings=dataclasses.asdict(config),
    )


def engine(fault: str, address: str) -> int:
    """The engine process: everything is imported over the faulty core, which a compiled one cannot replace any more."""
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == fault]
    with planted(mutant.edits):
        from sessile import commands

        return commands.engine(address)


def main(fault: str, *flags: str) -> int:
    if flags[0] == ENGINE:
        return engine(fault, flags[1].removeprefix("--address="))
    return serve(fault, flags)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
