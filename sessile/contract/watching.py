"""What a server learns of its engine beside messages: the signs that both know."""

import signal
from pathlib import Path

STACKS_SIGNAL = signal.SIGUSR1
"""Makes an engine write the stacks of all its threads to its file, even if no Python runs in it."""
TELL_EVENTS = b"events\n"
"""A line on its standard input: log the last events of the machine, from a thread beside the loop."""
EXIT_CANNOT_START = 2
"""The status of an engine that cannot start, nor could another: a flag, a setting or a file is wrong."""


def stacks_file(address: str) -> Path:
    """Where an engine writes its stacks: beside its end of the link."""
    return Path(address.removeprefix("ipc://") + ".stacks")
