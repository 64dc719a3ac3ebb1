"""What a user can get wrong, told in a way that can be acted on."""

from __future__ import annotations

USAGE_EXIT_CODE = 2
TRY_AGAIN_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h


class ExpectedError(Exception):
    """An error whose text is the whole message: no traceback. ``exit_code`` is what the process ends with."""

    exit_code = 1


class ConfigError(ExpectedError, ValueError):
    """A setting, file or environment that the user can mend.

    The text names the key, the value and the remedy.
    """

    exit_code = USAGE_EXIT_CODE

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        super().__init__(f"{key} = {value!r}: {problem}\n  remedy: {remedy}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        return type(self), (self.key, self.value, self.problem, self.remedy)


class TrainingDivergedError(ExpectedError, RuntimeError):
    """The loss or the gradient norm became NaN or infinite; names step and phase."""


class LaunchError(ExpectedError, RuntimeError):
    """A host, a network or a port failed the run, not the recipe: another try, or another host, may work."""

    exit_code = TRY_AGAIN_EXIT_CODE
