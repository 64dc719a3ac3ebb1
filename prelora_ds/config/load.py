"""Load a validated Config from a recipe (YAML), overrides ``a.b=c`` and a DeepSpeed JSON.

This is the only module that reads configuration files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prelora_ds.config.changes import renamed, with_new_names
from prelora_ds.config.deepspeed_section import check_alignment, check_deepspeed, without_auto
from prelora_ds.config.documents import UnreadableError, check_plain, read_json, read_yaml, write_yaml
from prelora_ds.config.fields import FieldError, annotation_at, keys_of
from prelora_ds.config.overrides import interpolate, is_text, override, without_interpolation
from prelora_ds.config.tree import Config
from prelora_ds.errors import ConfigError

_NOTHING = object()


def load_config(recipe: str | Path, overrides: Sequence[str] = (),
                deepspeed_config: str | Path | None = None, *, recipe_key: str = "--recipe") -> Config:
    """The validated config of a run.

    recipe_key: the name by which the user gave ``recipe``, for messages.

    Raises ConfigError, with key, value and remedy, for a missing or unreadable file, an unknown key,
    an invalid value, or a DeepSpeed JSON that sets a key of the recipe.
    """
    values = read_settings(recipe, overrides, deepspeed_config, recipe_key=recipe_key)
    return validate(values, str(recipe), overrides)


def read_settings(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (),
                  deepspeed_config: str | Path | None = None, *,
                  recipe_key: str = "--recipe") -> dict[str, Any]:
    """The values that `load_config` validates, from a file or from the values of one. Raises ConfigError."""
    given_as_values = isinstance(recipe, Mapping)
    tree = renamed(recipe if isinstance(recipe, Mapping) else _read_recipe(Path(recipe), recipe_key))
    if deepspeed_config is not None:
        given = read_deepspeed_json(Path(deepspeed_config))
        name = "the recipe" if given_as_values else str(recipe)
        _refuse_another(tree.get("deepspeed"), name, given, str(deepspeed_config))
        tree["deepspeed"] = given  # the overrides below have precedence
    for text in overrides:
        override(tree, text)
    try:
        values = interpolate(tree)
        check_plain(values)
    except UnreadableError as exc:
        raise ConfigError("recipe and overrides", " ".join([str(recipe), *overrides]), str(exc),
                          "fix the override or the ${...} reference in the recipe") from exc
    return values


def validate(values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Make a Config from a plain mapping.

    Keys of an older version are read under their new names. Raises ConfigError for the first
    invalid key. Its message names where the key is set: one of ``overrides``, otherwise ``source``.
    """
    values = with_new_names(values)
    if isinstance(values.get("deepspeed"), dict):
        values = {**values, "deepspeed": without_auto(values["deepspeed"], "the DeepSpeed config")}
        check_deepspeed(values["deepspeed"], "the DeepSpeed config")
    if "phases" in values:
        values = {**values, "phases": _with_deepspeed_checked(values["phases"])}
    try:
        config = Config.model_validate(values)
    except ValidationError as exc:
        raise _config_error(exc, source, values, overrides) from exc

    # A phase's zero_stage is combined with the offloading of the run's section: check that as well.
    for phase in config.phase_list:
        deepspeed = config.for_phase(phase.name).deepspeed
        where = f"the DeepSpeed config with phases.{phase.name}"
        check_deepspeed(deepspeed, where)
        if phase.zero_stage == "auto":  # which may become 1 or 2
            check_alignment(deepspeed.get("zero_optimization", {}), where)
    return config


def _with_deepspeed_checked(phases: Any) -> Any:
    """``phases`` of a recipe with "auto" removed from each phase's `deepspeed` section. Raises ConfigError."""
    if isinstance(phases, list):
        names = [phase.get("name", i) if isinstance(phase, dict) else i for i, phase in enumerate(phases)]
        return [_phase_with_deepspeed_checked(phase, name)
                for phase, name in zip(phases, names, strict=True)]
    if isinstance(phases, dict):
        return {name: _phase_with_deepspeed_checked(phase, name) for name, phase in phases.items()}
    return phases


