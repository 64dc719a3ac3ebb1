"""How a rank ends: one message for all, and an exit code that says why."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from io import TextIOWrapper
from typing import Any, NoReturn, TextIO, cast

from prelora_ds.errors import (
    INTERRUPTED_EXIT_CODE,
    STOPPED_EXIT_CODE,
    TRY_AGAIN_EXIT_CODE,
    ExpectedError,
    RefusedError,
    Stopped,
    is_disk_fault,
)
from prelora_ds.hosts.discovery import Ranks

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


def ignore_output_errors() -> None:
    """Let a standard stream swallow what it cannot write.

    A run must not end because its reader is gone, its disk is full, or it was never open. The first
    loss of a stream that has a reader is told on the other stream.
    """
    for descriptor in (0, 1, 2):
        _open_if_closed(descriptor)
    out, err = _inner(sys.stdout) or os.fdopen(1, "w"), _inner(sys.stderr) or os.fdopen(2, "w")
    sys.stdout = _ErrorTolerantStream(out, "standard output", err)
    sys.stderr = _ErrorTolerantStream(err, "standard error", out)


def ignore_stderr_errors() -> None:
    """Let standard error alone swallow what it cannot write, without a word: it has no part of a command's result."""
    for descriptor in (0, 1, 2):
        _open_if_closed(descriptor)
    err = _inner(sys.stderr) or os.fdopen(2, "w")
    sys.stderr = _ErrorTolerantStream(err, "", err)


def _inner(stream: TextIO | None) -> TextIO | None:
    return stream._stream if isinstance(stream, _ErrorTolerantStream) else stream


def _open_if_closed(descriptor: int) -> None:
    """Keep a later file from getting the number: what is printed would be written into it."""
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, descriptor)  # also makes it inheritable
        if nowhere != descriptor:
            os.close(nowhere)


class _ErrorTolerantStream:
    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream, self._name, self._other = stream, name, other
        # For a terminal without UTF-8. A descriptor that was a file when Python looked, and is a
        # pipe now, cannot be reconfigured.
        with contextlib.suppress(OSError):
            cast(TextIOWrapper, stream).reconfigure(errors="backslashreplace")  # TextIO does not name it

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
        except OSError as exc:
            self._lose(exc)
            return None

    def _lose(self, error: OSError) -> None:
        """Drop what is buffered. A disk may have room later; a pipe never has a reader again."""
        own, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        kept = None if isinstance(error, BrokenPipeError) else os.dup(own)
        os.dup2(nowhere, own)  # what C code writes to a dead pipe goes there too
        os.close(nowhere)
        self._stream.flush()
        if kept is None:
            return
        os.dup2(kept, own)
        os.close(kept)
        name, self._name = self._name, ""
        if name:
            with contextlib.suppress(OSError):
                print(f"warning: {name} cannot be written ({error.strerror}); its text is lost",
                      file=self._other, flush=True)


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


def crash_code(error: Exception) -> int:
    """The exit code of a rank that ``error`` ends: 75 for a fault of its disk, which may pass, else 1."""
    return TRY_AGAIN_EXIT_CODE if is_disk_fault(error) else 1


def crash(ranks: Ranks, error: Exception, *, ending: bool = False) -> NoReturn:
    """Print ``error`` with rank and host, and end at once with `crash_code`.

    A rank that lost another keeps still for a while.

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
    elif crash_code(error) == TRY_AGAIN_EXIT_CODE:
        said = (f"{here} could not use its disk: {error}\n"
                "  remedy: make room there, or repair it; the same command resumes from the newest "
                "checkpoint")
    else:
        said = f"{here} failed\n{''.join(traceback.format_exception(error))}"
    print(f"error: {said}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(crash_code(error))
