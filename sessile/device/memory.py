"""How much memory and how many cores this process may use, control groups included."""

import os
from pathlib import Path

from sessile.errors import StartupError

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def available_bytes() -> int:
    """Memory that can still be taken without swapping, in bytes: of the machine or of our control group, if less."""
    free = _machine_bytes()
    for limit, used in _group_memory():
        free = min(free, max(limit - used, 0))
    return free


def available_cores() -> int:
    """Cores that this process may use, at least 1: affinity and the control group's quota counted, not SMT twins."""
    cores = float(_physical_cores())
    for quota in _group_quotas():
        cores = min(cores, quota)
    return max(int(cores), 1)


def parse_bytes(text: str, flag: str) -> int:
    """Bytes meant by "1500000000", "512M" or "4G" (powers of two). Raises StartupError naming the flag."""
    number, factor = text.strip().upper().removesuffix("B").removesuffix("I"), 1
    if number and number[-1] in _SUFFIXES:
        number, factor = number[:-1], _SUFFIXES[number[-1]]
    try:
        size = float(number) * factor
    except ValueError as error:
        raise StartupError(f"{flag} {text!r} is no size; write bytes, or 512M, or 4G.") from error
    if not 0 < size < 1 << 60:
        raise StartupError(f"{flag} {text!r} is out of range; write bytes, or 512M, or 4G.")
    return int(size)


def readable(size: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _machine_bytes() -> int:
    """Memory of the machine that is free or easily freed; where that is not told, what is installed."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _physical_cores() -> int:
    """Cores among the processors we may run on: hardware threads that share one count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for processor in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(processor))
    return len(cores)


def _groups() -> list[Path]:
    """Folders of our control group (version 2) and its parents; empty where there is none."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        if line.startswith("0::"):
            own = root / line[3:].strip("/")
            return [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return []


def _group_memory() -> list[tuple[int, int]]:
    """(limit, used) in bytes of every control group above us that has a limit."""
    found = []
    for folder in _groups():
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            found.append((limit, used))
    version_1 = Path("/sys/fs/cgroup/memory")
    limit, used = _number(version_1 / "memory.limit_in_bytes"), _number(version_1 / "memory.usage_in_bytes")
    if limit is not None and used is not None:
        found.append((limit, used))
    return found


def _group_quotas() -> list[float]:
    """Cores granted by every control group above us that has a quota."""
    quotas = []
    for folder in _groups():
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            quotas.append(int(quota) / int(period))
    return quotas


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file or it says "max"."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
