"""Build and run an image without a container engine: `python scripts/replay_image.py BASE FOLDER`, as root.

BASE is the root file system that stands for the image after FROM, such as debootstrap makes; it is copied, and the
Dockerfile's instructions are performed in the copies, each in a chroot, as the user and with the environment that they
say. Then the image is run as a container would be, in a network of its own: without keys it must refuse to start, with
SESSILE_ALLOW_REMOTE=on it must pass its own HEALTHCHECK, answer a request, and end with status 0 at its STOPSIGNAL. An
instruction that is not understood ends all this. What the build needs of this machine (an index of packages,
certificates) is named by --build-file and --build-env, and is not in the image.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from scripts.dockerfile import (  # noqa: E402  (found by the line above)
    PATH,
    Copy,
    Image,
    Instruction,
    context_rules,
    copy_of,
    from_of,
    instructions_of,
    note,
)

HEALTHY_S_MAX, END_S_MAX = 600.0, 60.0
OF_THE_NETWORK = ("/etc/resolv.conf", "/etc/hosts")
"""What an engine puts into a container that is being built."""
ASKED = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}


@dataclass
class Stage:
    """One stage: what was said of its image, and where its root is."""

    image: Image
    root: Path

    def inside(self, path: str) -> Path:
        """A path of the image, from outside; relative ones begin at its workdir."""
        return self.root / os.path.normpath(os.path.join(self.image.workdir, path)).lstrip("/")


@dataclass
class Replay:
    """Performs instructions. context: where COPY copies from. bound: what of this machine the build sees, and where."""

    base: Path
    folder: Path
    context: Path
    arguments: Mapping[str, str]
    environment: Mapping[str, str]
    bound: list[Path]
    stages: list[Stage] = field(default_factory=list)

    def perform(self, instruction: Instruction) -> None:
        """Do what one instruction says. Raises NotFollowed, and CalledProcessError if a RUN fails."""
        if instruction.word == "FROM":
            image = from_of(instruction)
            root = self.folder / f"stage-{len(self.stages)}"
            if root.exists():
                shutil.rmtree(root)
            print(f"line {instruction.line}: {self.base} stands for {image.base}", flush=True)
            subprocess.run(["cp", "-a", "--reflink=auto", str(self.base), str(root)], check=True)
            self.stages.append(Stage(image, root))
            return
        stage = self.stages[-1]
        if note(stage.image, instruction, self.arguments):
            if instruction.word == "WORKDIR":
                stage.inside(".").mkdir(parents=True, exist_ok=True)
        elif instruction.word == "COPY":
            self._copy(stage, instruction, copy_of(instruction))
        else:
            self._run(stage, instruction)

    def _run(self, stage: Stage, instruction: Instruction) -> None:
        if instruction.rest.startswith(("--", "[")):
            raise instruction.refuse("only what a shell runs is followed")
        started_s = time.monotonic()
        environment = {"PATH": PATH, "HOME": "/root"} | stage.image.arguments | stage.image.environment
        with bound_into(stage.root, [*map(Path, OF_THE_NETWORK), *self.bound]):
            chrooted(stage, ["/bin/sh", "-c", instruction.rest], environment | self.environment).check_returncode()
        print(f"line {instruction.line}: RUN took {time.monotonic() - started_s:.0f} s", flush=True)

    def _copy(self, stage: Stage, instruction: Instruction, copy: Copy) -> None:
        target = stage.inside(copy.target)
        into = copy.target.endswith("/") or len(copy.sources) > 1
        for name in copy.sources:
            source, left_out = self._source(instruction, copy, name)
            if not source.exists():
                raise instruction.refuse(f"there is no {name}")
            if source.is_dir():  # its content, wherever it goes
                shutil.copytree(
                    source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out)
                )
                continue
            place = target / source.name if into else target
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)

    def _source(self, instruction: Instruction, copy: Copy, name: str) -> tuple[Path, list[str]]:
        """Where a source is, and what is left out of it wherever it is in there."""
        if copy.stage is None:
            let_in, left_out = context_rules((self.context / ".dockerignore").read_text("utf-8"))
            if name not in let_in:
                raise instruction.refuse(f".dockerignore leaves {name} out")
            return self.context / name, left_out
        for stage in self.stages[:-1]:
            if stage.image.name == copy.stage:
                return stage.inside(name), []
        raise instruction.refuse(f"there is no stage {copy.stage}")


@contextmanager
def bound_into(root: Path, paths: list[Path]) -> Iterator[None]:
    """Let files and folders of this machine be seen in a root, read-only, with /proc and /dev; then none of it."""
    made: list[Path] = []
    mounted: list[Path] = []
    try:
        for path in (Path("/dev"), *paths):
            place = root / str(path).lstrip("/")
            if not os.path.lexists(place):
                made.append(place)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.mkdir() if path.is_dir() else place.touch()
            subprocess.run(["mount", "--bind", str(path), str(place)], check=True)
            mounted.append(place)
            if path != Path("/dev"):
                subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
        mounted.append(root / "proc")
        yield
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        for place in reversed(made):
            place.rmdir() if place.is_dir() else place.unlink()


def entered(stage: Stage) -> Callable[[], None]:
    """What a child does before it begins: it goes into the root and becomes the stage's user."""
    line = next(
        line.split(":") for line in (stage.root / "etc" / "passwd").read_text().splitlines()
        if stage.image.user in line.split(":")[0::2][:2]
    )  # fmt: skip

    def enter() -> None:
        os.chroot(stage.root)
        os.chdir(stage.image.workdir)
        os.setgroups([])
        os.setgid(int(line[3]))
        os.setuid(int(line[2]))

    return enter


