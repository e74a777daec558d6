"""Feed every reader and parser with inputs that atheris makes: `python scripts/fuzz.py --seconds 600 [TARGET…]`.

Each target runs in a process of its own, instrumented, so that inputs which reach new code are kept and changed on.
Then another process, not instrumented, takes all that were kept again and again, and its memory is looked at. Exit
status 1 if there is a finding: an exception that is no documented refusal, a refusal that cannot be sent, a call that
takes seconds, a process that dies or hangs, memory that grows. Each finding's input is a file below build/fuzz, whose
name is printed; `--input FILE TARGET` takes it again. Needs scripts/fuzzing/requirements.txt beside what tests need.
"""

import argparse
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

TARGETS = {
    "gguf": "files:Gguf", "folder": "files:Folder", "index": "files:Index", "upload": "files:Upload",
    "log": "files:Log", "keys": "files:Keys", "settings": "files:Settings", "catalogue": "files:Kept",
    "wire": "wire:Wire", "grammar": "texts:Grammars", "pattern": "texts:Patterns", "answer": "texts:Answers",
    "request": "requests:Requests",
}  # fmt: skip
"""Name → module of scripts/fuzzing, and class there."""
NOT_INSTRUMENTED = [
    "sessile.draft.compiled", "sessile.draft.lookup", "sessile.draft.suffixes", "sessile.kernels", "sessile.core",
    "sessile.engine", "sessile.sim.toy",
]  # fmt: skip
"""What numba compiles, which wants the byte code as Python makes it; and what is behind the edge, and would be slow."""
INPUT_BYTES_MAX = 16_384
SEED_SHARE = 0.2
"""Of the inputs: changed from a seed, which libFuzzer may have dropped because another one reaches the same code."""
CALL_S_MAX = 2.0
"""Of one call, in CPU time of the process."""
HANG_S = 120
RESIDENT_MB_MAX = 4096
FINDINGS_MAX = 20
GROWTH_MAX = 0.1
GROWTH_BYTES_MIN = 16 << 20
"""Less than that is how allocators round, whatever its share."""


def open_target(name: str, folder: Path) -> "Target":  # noqa: F821  (its module must not be imported before atheris)
    """The target of that name, with an empty folder of its own."""
    module, _, kind = TARGETS[name].partition(":")
    target = getattr(importlib.import_module(f"scripts.fuzzing.{module}"), kind)
    assert target.name == name
    return target(folder)


class Recorder:
    """Calls a target, and writes inputs down that it should not have failed at: one for each place and exception."""

    def __init__(self, run: Callable[[bytes], None], findings: Path) -> None:
        self._run = run
        self._findings = findings
        self._known: set[str] = set()
        self.calls = 0

    def __call__(self, raw: bytes) -> None:
        """One call; nothing is raised but what ends the process."""
        self.calls += 1
        before_s = time.process_time()
        try:
            self._run(raw)
        except Exception as error:
            inner = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {inner.filename}:{inner.lineno}"
            self._note(kind, raw, traceback.format_exc(limit=-12))
        took_s = time.process_time() - before_s
        if took_s > CALL_S_MAX:
            self._note("slow", raw, f"the call took {took_s:.1f} s of CPU time")

    def _note(self, kind: str, raw: bytes, told: str) -> None:
        if kind in self._known or len(self._known) >= FINDINGS_MAX:
            return
        self._known.add(kind)
        path = self._findings / f"{re.sub(r'[^A-Za-z]+', '-', kind)[:40]}-{hashlib.sha256(raw).hexdigest()[:12]}"
        path.write_bytes(raw)
        print(f"{told}\nfinding: {kind}: {path}", file=sys.stderr, flush=True)


