"""What a user can get wrong, told in a way that can be acted on."""

from __future__ import annotations

import errno
from collections.abc import Sequence

# How a process ends. 75, 87 and 88 are for whoever watches over a job.
DIVERGED_EXIT_CODE = 1
USAGE_EXIT_CODE = 2
TRY_AGAIN_EXIT_CODE = 75  # nothing is lost, and the same command may succeed
HANG_EXIT_CODE = 85
ORPHAN_EXIT_CODE = 87
FENCED_EXIT_CODE = 88
STOPPED_EXIT_CODE = 99  # as asked, with a checkpoint; the same command goes on
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it
READER_GONE_EXIT_CODE = 141  # 128 + SIGPIPE: nobody reads the standard output any more
# What is in the RuntimeErrors by which torch.save of torch 2.14 tells of a disk that is full.
TORCH_COULD_NOT_WRITE = ("PytorchStreamWriter", "inline_container.cc", "iostream error")
# An OSError of these numbers is of the disk or its server, and the same command may succeed later.
DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EREMOTEIO, errno.ESTALE,
                         errno.ETIMEDOUT})


class ExpectedError(Exception):
    """An error whose text is the whole message: no traceback. ``exit_code`` is what the process ends with.

    ``of_one_rank``: other ranks do not meet it, so the one that does has to say it; where others
    may (``others_may_meet_it``), it lets rank 0 speak first. ``blames``: the ranks that failed,
    where the one that tells did not.
    """

    exit_code = DIVERGED_EXIT_CODE
    of_one_rank = False
    others_may_meet_it = False
    blames: Sequence[int] = ()


LONGEST_VALUE = 400  # characters of a value in a message


class ConfigError(ExpectedError, ValueError):
    """A setting, file or environment that the user can mend.

    The text names the key, the value and the remedy.
    """

    exit_code = USAGE_EXIT_CODE

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        shown = repr(value)
        if len(shown) > LONGEST_VALUE:
            shown = f"{shown[:LONGEST_VALUE // 2]} ... {shown[-LONGEST_VALUE // 4:]}"
        super().__init__(f"{key} = {shown}: {problem}\n  remedy: {remedy}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        return type(self), (self.key, self.value, self.problem, self.remedy)


class DiskError(ConfigError):
    """A disk or file system that failed, or a file that changed under a run.

    The same command may succeed later, or on another host.
    """

    exit_code = TRY_AGAIN_EXIT_CODE
    of_one_rank = True
    others_may_meet_it = True


def is_disk_fault(error: Exception) -> bool:
    """Whether a disk or its server failed, so that another try may pass."""
    if isinstance(error, OSError):
        return error.errno in DISK_FAULTS
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORCH_COULD_NOT_WRITE)


def file_error(key: str, path: object, error: OSError, act: str, remedy: str) -> ConfigError:
    """What to raise for ``error`` at a path that the user chose by ``key``.

    act: what could not be done, as in "cannot be written". remedy: for an error of the path itself;
    one of the disk is a DiskError and has its own.
    """
    problem = f"{act} ({error.strerror or error})"
    if is_disk_fault(error):
        return DiskError(key, str(path), problem,
                         "make room there, or repair the disk; then give the same command again")
    return ConfigError(key, str(path), problem, remedy)


def cannot_write(key: str, path: object, error: OSError) -> ConfigError:
    """`file_error` of a place that could not be written."""
    return file_error(key, path, error, "cannot be written", "choose a place that you may write to")


class TrainingDivergedError(ExpectedError, RuntimeError):
    """The loss or the gradient norm became NaN or infinite; names step and phase."""


class Stopped(Exception):
    """The run ended as it was asked to, with a checkpoint."""


class NotSavedError(ExpectedError, RuntimeError):
    """A checkpoint or a model could not be written; those before are there, and the same command may succeed."""

    exit_code = TRY_AGAIN_EXIT_CODE


class RefusedError(ExpectedError, RuntimeError):
    """Another rank could not begin and says why; this one ends with it, and with its exit code."""

    def __init__(self, rank: int, host: str, exit_code: int, text: str) -> None:
        super().__init__(f"rank {rank} on host {host} could not begin: {text}")
        self.exit_code, self.blames = exit_code, (rank,)


class LaunchError(ExpectedError, RuntimeError):
    """A host, a network or a port failed the run, not the recipe: another try, or another host, may work."""

    exit_code = TRY_AGAIN_EXIT_CODE

    def __init__(self, text: str, blames: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.blames = tuple(blames)
