"""How a rank ends: one message for all ranks, and an exit code that states the reason."""

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
    DIVERGED_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    STOPPED_EXIT_CODE,
    TRY_AGAIN_EXIT_CODE,
    ExpectedError,
    RefusedError,
    Stopped,
    is_disk_fault,
)
from prelora_ds.hosts.discovery import Ranks

# Time for rank 0 to print, and for the launcher to end the other ranks. All find the same error.
GRACE_S = 20.0
# Time for the launcher to end a rank whose peer has ended.
ECHO_GRACE_S = 5.0
# Messages of a collective in a rank that lost another one.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
             "remote process exited")


def interrupted(ranks: Ranks) -> NoReturn:
    """Exit after Ctrl-C, which reaches every rank."""
    if ranks.rank == 0:
        print("interrupted", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED_EXIT_CODE)


def stopped(why: Stopped, ranks: Ranks) -> NoReturn:
    """Exit after a requested stop with a checkpoint; every rank calls this function."""
    if ranks.rank == 0:
        print(why, flush=True)
    sys.exit(STOPPED_EXIT_CODE)


def ignore_output_errors() -> None:
    """Discard what a standard stream cannot write.

    A run must not end because the reader of its output is gone, the disk under it is full, or the
    stream was never open. The first loss on a stream with a reader is reported on the other stream.
    """
    for descriptor in (0, 1, 2):
        _open_if_closed(descriptor)
    out = _unwrapped(sys.stdout) or os.fdopen(1, "w")
    err = _unwrapped(sys.stderr) or os.fdopen(2, "w")
    sys.stdout = _ErrorTolerantStream(out, "standard output", err)
    sys.stderr = _ErrorTolerantStream(err, "standard error", out)


def ignore_stderr_errors() -> None:
    """Discard what standard error cannot write, without a report.

    Standard error is not part of a command's result.
    """
    for descriptor in (0, 1, 2):
        _open_if_closed(descriptor)
    err = _unwrapped(sys.stderr) or os.fdopen(2, "w")
    sys.stderr = _ErrorTolerantStream(err, "", err)


def _unwrapped(stream: TextIO | None) -> TextIO | None:
    return stream._stream if isinstance(stream, _ErrorTolerantStream) else stream


def _open_if_closed(descriptor: int) -> None:
    """Keep a later file from getting this number: printed text would be written into it."""
    try:
        os.fstat(descriptor)
    except OSError:
        devnull = os.open(os.devnull, os.O_RDWR)
        os.dup2(devnull, descriptor)  # also makes it inheritable
        if devnull != descriptor:
            os.close(devnull)


class _ErrorTolerantStream:
    """A text stream that drops what cannot be written, and reports the first loss on ``other``.

    name: of the stream in that report; empty for no report.
    """

    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream = stream
        self._name = name
        self._other = other
        # The option is for a terminal without UTF-8. A descriptor that was a file when Python
        # started, and is a pipe now, cannot be reconfigured.
        with contextlib.suppress(OSError):
            text_stream = cast(TextIOWrapper, stream)  # TextIO does not declare reconfigure
            text_stream.reconfigure(errors="backslashreplace")

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
            self._discard_buffer(exc)
            return None

    def _discard_buffer(self, error: OSError) -> None:
        """Drop buffered text. A disk may have room later, but a pipe never gets a reader again."""
        descriptor = self._stream.fileno()
        devnull = os.open(os.devnull, os.O_WRONLY)
        saved = None if isinstance(error, BrokenPipeError) else os.dup(descriptor)
        os.dup2(devnull, descriptor)  # from now on, this also discards what C code writes
        os.close(devnull)
        self._stream.flush()
        if saved is None:
            return
        os.dup2(saved, descriptor)
        os.close(saved)
        name = self._name
        self._name = ""
        if name:
            with contextlib.suppress(OSError):
                print(f"warning: {name} cannot be written ({error.strerror}); its text is lost",
                      file=self._other, flush=True)


def fail(error: ExpectedError, ranks: Ranks) -> NoReturn:
    """Print ``error`` once for all ranks, and exit with its exit code.

    The launcher ends all ranks when the first one exits, so the other ranks wait for rank 0 to
    print. If the ranks of a host are still alive after the grace period, the error is specific to
    that host, and its first rank prints it.

    An error of a single rank is printed at once. Of the ranks that learned of the error from another rank only rank 0
    repeats the message; the others wait a moment, because a launcher may end rank 0 as soon as they exit.
    """
    was_refused = isinstance(error, RefusedError)
    if ranks.rank != 0 and not error.of_one_rank and not was_refused:
        _wait_for_the_launcher(GRACE_S)
    elif ranks.rank != 0 and (was_refused or error.others_may_meet_it):
        _wait_for_the_launcher(ECHO_GRACE_S)
    is_first_of_host = ranks.local_rank == 0 and not was_refused
    if ranks.rank == 0 or is_first_of_host or error.of_one_rank:
        where = "" if ranks.rank == 0 else f" (rank {ranks.rank} on {socket.gethostname()})"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _wait_for_the_launcher(seconds: float) -> None:
    # SIGTERM no longer requests a stop after the current step: it ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def crash_code(error: Exception) -> int:
    """Return the exit code of a rank that ends with ``error``.

    It is 75 for a disk fault, which may be temporary, otherwise 1.
    """
    return TRY_AGAIN_EXIT_CODE if is_disk_fault(error) else DIVERGED_EXIT_CODE


def crash(ranks: Ranks, error: Exception, *, ending: bool = False) -> NoReturn:
    """Print ``error`` with rank and host, and exit at once with `crash_code`.

    The failing rank prints its traceback. Ranks that merely lost a peer wait to be ended by the
    launcher; if that does not happen, their one line is the only trace of a host that went down.

    ending: whether the launcher has already sent its signal; then those ranks print nothing.

    An ordinary exit would run MPI's finalizer and wait for gloo's threads. Both wait for the other
    ranks: under mpirun one exception would block the job.
    """
    here = f"rank {ranks.rank} on {socket.gethostname()}"
    # Gloo and NCCL raise RuntimeErrors. An OSError with the same words comes from a pipe or socket
    # of this rank itself.
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER):
        if ending:
            os._exit(DIVERGED_EXIT_CODE)
        _wait_for_the_launcher(ECHO_GRACE_S)
        reason = str(error).splitlines()[0]
        message = (f"{here} lost the connection to another rank ({reason})\n"
                   "  remedy: look for the first error of another rank, or for a host that went "
                   "down")
    elif crash_code(error) == TRY_AGAIN_EXIT_CODE:
        message = (f"{here} could not use its disk: {error}\n"
                   "  remedy: free space there, or repair it; the same command resumes from the "
                   "newest checkpoint")
    else:
        message = f"{here} failed\n{''.join(traceback.format_exception(error))}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(crash_code(error))
