"""What a user can get wrong, told in a way that can be acted on."""

from __future__ import annotations

USAGE_EXIT_CODE = 2


class ExpectedError(Exception):
    """An error whose text is the whole message: no traceback. ``exit_code`` is what the process ends with.

    ``of_one_rank``: other ranks do not meet it, so the one that does has to say it.
    """

    exit_code = 1
    of_one_rank = False


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
