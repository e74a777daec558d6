"""The builder's side of the server: a child process that is there while there is something to build.

It is started by the first build and ended when it has had nothing to do for a while. If it dies, its builds fail with
the reason, and the next one starts another.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Sequence

import msgspec

from sessile.contract.corpora import (
    FRAME_HEAD,
    Build,
    BuilderReady,
    BuildFailed,
    Built,
    CancelBuild,
    Counted,
    FromBuilder,
    Proceed,
    Progress,
    Source,
    ToBuilder,
)
from sessile.errors import InvalidRequest, LimitReached, UserError
from sessile.server.engine_process import describe_exit

log = logging.getLogger("sessile.corpora")

IDLE_S = 60.0
"""How long a builder without work is kept: starting one takes a second or two, keeping it some hundred megabytes."""
KILL_AFTER_S = 5.0


class BuildError(UserError):
    """A build that failed through no fault of its texts."""

    status = 500
    code = "build_failed"


class Cancelled(InvalidRequest):
    """The corpus was removed while it was loaded."""

    status = 409
    code = "cancelled"


class BuildRun:
    """One build as its owner sees it. Both futures fail with the same UserError if the build does.

    counted: what the text comes to. built: checksum of the file, which is at its target and on the disk.
    """

    def __init__(self, number: int, process: "BuilderProcess") -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.stage, self.share = "waiting", 0.0
        self.counted: asyncio.Future[Counted] = loop.create_future()
        self.built: asyncio.Future[str] = loop.create_future()
        self._process = process
        for future in (self.counted, self.built):
            future.add_done_callback(_retrieve)

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer it is built with; known once it was counted."""
        assert self._process.tokenizer is not None
        return self._process.tokenizer

    def proceed(self) -> None:
        """Room is reserved: go on after counting."""
        self._process.send(Proceed(self.number))

    def cancel(self) -> None:
        """Give it up. It has ended, and writes nothing any more, when `built` is done: then it mostly has failed."""
        if not self.built.done():
            self._process.send(CancelBuild(self.number))

    def take(self, message: Progress | Counted | Built | BuildFailed) -> None:
        """What the builder says of it."""
        if isinstance(message, Progress):
            self.stage, self.share = message.stage, message.share
        elif isinstance(message, Counted):
            self.stage, self.share = "indexing", 0.0
            self.counted.set_result(message)
        elif isinstance(message, Built):
            self.built.set_result(message.checksum)
        else:
            self.fail(_error_of(message))

    def fail(self, error: UserError) -> None:
        """End it with an error, unless it has ended."""
        for future in (self.counted, self.built):
            if not future.done():
                future.set_exception(error)


class BuilderProcess:
    """One life of the child. Owns it; `alive` until its output has ended."""

    def __init__(self, process: asyncio.subprocess.Process, config: str) -> None:
        """config: one line of JSON, the first thing that the child reads."""
        assert process.stdin is not None and process.stdout is not None
        self.tokenizer: str | None = None
        self.runs: dict[int, BuildRun] = {}
        self.alive = True
        self.idle_since_s = asyncio.get_running_loop().time()
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._decoder: msgspec.msgpack.Decoder[FromBuilder] = msgspec.msgpack.Decoder(FromBuilder)
        self._stdin.write(config.encode() + b"\n")
        self._reader = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def begin(self, number: int, sources: Sequence[Source], target: str, tokens_max: int) -> BuildRun:
        """Start a build."""
        run = self.runs[number] = BuildRun(number, self)
        self.send(Build(build=number, sources=list(sources), target=target, tokens_max=tokens_max))
        return run

    def send(self, message: ToBuilder) -> None:
        """Queue a message; one to a child that is gone is lost, as its builds have failed or are about to."""
        packed = msgspec.msgpack.encode(message)
        if self.alive and not self._stdin.is_closing():
            self._stdin.write(FRAME_HEAD.pack(len(packed)) + packed)

    def retire(self) -> None:
        """Let it end by itself: its input is over."""
        self._stdin.close()

    async def stop(self) -> None:
        """Make sure that the child is gone."""
        self.retire()
        try:
            await asyncio.wait_for(asyncio.shield(self._reader), KILL_AFTER_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._reader

    async def _read(self) -> None:
        """Pass on what the child says until it ends; then fail what it has not finished."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                (size,) = FRAME_HEAD.unpack(await self._stdout.readexactly(FRAME_HEAD.size))
                self._take(self._decoder.decode(await self._stdout.readexactly(size)))
        self.alive = False
        how = describe_exit(await self._process.wait())
        if self.runs:
            log.error("the process that builds indexes of corpora ended", extra={"how": how, "builds": len(self.runs)})
        for run in self.runs.values():
            run.fail(BuildError(f"the process that builds indexes {how}; add the corpus again"))
        self.runs.clear()

    def _take(self, message: FromBuilder) -> None:
        if isinstance(message, BuilderReady):
            self.tokenizer = message.tokenizer
            return
        self.runs[message.build].take(message)
        if isinstance(message, Built | BuildFailed):
            del self.runs[message.build]
            self.idle_since_s = asyncio.get_running_loop().time()


class BuilderLink:
    """Gives builds to a builder, starting one where there is none. Owns every process that it started."""

    def __init__(self, argv: Sequence[str], config: str, *, idle_s: float = IDLE_S) -> None:
        """argv: the builder's command. config: one line of JSON for its standard input."""
        assert "\n" not in config, "the configuration must be one line"
        self._argv = argv
        self._config = config
        self._idle_s = idle_s
        self._numbers = itertools.count(1)
        self._starting = asyncio.Lock()
        self._process: BuilderProcess | None = None
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the builder, if one is there."""
        return self._process.pid if self._process and self._process.alive else None

    async def begin(self, sources: Sequence[Source], target: str, tokens_max: int) -> BuildRun:
        """Start a build, and a builder if need be. Raises BuildError if none can be started."""
        async with self._starting:
            if self._process is None or not self._process.alive:
                self._process = await self._start()
            return self._process.begin(next(self._numbers), sources, target, tokens_max)

    async def close(self) -> None:
        """End the builder; what it was building fails."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        async with self._starting:
            if self._process is not None:
                await self._process.stop()
                self._process = None

    async def _start(self) -> BuilderProcess:
        pipe = asyncio.subprocess.PIPE
        try:
            # Its own session: Ctrl-C in the terminal is the server's to answer.
            child = await asyncio.create_subprocess_exec(*self._argv, stdin=pipe, stdout=pipe, start_new_session=True)
        except OSError as error:
            raise BuildError(f"the process that builds indexes cannot be started: {error}") from error
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        return BuilderProcess(child, self._config)

    async def _sweep(self) -> None:
        """End a builder that has had nothing to do for long."""
        while True:
            await asyncio.sleep(self._idle_s / 4)
            async with self._starting:
                process = self._process
                if process is None or process.runs:
                    continue
                if asyncio.get_running_loop().time() - process.idle_since_s >= self._idle_s:
                    await process.stop()
                    # Not before: `close` may interrupt the line above, and then has to stop it.
                    self._process = None


def _error_of(failure: BuildFailed) -> UserError:
    kinds = {"bad_source": InvalidRequest, "over_budget": LimitReached, "cancelled": Cancelled}
    error = kinds.get(failure.code, BuildError)(failure.message)
    error.code = failure.code if failure.code in kinds else BuildError.code
    return error


def _retrieve(future: "asyncio.Future[Counted] | asyncio.Future[str]") -> None:
    """An error that nobody waits for any more is none to warn of."""
    if not future.cancelled():
        future.exception()