def chrooted(stage: Stage, argv: list[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[bytes]":
    """Run something in a stage to its end."""
    return subprocess.run(argv, env=dict(environment), preexec_fn=entered(stage))


def begun(stage: Stage, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """The image's own command, as a container runs it."""
    argv = [*stage.image.entrypoint, *stage.image.command]
    own = {"PATH": PATH, "HOME": "/"} | stage.image.environment | environment
    # The search for the program is the child's, in its own root.
    return subprocess.Popen(["/bin/sh", "-c", 'exec "$@"', "sh", *argv], env=own, preexec_fn=entered(stage))


def run_image(stage: Stage) -> list[str]:
    """Run what was built; what does not hold. In a network of its own, the port is the image's."""
    image, failures = stage.image, []
    assert image.port is not None and image.health is not None, "the image says its port and how it is"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    missing = [volume for volume in image.volumes if not stage.inside(volume).is_dir()]
    failures += [f"there is no {volume} for a volume" for volume in missing]
    with bound_into(stage.root, []):
        refused = begun(stage, {}).wait(HEALTHY_S_MAX)
        if refused != 2:
            failures.append(f"without keys it ends with status {refused} instead of 2")
        started_s = time.monotonic()
        server = begun(stage, {"SESSILE_ALLOW_REMOTE": "on"})
        try:
            environment = {"PATH": PATH} | image.environment
            asked = ["/bin/sh", "-c", 'exec "$@" 2>/dev/null', "sh", *image.health]
            while chrooted(stage, asked, environment).returncode:
                if server.poll() is not None or time.monotonic() - started_s > HEALTHY_S_MAX:
                    return [*failures, f"it is not healthy; status {server.poll()}"]
                time.sleep(1)
            print(f"healthy after {time.monotonic() - started_s:.0f} s", flush=True)
            body, kind = json.dumps(ASKED).encode(), {"content-type": "application/json"}
            request = urllib.request.Request(f"http://127.0.0.1:{image.port}/generate", body, kind)
            with urllib.request.urlopen(request, timeout=HEALTHY_S_MAX) as reply:
                answer = json.load(reply)
            print(f"answered {ASKED['text']!r} with {answer['text']!r}", flush=True)
            if answer["meta_info"]["completion_tokens"] != 8:
                failures.append(f"the answer is {answer}")
            server.send_signal(signal.Signals[image.stop_signal])
            if (status := server.wait(END_S_MAX)) != 0:
                failures.append(f"at {image.stop_signal} it ended with status {status}")
        finally:
            server.kill()
            server.wait()
    return failures


def megabytes(root: Path) -> int:
    """What a root takes on the disk."""
    return int(subprocess.run(["du", "-sxm", str(root)], check=True, capture_output=True, text=True).stdout.split()[0])


def apart(*namespaces: str) -> None:
    """Go on in namespaces of our own: what is mounted goes with this process. The first call does not return."""
    if os.environ.get("REPLAY_APART") != ",".join(namespaces):
        os.environ["REPLAY_APART"] = ",".join(namespaces)
        flags = [f"--{each}" for each in namespaces]
        os.execvp("unshare", ["unshare", *flags, "--propagation", "private", sys.executable, *sys.argv])


def main() -> int:
    """Build, run, judge; 0 if everything holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the root file system that stands for the images after FROM")
    parser.add_argument("folder", type=Path, help="where the stages' roots are made, and stay")
    parser.add_argument("--dockerfile", type=Path, default=ROOT / "deploy" / "Dockerfile")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--build-file", action="append", default=[], type=Path, help="of this machine, for RUN alone")
    parser.add_argument("--build-env", action="append", default=[], metavar="NAME=VALUE", help="for RUN alone")
    parser.add_argument("--only-run", action="store_true", help="run what an earlier call has built")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("only root may change roots")
    if not (arguments.base / "bin" / "sh").exists():
        parser.error(f"{arguments.base} is no root file system: it has no /bin/sh; debootstrap makes one")
    instructions = instructions_of(arguments.dockerfile.read_text("utf-8"))
    values = [dict(each.split("=", 1) for each in given) for given in (arguments.build_arg, arguments.build_env)]
    folder = arguments.folder.resolve()
    if arguments.only_run:
        apart("mount", "net")
        last = from_of(instructions[[each.word for each in instructions].index("FROM")])
        count = -1
        for each in instructions:
            if each.word == "FROM":
                last, count = from_of(each), count + 1
            else:
                note(last, each, values[0])
        failures = run_image(Stage(last, folder / f"stage-{count}"))
    else:
        apart("mount")
        folder.mkdir(parents=True, exist_ok=True)
        started_s = time.monotonic()
        replay = Replay(arguments.base.resolve(), folder, ROOT, *values, arguments.build_file)
        for each in instructions:
            replay.perform(each)
        print(
            f"{len(instructions)} instructions in {time.monotonic() - started_s:.0f} s; the image has"
            f" {megabytes(replay.stages[-1].root)} MB, {megabytes(replay.base)} of them its base's", flush=True,
        )  # fmt: skip
        os.environ.pop("REPLAY_APART")
        return subprocess.run([sys.executable, *sys.argv, "--only-run"]).returncode
    for failure in failures:
        print(f"  {failure}")
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
