"""How a rank ends: one message for all, and an exit code that says why."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from prelora_ds.core.errors import (
    INTERRUPTED_EXIT_CODE,
    STOPPED_EXIT_CODE,
    ExpectedError,
    RefusedError,
    Stopped,
)
from prelora_ds.launching.ranks import Ranks

# Long enough for rank 0 to speak and for the launcher to end the others; every rank finds the same mistake.
GRACE_S = 20.0
# Long enough for the launcher to end a rank whose peer has ended.
ECHO_GRACE_S = 5.0
# What a collective says in a rank that lost another one.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def interrupted(ranks: Ranks) -> NoReturn:
    """End after Ctrl-C, which reaches every rank."""
    if ranks.rank == 0:
        print("interrupted", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED_EXIT_CODE)


def stopped(why: Stopped, ranks: Ranks) -> NoReturn:
    """End after a checkpoint; every rank comes here."""
    if ranks.rank == 0:
        print(why, flush=True)
    sys.exit(STOPPED_EXIT_CODE)


def outlive_streams() -> None:
    """Let standard output and error drop what cannot be written.

    No checkpoint may be lost to a line of text.

    A stream cannot be written when its reader is gone (a launcher that is ended closes the pipe
    before its ranks have saved), when its disk is full, or when its terminal is closed.

    A stream that is closed from the start is opened on /dev/null, before a file of the run can get
    its descriptor.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # Python found it closed
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, f"__{name}__", stream)
        setattr(sys, name, _Outliving(stream))


class _Outliving:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text)) or 0

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], int | None]) -> int | None:
        try:
            return act()
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is still buffered, and what C code writes, goes there too
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError) and sys.stderr is not self:
                print(f"warning: {self._stream.name} cannot be written ({error.strerror}): what the "
                      "run prints there is lost from here on", file=sys.stderr, flush=True)
            return None


@contextmanager
def one_message() -> Iterator[None]:
    """For a command of one process: an ExpectedError is a line and its exit code, not a traceback."""
    try:
        yield
    except ExpectedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def fail(error: ExpectedError, ranks: Ranks) -> NoReturn:
    """Say ``error`` once and end with its exit code.

    The launcher ends all ranks at the first one that exits, so the others keep still and let rank 0
    speak. A host that is still there after the grace had a mistake of its own, and its first rank
    says it.

    What only one rank has met it says at once. A rank that heard of it from another one ends at
    once, and only rank 0 repeats it.
    """
    heard = isinstance(error, RefusedError)
    if ranks.rank != 0 and not error.of_one_rank and not heard:
        _wait_for_the_launcher(GRACE_S)
    elif ranks.rank != 0 and error.others_may_meet_it:
        _wait_for_the_launcher(ECHO_GRACE_S)
    if ranks.rank == 0 or (ranks.local_rank == 0 and not heard) or error.of_one_rank:
        where = "" if ranks.rank == 0 else f" (rank {ranks.rank} on {socket.gethostname()})"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _wait_for_the_launcher(seconds: float) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no wish to stop after a step any more
    time.sleep(seconds)


def crash(ranks: Ranks, error: Exception, *, ending: bool = False) -> NoReturn:
    """Print ``error`` with rank and host, and end at once with 1; a rank that lost another keeps still for a while.

    The rank that began it says what it was. The others only felt it, and the launcher ends them; where it does not, a
    line of theirs is all that is left of a host that went down. ending: whether the launcher has sent its signal
    already; then they say nothing. An ordinary exit would run MPI's finalizer and gloo's
    threads to their end, which wait for the other ranks: under mpirun one exception would hang the job.
    """
    here = f"rank {ranks.rank} on {socket.gethostname()}"
    # Gloo and NCCL raise RuntimeErrors; an OSError of the same words is of a pipe or socket of this rank's own.
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER):
        if ending:
            os._exit(1)
        _wait_for_the_launcher(ECHO_GRACE_S)
        said = (f"{here} lost the connection to another rank ({str(error).splitlines()[0]})\n"
                "  remedy: look for the first error of another rank, or for a host that went down")
    else:
        said = f"{here} failed\n{''.join(traceback.format_exception(error))}"
    print(f"error: {said}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
