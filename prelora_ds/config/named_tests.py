"""Tests that end a phase, and rules for ranks, made from options of the command line instead of a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from prelora_ds.config.documents import UnreadableError, read_scalar, read_yaml
from prelora_ds.config.fields import FieldError
from prelora_ds.config.rank_rules import AnyRankRule
from prelora_ds.config.until import AnySwitchTest
from prelora_ds.core.rank_rules import RankRule
from prelora_ds.core.switch_tests import SWITCH_TESTS
from prelora_ds.core.switch_tests.protocol import SwitchTest
from prelora_ds.errors import ConfigError

_TESTS: TypeAdapter[Any] = TypeAdapter(AnySwitchTest)
_RULES: TypeAdapter[Any] = TypeAdapter(AnyRankRule)
_EXAMPLE = "write for example '{rule: energy, share: 0.9}'"


def parse_parameters(texts: Sequence[str], given: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Parse the options ``--set KEY=VALUE,...`` into the values of each parameter, in addition to those ``given``.

    Raises ConfigError.
    """
    parameters = dict(given)
    for text in texts:
        key, _, values = text.partition("=")
        if key in parameters:
            raise ConfigError("--set", text, f"gives {key} a second time", "give all values of a parameter at once")
        try:
            parameters[key] = tuple(map(read_scalar, values.split(",")))
        except UnreadableError as exc:
            raise ConfigError("--set", text, str(exc), "write for example --set alpha=0.01,0.05") from exc
        if not key or None in parameters[key]:
            raise ConfigError("--set", text, "is not of the form KEY=VALUE,...", "write for example alpha=0.01,0.05")
    return parameters


def make_test(name: str, parameters: Mapping[str, Any]) -> SwitchTest:
    """The test ``name`` with its ``parameters``. Raises ConfigError about the option `--test` or a parameter."""
    try:
        made: SwitchTest = _TESTS.validate_python({"test": name, **parameters}).switch_test()
    except ValidationError as exc:
        raise _config_error(exc, name, parameters) from exc
    return made


def changed_test(test: SwitchTest, parameters: Mapping[str, Any]) -> SwitchTest:
    """``test`` with those of the ``parameters`` that it has. Raises ConfigError about a parameter."""
    own = parameters_of(test)
    changes = {key: value for key, value in parameters.items() if key in own}
    return make_test(name_of(test), own | changes) if changes else test


def parameters_of(test: SwitchTest) -> dict[str, Any]:
    """The parameters of a single test, with their values."""
    return asdict(test)  # type: ignore[call-overload,no-any-return]  # every test is a dataclass


def name_of(test: SwitchTest) -> str:
    """The name of a single test in a recipe."""
    return next(name for name, made in SWITCH_TESTS.items() if made is type(test))


def parse_rank_rule(text: str | None) -> RankRule | None:
    """Parse the option ``--ranks``, a mapping as in `phases.*.adapters.ranks`; None stays None. Raises ConfigError."""
    if text is None:
        return None
    try:
        made: RankRule = _RULES.validate_python(read_yaml(text)).rank_rule()
    except UnreadableError as exc:
        raise ConfigError("--ranks", text, str(exc), _EXAMPLE) from exc
    except ValidationError as exc:
        error = min(exc.errors(), key=lambda each: each["type"] != "extra_forbidden")
        cause = error.get("ctx", {}).get("error")
        key = cause.field if isinstance(cause, FieldError) else str(error["loc"][-1])
        raise ConfigError(f"--ranks {key}".rstrip(), getattr(cause, "value", error["input"]), _message(error),
                          getattr(cause, "remedy", None) or _EXAMPLE) from exc
    return made


def _config_error(exc: ValidationError, name: str, parameters: Mapping[str, Any]) -> ConfigError:
    error = min(exc.errors(), key=lambda each: each["type"] != "extra_forbidden")
    cause = error.get("ctx", {}).get("error")
    key = cause.field if isinstance(cause, FieldError) else str(error["loc"][-1])
    if key == "test":
        return ConfigError("--test", name, _message(error), getattr(cause, "remedy", None) or "choose one of them")
    if error["type"] == "missing":
        return ConfigError(f"--set {key}", None, f"is required by the test {name}", f"pass it as --set {key}=VALUE")
    if error["type"] == "extra_forbidden":
        known = [field for field in _keys_of(name) if field != "test"]
        near = difflib.get_close_matches(key, known, n=1)
        return ConfigError(f"--set {key}", error["input"], f"is not a parameter of the test {name}, which has "
                           f"{', '.join(known)}", f"did you mean {near[0]}?" if near else "choose one of them")
    return ConfigError(f"--set {key}", parameters.get(key), _message(error), "choose a different value")


def _message(error: Mapping[str, Any]) -> str:
    """The message of one of pydantic's errors, in our words."""
    message: str = error["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}".replace("input should be", "must be", 1)


def _keys_of(name: str) -> list[str]:
    """The keys of the test ``name`` in a recipe."""
    schema = _TESTS.json_schema()["$defs"]
    return next(list(each["properties"]) for each in schema.values() if each["properties"]["test"]["const"] == name)
