"""The process that turns texts into index files for a server, so that neither its streams nor any step waits for it.

It is told what to do on standard input and answers on a copy of standard output, one frame a message
(sessile/contract/corpora.py). Some builds run side by side, each on a thread; tokenising and sorting release the
interpreter lock. It ends when standard input does, which is also how it learns that the server is gone.
"""

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import msgspec

from sessile.contract.corpora import (
    Build,
    BuilderReady,
    BuildFailed,
    Built,
    CancelBuild,
    Counted,
    Progress,
    ToBuilder,
    read_frame,
    write_frame,
)
from sessile.corpora.build import Throttle, copy_index, gather, make_index, open_index
from sessile.draft.corpus_file import stored_checksum
from sessile.errors import BuildCancelled, InvalidRequest, LimitReached, TooLong
from sessile.text.tokenizer import Tokenizer

log = logging.getLogger("sessile.corpora")

BUILDS_AT_ONCE = 2
NICENESS = 10
"""A build takes the cores that the engine leaves."""


class Job:
    """A build that has not ended: whether it is still wanted, and whether it may go on after it was counted."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self._cancelled = threading.Event()
        self._answered = threading.Event()

    def proceed(self) -> None:
        self._answered.set()

    def cancel(self) -> None:
        self._cancelled.set()
        self._answered.set()

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def wait_to_proceed(self) -> None:
        """Return when there is room for what was counted. Raises BuildCancelled if there is none."""
        self._answered.wait()
        if self.is_cancelled():
            raise BuildCancelled("the corpus was removed, or there was no room for it")


class Builder:
    """Runs builds until its input ends. Owns the threads; the pipes are its caller's."""

    def __init__(self, tokenizer: Tokenizer, receive: BinaryIO, send: BinaryIO) -> None:
        self._tokenizer = tokenizer
        self._fingerprint = tokenizer.fingerprint()
        self._receive = receive
        self._send = send
        self._sending = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._threads = len(os.sched_getaffinity(0))

    def run(self) -> None:
        """Take messages until there are no more; what is being built then is given up."""
        self._tell(BuilderReady(self._fingerprint))
        with ThreadPoolExecutor(BUILDS_AT_ONCE, "build") as pool:
            while (message := read_frame(self._receive, ToBuilder)) is not None:
                if isinstance(message, Build):
                    job = self._jobs[message.build] = Job(message)
                    pool.submit(self._run_job, job)
                elif (known := self._jobs.get(message.build)) is not None:
                    known.cancel() if isinstance(message, CancelBuild) else known.proceed()
            for job in list(self._jobs.values()):
                job.cancel()

    def _run_job(self, job: Job) -> None:
        """Build, and say in any case how it ended."""
        build = job.build.build
        try:
            self._build(job)
        except BuildCancelled as error:
            self._tell(BuildFailed(build=build, code="cancelled", message=str(error)))
        except (InvalidRequest, TooLong) as error:
            self._tell(BuildFailed(build=build, code="bad_source", message=error.message))
        except LimitReached as error:
            self._tell(BuildFailed(build=build, code="over_budget", message=error.message))
        except Exception as error:
            log.exception("a corpus could not be built")
            reason = f"the index could not be built: {type(error).__name__}: {error}"
            self._tell(BuildFailed(build=build, code="failed", message=reason))
        else:
            self._tell(Built(build, stored_checksum(Path(job.build.target)).hex()))
        finally:
            del self._jobs[build]

    def _build(self, job: Job) -> None:
        build, label = job.build.build, bytes.fromhex(self._fingerprint)
        target = Path(job.build.target)
        report = Throttle(lambda stage, share: self._tell(Progress(build, stage, share)))
        if job.is_cancelled():
            raise BuildCancelled("the corpus was removed before its text was read")
        if job.build.sources[0].kind == "index":
            index = open_index(job.build.sources[0], label)
            self._tell(Counted(build, index.tokens, index.documents, index.resident_bytes))
            job.wait_to_proceed()
            copy_index(job.build.sources[0], target)
            return
        gathered = gather(
            self._tokenizer,
            job.build.sources,
            tokens_max=job.build.tokens_max,
            is_cancelled=job.is_cancelled,
            report=report,
        )
        self._tell(Counted(build, gathered.tokens, len(gathered.documents), gathered.index_bytes))
        job.wait_to_proceed()
        make_index(gathered, target, label, threads=self._threads, is_cancelled=job.is_cancelled, report=report)

    def _tell(self, message: msgspec.Struct) -> None:
        with self._sending:
            write_frame(self._send, message)


def run_builder(tokenizer: Tokenizer) -> int:
    """Be the builder of the server that holds our standard input and output; the exit status."""
    os.nice(NICENESS)
    # Whatever a library prints must not end up between two frames.
    with os.fdopen(os.dup(1), "wb", buffering=0) as send:
        os.dup2(2, 1)
        Builder(tokenizer, sys.stdin.buffer, send).run()
    return 0
