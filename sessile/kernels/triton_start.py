"""What the first kernel of a process waits for and that needs no PyTorch: done beside the import of PyTorch."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("sessile.kernels")

NVIDIA_DEVICE = Path("/dev/nvidiactl")
"""There wherever NVIDIA's driver for Linux is."""


@contextlib.contextmanager
def head_start(wanted: bool) -> Iterator[None]:
    """Within it a thread prepares Triton, if that is wanted and there may be a GPU; at its end that is done.

    What fails within it leaves the thread to itself. Triton's cache has a digest of all of Triton in its keys, some
    400 MB to read, and what speaks to the driver is built by a C compiler the first time.
    """
    if not wanted or not NVIDIA_DEVICE.exists():
        yield
        return
    thread = threading.Thread(target=_prepare, name="triton-start", daemon=True)
    thread.start()
    yield
    thread.join()


def _prepare() -> None:
    try:
        from triton.backends.nvidia.driver import CudaUtils
        from triton.runtime.cache import triton_key

        triton_key()
        CudaUtils()
    except Exception as error:
        # The first kernel asks for the same, and fails where somebody is told.
        log.debug("no head start for Triton: %s", error)