def _phase_with_deepspeed_checked(phase: Any, name: Any) -> Any:
    if not isinstance(phase, dict) or not isinstance(phase.get("deepspeed"), dict):
        return phase
    deepspeed = without_auto(phase["deepspeed"], f"phases.{name}.deepspeed")
    check_deepspeed(deepspeed, f"phases.{name}.deepspeed")
    return {**phase, "deepspeed": deepspeed}


def check_world(config: Config, world_size: int) -> None:
    """Raise ConfigError if in any phase the global batch cannot be divided among ``world_size`` ranks."""
    for phase in config.phase_list:
        key = "train.micro_batch_size"
        if phase.micro_batch_size not in (None, "auto"):
            key = f"phases.{phase.name}.micro_batch_size"
        _check_batch(config.for_phase(phase.name), world_size, key)


def _check_batch(config: Config, world_size: int, key: str) -> None:
    try:
        config.grad_accum_steps(world_size)
    except ValueError as exc:
        remedy = "choose a micro-batch size such that global_batch_size = micro_batch_size x ranks x an integer, or " \
                 "another global batch or number of ranks"
        if config.zero.stage == 0:
            remedy += "; at ZeRO stage 0 the integer must be 1, so another ZeRO stage helps as well"
        raise ConfigError(key, config.train.micro_batch_size, str(exc), remedy) from exc


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON file; its keys with the value "auto" are left out.

    Raises ConfigError if the file is missing, is not a JSON object, or contains a refused key.
    """
    try:
        values = read_json(_read_text(path, "--deepspeed_config", "see ds_configs/"))
    except UnreadableError as exc:
        raise ConfigError("--deepspeed_config", str(path), f"is not valid JSON: {exc}",
                          "fix the file") from exc
    if not isinstance(values, dict):
        raise ConfigError("--deepspeed_config", str(path), "must be a JSON object",
                          "see ds_configs/")
    values = without_auto(values, str(path))
    check_deepspeed(values, str(path))
    return values


def _refuse_another(section: Any, recipe: str, given: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError if the recipe's deepspeed ``section`` differs from the one ``given`` by a file.

    None means that the recipe has no such section.
    """
    if section is None:
        return
    if isinstance(section, dict):
        section = without_auto(section, f"{recipe}: deepspeed")
    if section == given:
        return

    key, in_recipe, in_file = _first_difference(section, given)
    raise ConfigError(
        "--deepspeed_config", path,
        f"{recipe} has a deepspeed section of its own, and the two differ: "
        f"{key} is {in_file} in this file and {in_recipe} in the recipe",
        "omit --deepspeed_config, or remove the section deepspeed from the recipe; an override such as "
        "deepspeed.zero_optimization.stage=2 changes a key of either")