@contextmanager
def opened(name: str) -> Iterator["Target"]:  # noqa: F821
    """A target in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="sessile-fuzz-") as folder:
        target = open_target(name, Path(folder))
        try:
            yield target
        finally:
            target.close()


def fuzz(name: str, seconds: int, where: Path) -> int:
    """The process that is instrumented. Ends by itself when the time is over."""
    import atheris

    with atheris.instrument_imports(include=["sessile"], exclude=NOT_INSTRUMENTED):
        importlib.import_module(f"scripts.fuzzing.{TARGETS[name].partition(':')[0]}")
    with opened(name) as target:
        seeds = target.seeds()
        for raw in seeds:
            (where / "corpus" / hashlib.sha256(raw).hexdigest()).write_bytes(raw)

        def changed(raw: bytes, bytes_max: int, seed: int) -> bytes:
            rng = Random(seed)
            if rng.random() < SEED_SHARE:
                raw = rng.choice(seeds)
            fresh = target.mutated(raw, rng) if rng.random() < 0.7 else atheris.Mutate(raw, bytes_max)
            return bytes(fresh[:bytes_max])

        flags = [
            f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-report_slow_units={HANG_S}", "-print_final_stats=1",
            f"-rss_limit_mb={RESIDENT_MB_MAX}", f"-max_len={INPUT_BYTES_MAX}",
            f"-artifact_prefix={where / 'findings'}/",
        ]  # fmt: skip
        recorder = Recorder(target.run, where / "findings")
        atheris.Setup([sys.argv[0], *flags, str(where / "corpus")], recorder, custom_mutator=changed)
        atheris.Fuzz()
    return 0


def play(name: str, seconds: int, where: Path) -> int:
    """The process that takes all kept inputs in turn, three times at least, and tells its memory after each round."""
    inputs = [path.read_bytes() for path in sorted((where / "corpus").iterdir())]
    with opened(name) as target:
        recorder = Recorder(target.run, where / "findings")
        until_s, rounds = time.monotonic() + seconds, 0
        while rounds < 4 or time.monotonic() < until_s:
            for raw in inputs:
                recorder(raw)
            rounds += 1
            print(f"resident {psutil.Process().memory_info().rss}", flush=True)
    return 0


def torment(name: str, seconds: int, folder: Path) -> list[str]:
    """Fuzz one target and play what was kept; what was found."""
    where = folder / name
    shutil.rmtree(where / "findings", ignore_errors=True)
    for each in ("corpus", "findings"):
        (where / each).mkdir(parents=True, exist_ok=True)
    failures = []
    log = where / "fuzz.log"
    with log.open("wb") as sink:
        status = subprocess.run(_command(name, seconds, folder, "fuzz"), stderr=sink, cwd=ROOT).returncode
    told = log.read_text("utf-8", "replace")
    if status != 0:
        failures.append(f"the process ended with status {status}; {log} says more")
    executed, peak_mb = (
        int(found[1]) if (found := re.search(rf"stat::{stat}:\s+(\d+)", told)) else 0
        for stat in ("number_of_executed_units", "peak_rss_mb")
    )
    if not executed:
        failures.append(f"nothing was run; {log} says more")
    played = subprocess.run(
        _command(name, max(5, seconds // 10), folder, "play"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if played.returncode != 0:
        failures.append(f"the process that plays the inputs ended with status {played.returncode}")
    resident = [int(line.split()[1]) for line in played.stdout.splitlines() if line.startswith("resident ")]
    first, last = (resident[len(resident) // 4], resident[-1]) if resident else (1, 1)
    if last - first > max(GROWTH_MAX * first, GROWTH_BYTES_MIN):
        failures.append(f"memory grows: from {first >> 20} to {last >> 20} MiB over the same inputs")
    found_files = sorted((where / "findings").iterdir())
    failures += [f"finding: {path}" for path in found_files]
    kept = len(list((where / "corpus").iterdir()))
    print(
        f"{name:10} {executed:9,} inputs in {seconds} s, {kept:5} kept, peak {peak_mb} MB; {len(resident)} rounds over"
        f" them: {first >> 20} to {last >> 20} MiB; {len(failures)} findings", flush=True,
    )  # fmt: skip
    return failures


def _command(name: str, seconds: int, folder: Path, part: str) -> list[str]:
    return [sys.executable, __file__, name, "--seconds", str(seconds), "--folder", str(folder), "--part", part]


def main() -> int:
    """Every target, or those that are named; 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--seconds", type=int, default=600, help="how long each target is fuzzed")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="for what is kept and found")
    parser.add_argument("--input", type=Path, help="run the named target once, on this file")
    parser.add_argument("--part", choices=("fuzz", "play"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"there is no target {unknown[0]!r}")
    os.environ["PYTHONPATH"] = str(ROOT)
    if arguments.part:
        part = fuzz if arguments.part == "fuzz" else play
        return part(names[0], arguments.seconds, arguments.folder / names[0])
    if arguments.input:
        with opened(names[0]) as target:
            target.run(arguments.input.read_bytes())
        return 0
    failures = 0
    for name in names:
        found = torment(name, arguments.seconds, arguments.folder.resolve())
        failures += len(found)
        for failure in found:
            print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
