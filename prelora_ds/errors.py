"""Errors that a user can act on, and the exit codes of all processes."""

from __future__ import annotations

import errno
from collections.abc import Sequence

# docs/hpc.md explains every exit code. 75, 87 and 88 address whatever supervises a job.
DIVERGED_EXIT_CODE = 1
USAGE_EXIT_CODE = 2
TRY_AGAIN_EXIT_CODE = 75  # nothing is lost, and the same command may succeed
HANG_EXIT_CODE = 85
ORPHAN_EXIT_CODE = 87
FENCED_EXIT_CODE = 88
STOPPED_EXIT_CODE = 99  # stopped on request, with a checkpoint; the same command resumes
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it
READER_GONE_EXIT_CODE = 141  # 128 + SIGPIPE: the reader of the standard output is gone
# One of these is in the RuntimeError that torch.save of torch 2.14 raises when a disk is full.
TORCH_COULD_NOT_WRITE = ("PytorchStreamWriter", "inline_container.cc", "iostream error")
# An OSError with one of these numbers comes from the disk or its server: a retry may succeed.
DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EREMOTEIO,
                         errno.ESTALE, errno.ETIMEDOUT})
LONGEST_VALUE = 400  # characters of a value in a message


class ExpectedError(Exception):
    """An error whose text is the whole message, without a traceback.

    exit_code: the exit code of the process.
    of_one_rank: only this rank meets the error, so this rank has to print it.
    others_may_meet_it: other ranks may meet the same error, so rank 0 gets time to print it first.
    blames: the ranks that failed, if not the one that raises.
    """

    exit_code = DIVERGED_EXIT_CODE
    of_one_rank = False
    others_may_meet_it = False
    blames: Sequence[int] = ()


class ConfigError(ExpectedError, ValueError):
    """A setting, file or environment that the user can fix.

    The text names the key, the value, the problem and the remedy.
    """

    exit_code = USAGE_EXIT_CODE

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        self.key = key
        self.value = value
        self.problem = problem
        self.remedy = remedy
        shown = repr(value)
        if len(shown) > LONGEST_VALUE:
            shown = f"{shown[:LONGEST_VALUE // 2]} ... {shown[-LONGEST_VALUE // 4:]}"
        super().__init__(f"{key} = {shown}: {problem}\n  remedy: {remedy}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        return type(self), (self.key, self.value, self.problem, self.remedy)


class DiskError(ConfigError):
    """A disk or file system failed, or a file changed during a run.

    The same command may succeed later, or on another host.
    """

    exit_code = TRY_AGAIN_EXIT_CODE
    of_one_rank = True
    others_may_meet_it = True


def is_disk_fault(error: Exception) -> bool:
    """Whether a disk or its server failed, so that a retry may succeed."""
    if isinstance(error, OSError):
        return error.errno in DISK_FAULTS
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in TORCH_COULD_NOT_WRITE)


def file_error(key: str, path: object, error: OSError, act: str, remedy: str) -> ConfigError:
    """Return the exception to raise for ``error`` on a path that the user set through ``key``.

    act: what failed, for example "cannot be written".
    remedy: for an error of the path itself. A disk fault becomes a DiskError with its own remedy.
    """
    problem = f"{act} ({error.strerror or error})"
    if is_disk_fault(error):
        return DiskError(key, str(path), problem,
                         "free space there, or repair the disk; then run the same command again")
    return ConfigError(key, str(path), problem, remedy)


def cannot_write(key: str, path: object, error: OSError) -> ConfigError:
    """Return `file_error` for a path that could not be written."""
    return file_error(key, path, error, "cannot be written", "choose a path that you may write to")


class TrainingDivergedError(ExpectedError, RuntimeError):
    """The loss or the gradient norm became NaN or infinite; the text names step and phase."""


class Stopped(Exception):
    """The run stopped on request, with a checkpoint."""


class NotSavedError(ExpectedError, RuntimeError):
    """A checkpoint or a model could not be written.

    Earlier checkpoints are intact, and the same command may succeed.
    """

    exit_code = TRY_AGAIN_EXIT_CODE


class RefusedError(ExpectedError, RuntimeError):
    """Another rank could not start; this rank ends with that rank's message and exit code."""

    def __init__(self, rank: int, host: str, exit_code: int, text: str) -> None:
        super().__init__(f"rank {rank} on host {host} could not start: {text}")
        self.exit_code = exit_code
        self.blames = (rank,)


class LaunchError(ExpectedError, RuntimeError):
    """A host, network or port failed; a retry, possibly on other hosts, may succeed."""

    exit_code = TRY_AGAIN_EXIT_CODE

    def __init__(self, text: str, blames: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.blames = tuple(blames)