def _first_difference(section: Any, given: Any, at: str = "deepspeed") -> tuple[str, str, str]:
    """The first key at which two unequal sections differ, with both values as texts."""
    if not (isinstance(section, dict) and isinstance(given, dict)):
        return at, repr(section), repr(given)
    for key in (*given, *section):
        values = (section.get(key, _NOTHING), given.get(key, _NOTHING))
        if _NOTHING in values:
            shown = ["not set" if value is _NOTHING else repr(value) for value in values]
            return f"{at}.{key}", shown[0], shown[1]
        if values[0] != values[1]:
            return _first_difference(*values, f"{at}.{key}")
    raise AssertionError("they differ")


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to the same Config."""
    return write_yaml(without_interpolation(config.model_dump(mode="json")))


def _read_recipe(path: Path, key: str) -> dict[str, Any]:
    near = difflib.get_close_matches(path.name, _neighbours(path), n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "check the path; launch/recipes/ has examples"
    try:
        tree = read_yaml(_read_text(path, key, hint), is_text)
    except UnreadableError as exc:
        raise ConfigError(key, str(path), f"is not valid YAML: {exc}", "fix the file") from exc
    if not isinstance(tree, dict):
        raise ConfigError(key, str(path), "must be a mapping", "see launch/recipes/")
    return tree


def _neighbours(path: Path) -> list[str]:
    try:
        return [] if path.is_file() else [p.name for p in path.parent.glob("*.yaml")]
    except OSError:
        return []


def _read_text(path: Path, key: str, hint: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        raise ConfigError(key, str(path), "does not exist", hint) from exc
    except OSError as exc:
        raise ConfigError(key, str(path), f"cannot be read ({exc.strerror})",
                          "choose another file") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(key, str(path), f"is not a UTF-8 text: {exc}",
                          "save it as UTF-8") from exc


def _config_error(exc: ValidationError, source: str, values: Mapping[str, Any],
                  overrides: Sequence[str]) -> ConfigError:
    # Report unknown keys before missing ones: a typo in a required key causes both.
    error = min(exc.errors(), key=lambda e: e["type"] != "extra_forbidden")
    unknown = error["type"] == "extra_forbidden"
    place = _place(error["loc"][:-1] if unknown else error["loc"])
    if unknown:
        place = (*place, error["loc"][-1])
    key = _dotted(place, values) or source
    source = _where(key, source, overrides)
    if unknown:
        known = keys_of(Config, place[:-1], error["loc"][-2] if len(error["loc"]) > 1 else None)
        if place[-1] in known:  # of another section that could be here
            return ConfigError(key, error["input"], f"does not go with the other keys here (in {source})",
                               f"remove {key}")
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean {'.'.join(filter(None, (_dotted(place[:-1], values), *near)))}?"
        return ConfigError(key, error["input"], f"unknown key (in {source})",
                           hint if near else f"valid keys: {', '.join(known)}")
    if error["type"] == "missing":
        *section, last = place
        remedy = f"set {key}" if isinstance(last, str) else \
            f"set all entries of {_dotted(section, values)}, for example [0.9, 0.95]"
        return ConfigError(key, None, f"is required (in {source})", remedy)
    if error["type"] == "model_type":
        first = keys_of(Config, place)[0]
        return ConfigError(key, error["input"], f"must be a mapping (in {source})",
                           f"set one of its keys, for example {key}.{first}")
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"] if not isinstance(error["input"], dict) else "..."
    better_remedy: str | None = None
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        key, value = ".".join(filter(None, (_dotted(place, values), cause.field))), cause.value
        better_remedy = cause.remedy
    remedies = {
        "bool_type": "set it to true or false",
        "int_type": "set it to an integer",
        "float_type": "set it to a number",
        "string_type": "set it to a string",
        "literal_error": _nearest(error["input"], error.get("ctx", {}).get("expected", "")),
    }
    problem = f"{message[0].lower()}{message[1:]}".replace("input should be", "must be", 1)
    return ConfigError(key, value, f"{problem} (in {source})",
                       better_remedy or remedies.get(error["type"],
                                                     f"choose a different value for {key}"))


def _nearest(value: Any, expected: str) -> str:
    """The remedy for a ``value`` that is not one of the ``expected`` ones, which pydantic lists in quotes."""
    near = difflib.get_close_matches(str(value), re.findall("'([^']*)'", expected), n=1)
    return f"did you mean {near[0]}?" if near else "choose one of them"


def _where(key: str, source: str, overrides: Sequence[str]) -> str:
    """The override that sets ``key`` or a section around it, otherwise ``source``."""
    for text in reversed(overrides):
        name = text.partition("=")[0]
        if key == name or key.startswith(f"{name}.") or name.startswith(f"{key}."):
            return f"the override of {name}"
    return source


def _place(loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """The place of a pydantic error in a recipe, without the alternatives of unions that pydantic tried."""
    place: tuple[str | int, ...] = ()
    for part in loc:
        tried = isinstance(part, str) and part.startswith("as a ")  # the tags of `prelora_ds.config.phases`
        if not tried and annotation_at(Config, (*place, part)) is not None:
            place = (*place, part)
    return place


def _dotted(place: Sequence[str | int], values: Mapping[str, Any]) -> str:
    """The dotted key of ``place``, in which an entry of `phases` has its name instead of its index."""
    parts = list(place)
    if len(parts) > 1 and parts[0] == "phases" and isinstance(parts[1], int):
        entry = values["phases"][parts[1]]
        parts[1] = entry.get("name", parts[1]) if isinstance(entry, dict) else parts[1]
    return ".".join(map(str, parts))
