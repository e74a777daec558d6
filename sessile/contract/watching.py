"""How a server looks into an engine that does not answer any more: the signs that both know."""

import signal
from pathlib import Path

STACKS_SIGNAL = signal.SIGUSR1
"""Makes an engine write the stacks of all its threads to its file, even if no Python runs in it."""
TELL_EVENTS = b"events\n"
"""A line on its standard input: log the last events of the machine, from a thread beside the loop."""


def stacks_file(address: str) -> Path:
    """Where an engine writes its stacks: beside its end of the link."""
    return Path(address.removeprefix("ipc://") + ".stacks")
