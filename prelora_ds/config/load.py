"""Recipe YAML + ``a.b=c`` overrides + DeepSpeed JSON -> a validated Config. The only reader of files for it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prelora_ds.config.changes import renamed, with_new_names
from prelora_ds.config.documents import UnreadableError, check_plain, read_json, read_yaml, write_yaml
from prelora_ds.config.fields import FieldError, annotation_at, keys_of
from prelora_ds.config.overrides import interpolate, is_text, override, without_interpolation
from prelora_ds.config.tree import Config
from prelora_ds.errors import ConfigError

_NOTHING = object()
# Keys of a DeepSpeed JSON that have another owner, and that owner.
OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size / (train.micro_batch_size x ranks)",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup and optimizer.min_lr_ratio",
    "fp16": "nothing: the engine trains in BF16",
    "data_types": "nothing: gradients are accumulated in fp32",
    "communication_data_type": "nothing: gradients are reduced in fp32",
    "prescale_gradients": "nothing: gradients are reduced in fp32",
    "gradient_predivide_factor": "nothing: gradients are reduced in fp32",
    "zero_allow_untested_optimizer": "nothing: the optimizer is an AdamW with a step for each parameter",
    "tensorboard": "run.output_dir",
}
# What else a JSON may hold. DeepSpeed itself says nothing of a misspelt key here.
KNOWN_KEYS = ("zero_optimization", "bf16", "zero_force_ds_cpu_optimizer", "comms_logger", "wall_clock_breakdown",
              "memory_breakdown")
SWITCHES = ("zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "memory_breakdown")  # true or false
BF16_KEYS = ("enabled", "immediate_grad_update", "check_grad_overflow")  # true or false
COMMS_LOGGER_KEYS = ("enabled", "verbose", "prof_all", "debug", "prof_ops")  # true or false, and a list
# Keys of zero_optimization that were tried at another value than DeepSpeed's default: tests/ranks/test_zero_keys.py
# trains with each of them and gets the losses of the default. Any other key is refused.
ZERO_KEYS = (
    "stage", "offload_optimizer", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "overlap_comm",
    "load_from_fp32_weights", "sub_group_size", "round_robin_gradients", "parameter_alignment",
    "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings",
    "enable_sanity_checks", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential")
OFFLOAD_KEYS = ("device", "pin_memory", "buffer_count", "cpuadam_cores_perc")
# Keys of zero_optimization that are refused, the value that leaves each off (accepted), and why.
_ACROSS_A_SWITCH = "is not carried over a switch"
_DEPRECATED = "is deprecated in DeepSpeed"
REFUSED_ZERO_KEYS: dict[str, tuple[Any, str]] = {
    "offload_param": (None, _ACROSS_A_SWITCH), "zenflow": (None, _ACROSS_A_SWITCH),
    "zero_hpz_partition_size": (1, _ACROSS_A_SWITCH), "mics_shard_size": (-1, _ACROSS_A_SWITCH),
    "zero_quantized_weights": (False, _ACROSS_A_SWITCH), "zero_quantized_gradients": (False, _ACROSS_A_SWITCH),
    "zero_quantized_nontrainable_weights": (False, _ACROSS_A_SWITCH),
    "compute_grad_norm": (True, "would leave divergence unseen, which is told by the gradient norm"),
    "ignore_unused_parameters": (True, "would stop a step in which an adapter has no gradient"),
    "leaf_module": (None, "is set by model.compile"),
    "stage3_module_granularity_threshold": (0, "does not know the parameters of a model that is built in parts"),
    "save_muon_momentum_buffer_in_memory": (False, "has no effect: the optimizer is AdamW"),
    "legacy_stage1": (False, _DEPRECATED), "elastic_checkpoint": (False, _DEPRECATED),
    "cpu_offload": (False, _DEPRECATED), "cpu_offload_param": (False, _DEPRECATED),
    "cpu_offload_use_pin_memory": (False, _DEPRECATED),
    "stage3_gather_fp16_weights_on_model_save": (False, _DEPRECATED),
}


def load_config(recipe: str | Path, overrides: Sequence[str] = (),
                deepspeed_config: str | Path | None = None) -> Config:
    """The validated config of a run.

    Raises ConfigError with key, value and remedy: a missing or unreadable file, an unknown key, a bad value, or a
    DeepSpeed JSON that sets what the recipe owns.
    """
    return validate(read_settings(recipe, overrides, deepspeed_config), str(recipe))


def read_settings(recipe: str | Path, overrides: Sequence[str] = (),
                  deepspeed_config: str | Path | None = None) -> dict[str, Any]:
    """What `load_config` validates. Raises ConfigError."""
    tree = renamed(_read_recipe(Path(recipe)))
    if deepspeed_config is not None:
        given = read_deepspeed_json(Path(deepspeed_config))
        _refuse_another(tree.get("deepspeed"), str(recipe), given, str(deepspeed_config))
        tree["deepspeed"] = given  # the overrides have the last word
    for text in overrides:
        override(tree, text)
    try:
        values = interpolate(tree)
        check_plain(values)
    except UnreadableError as exc:
        raise ConfigError("recipe and overrides", " ".join([str(recipe), *overrides]), str(exc),
                          "correct the override or the ${...} of the recipe") from exc
    return values


def validate(values: Mapping[str, Any], source: str) -> Config:
    """A Config of a plain mapping.

    Keys of an older version are read under their new names. Raises ConfigError that names the first
    offending key of ``source``.
    """
    values = with_new_names(values)
    if isinstance(values.get("deepspeed"), dict):
        values = {**values, "deepspeed": _without_auto(values["deepspeed"], "the DeepSpeed config")}
        check_deepspeed(values["deepspeed"], "the DeepSpeed config")
    if "phases" in values:
        values = {**values, "phases": _with_deepspeed_checked(values["phases"])}
    try:
        config = Config.model_validate(values)
    except ValidationError as exc:
        raise _config_error(exc, source, values) from exc
    for phase in config.phase_list:  # a zero_stage of its own goes with the offloading of the run's section
        own, where = config.for_phase(phase.name).deepspeed, f"the DeepSpeed config with phases.{phase.name}"
        check_deepspeed(own, where)
        if phase.zero_stage == "auto":  # may become 1 or 2
            _check_alignment(own.get("zero_optimization", {}), where)
    return config


def _with_deepspeed_checked(phases: Any) -> Any:
    """``phases`` of a recipe, each `deepspeed` section of its own without "auto". Raises ConfigError."""
    if isinstance(phases, list):
        names = [own.get("name", i) if isinstance(own, dict) else i for i, own in enumerate(phases)]
        return [_phase_with_deepspeed_checked(own, name) for own, name in zip(phases, names, strict=True)]
    if isinstance(phases, dict):
        return {name: _phase_with_deepspeed_checked(own, name) for name, own in phases.items()}
    return phases


def _phase_with_deepspeed_checked(phase: Any, name: Any) -> Any:
    if not isinstance(phase, dict) or not isinstance(phase.get("deepspeed"), dict):
        return phase
    own = _without_auto(phase["deepspeed"], f"phases.{name}.deepspeed")
    check_deepspeed(own, f"phases.{name}.deepspeed")
    return {**phase, "deepspeed": own}


def check_world(config: Config, world_size: int) -> None:
    """Raise ConfigError when the batch does not divide over ``world_size`` ranks, in any phase."""
    for phase in config.phase_list:
        own = phase.micro_batch_size not in (None, "auto")
        key = f"phases.{phase.name}.micro_batch_size" if own else "train.micro_batch_size"
        _check_batch(config.for_phase(phase.name), world_size, key)


def _check_batch(config: Config, world_size: int, key: str) -> None:
    try:
        config.grad_accum_steps(world_size)
    except ValueError as exc:
        raise ConfigError(key, config.train.micro_batch_size, str(exc),
                          "choose a micro-batch so that global_batch_size = micro_batch_size x ranks x a whole number "
                          "(1 at ZeRO stage 0), or another ZeRO stage") from exc


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """A checked DeepSpeed JSON, "auto" left out.

    Raises ConfigError when it is missing, is not an object, or is refused.
    """
    try:
        values = read_json(_read_text(path, "--deepspeed_config", "see ds_configs/"))
    except UnreadableError as exc:
        raise ConfigError("--deepspeed_config", str(path), f"is not JSON: {exc}",
                          "correct the file") from exc
    if not isinstance(values, dict):
        raise ConfigError("--deepspeed_config", str(path), "is not a JSON object",
                          "see ds_configs/")
    values = _without_auto(values, str(path))
    check_deepspeed(values, str(path))
    return values


def _refuse_another(own: Any, recipe: str, given: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError where a recipe has a section of its own that is not the one ``given`` by a file.

    None counts as no section.
    """
    if own is None:
        return
    if isinstance(own, dict):
        own = _without_auto(own, f"{recipe}: deepspeed")
    if own == given:
        return
    key, mine, theirs = _first_difference(own, given)
    raise ConfigError(
        "--deepspeed_config", path, f"{recipe} has a deepspeed section of its own, and the two differ: "
        f"{key} is {theirs} in this file and {mine} in the recipe",
        "leave --deepspeed_config out, or remove the section deepspeed from the recipe; an override such as "
        "deepspeed.zero_optimization.stage=2 changes a key of either")


def _first_difference(own: Any, given: Any, at: str = "deepspeed") -> tuple[str, str, str]:
    if not (isinstance(own, dict) and isinstance(given, dict)):
        return at, repr(own), repr(given)
    for key in (*given, *own):
        mine, theirs = own.get(key, _NOTHING), given.get(key, _NOTHING)
        if mine is _NOTHING or theirs is _NOTHING:
            shown = ["not there" if value is _NOTHING else repr(value) for value in (mine, theirs)]
            return f"{at}.{key}", shown[0], shown[1]
        if mine != theirs:
            return _first_difference(mine, theirs, f"{at}.{key}")
    raise AssertionError("they differ")


def check_deepspeed(values: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError when a DeepSpeed config without "auto" sets what the recipe owns or is not supported."""
    for key, owner in OWNED_BY_RECIPE.items():
        if key in values:
            raise ConfigError(f"{source}: {key}", values[key], f"this key is owned by the recipe ({owner})",
                              f'remove "{key}" from {source} and set it in the recipe')
    _only(values, (*OWNED_BY_RECIPE, *KNOWN_KEYS), f"{source}: ")
    zero, bf16, comms = (_section(values, key, f"{source}: ") for key in ("zero_optimization", "bf16", "comms_logger"))
    _only(bf16, BF16_KEYS, f"{source}: bf16.")
    _only(comms, COMMS_LOGGER_KEYS, f"{source}: comms_logger.")
    _switches(values, SWITCHES, f"{source}: ")
    _switches(bf16, BF16_KEYS, f"{source}: bf16.")
    _switches(comms, COMMS_LOGGER_KEYS[:-1], f"{source}: comms_logger.")
    operations = comms.get("prof_ops", [])
    if not isinstance(operations, list) or not all(isinstance(name, str) for name in operations):
        raise ConfigError(f"{source}: comms_logger.prof_ops", operations, "is not a list of names",
                          'write for example ["all_reduce"]')
    if bf16.get("enabled") is False:
        raise ConfigError(f"{source}: bf16.enabled", False, "training runs in BF16", "set it to true")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{source}: zero_optimization.stage", stage, "is not a ZeRO stage", "choose 0, 1, 2 or 3")
    for key in ("reduce_bucket_size", "stage3_param_persistence_threshold"):
        if isinstance(zero.get(key), bool) or not isinstance(zero.get(key, 0), int | float):
            raise ConfigError(f"{source}: zero_optimization.{key}", zero[key], "is not a number",
                              "write it as a number")
    if stage in (1, 2):
        _check_alignment(zero, source)
    for key, (off, why) in REFUSED_ZERO_KEYS.items():
        if zero.get(key, off) not in (None, off, {"device": "none"}):
            raise ConfigError(f"{source}: zero_optimization.{key}", zero[key], why, "remove it")
    _only(zero, (*ZERO_KEYS, *REFUSED_ZERO_KEYS), f"{source}: zero_optimization.")
    offload = {} if zero.get("offload_optimizer") is None else \
        _section(zero, "offload_optimizer", f"{source}: zero_optimization.")
    _only(offload, OFFLOAD_KEYS, f"{source}: zero_optimization.offload_optimizer.")
    target = offload.get("device", "none")
    if target not in ("none", "cpu") or (target == "cpu" and stage not in (2, 3)):
        raise ConfigError(f"{source}: zero_optimization.offload_optimizer.device", target,
                          f"is not supported at stage {stage}", 'offload to "cpu" at stage 2 or 3')


def _check_alignment(zero: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for what DeepSpeed's optimizer of stages 1 and 2 asserts, after the process group is made."""
    size = zero.get("allgather_bucket_size", 0)
    if isinstance(size, int | float) and size % 2:
        raise ConfigError(f"{source}: zero_optimization.allgather_bucket_size", size,
                          "is odd, and stages 1 and 2 want pairs of BF16 elements",
                          f"write {int(size) + 1}, for example")


def _only(values: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{prefix}{key}", values[key], "unknown key",
                              f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")


def _section(values: Mapping[str, Any], key: str, prefix: str) -> Mapping[str, Any]:
    section = values.get(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{prefix}{key}", section, "is not a mapping of keys", "see ds_configs/")
    return section


def _switches(values: Mapping[str, Any], keys: Sequence[str], prefix: str) -> None:
    for key in keys:
        if not isinstance(values.get(key, True), bool):
            raise ConfigError(f"{prefix}{key}", values[key], "is not a switch", "write true or false")


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to the same Config."""
    return write_yaml(without_interpolation(config.model_dump(mode="json")))


def _read_recipe(path: Path) -> dict[str, Any]:
    near = difflib.get_close_matches(path.name, _neighbours(path), n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "see launch/recipes/"
    try:
        tree = read_yaml(_read_text(path, "--recipe", hint), is_text)
    except UnreadableError as exc:
        raise ConfigError("--recipe", str(path), f"is not YAML: {exc}", "correct the file") from exc
    if not isinstance(tree, dict):
        raise ConfigError("--recipe", str(path), "is not a mapping of keys", "see launch/recipes/")
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
        raise ConfigError(key, str(path), "there is no such file", hint) from exc
    except OSError as exc:
        raise ConfigError(key, str(path), f"cannot be read ({exc.strerror})",
                          "name another file") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(key, str(path), f"is not a text in UTF-8: {exc}",
                          "save it as UTF-8") from exc


def _config_error(exc: ValidationError, source: str, values: Mapping[str, Any]) -> ConfigError:
    # A misspelt key that is required is missing as well; the unknown key says more.
    error = min(exc.errors(), key=lambda e: e["type"] != "extra_forbidden")
    unknown = error["type"] == "extra_forbidden"
    place = _place(error["loc"][:-1] if unknown else error["loc"])
    if unknown:
        place = (*place, error["loc"][-1])
    key = _dotted(place, values) or source
    if unknown:
        known = keys_of(Config, place[:-1])
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        return ConfigError(key, error["input"], f"unknown key (in {source})",
                           f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")
    if error["type"] == "missing":
        *section, last = place
        remedy = f"set {key}" if isinstance(last, str) else \
            f"give {_dotted(section, values)} as a whole, for example [0.9, 0.95]"
        return ConfigError(key, None, f"is required (in {source})", remedy)
    if error["type"] == "model_type":
        first = keys_of(Config, place)[0]
        return ConfigError(key, error["input"], f"is not a mapping of keys (in {source})",
                           f"set single keys of it, for example {key}.{first}")
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"] if not isinstance(error["input"], dict) else "..."
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        key, value = ".".join(filter(None, (_dotted(place, values), cause.field))), cause.value
    wanted = {"bool_type": "write true or false", "int_type": "write a whole number",
              "float_type": "write a number", "string_type": "write a text"}
    return ConfigError(key, value, f"{message[0].lower()}{message[1:]} (in {source})",
                       wanted.get(error["type"], f"set another {key}"))


def _place(loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """Where an error of pydantic's lies in a recipe: without the part of a union that it tried."""
    place: tuple[str | int, ...] = ()
    for part in loc:
        tried = isinstance(part, str) and part.startswith("as a ")  # the tags of `prelora_ds.config.phases`
        if not tried and annotation_at(Config, (*place, part)) is not None:
            place = (*place, part)
    return place


def _dotted(place: Sequence[str | int], values: Mapping[str, Any]) -> str:
    """The key of ``place``, with an entry of `phases` by its name."""
    parts = list(place)
    if len(parts) > 1 and parts[0] == "phases" and isinstance(parts[1], int):
        entry = values["phases"][parts[1]]
        parts[1] = entry.get("name", parts[1]) if isinstance(entry, dict) else parts[1]
    return ".".join(map(str, parts))


def _without_auto(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A DeepSpeed config without its "auto", each of which leaves a key to its owner or to DeepSpeed's default.

    Raises ConfigError for what has no such owner: DeepSpeed would take stage 0, and would not offload.
    """
    zero = values.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    owner = "it cannot be auto here; phases.*.zero_stage can"
    for held, key, remedy in (
            (values, "zero_optimization", f"write its keys; zero_optimization.stage is 0, 1, 2 or 3: {owner}"),
            (zero, "zero_optimization.stage", f"write 0, 1, 2 or 3; {owner}"),
            (zero, "zero_optimization.offload_optimizer", 'write {"device": "none"} or {"device": "cpu"}'),
            (offload, "zero_optimization.offload_optimizer.device", 'write "none" or "cpu"')):
        if isinstance(held, dict) and held.get(key.rpartition(".")[2]) == "auto":
            raise ConfigError(f"{source}: {key}", "auto", "would silently be DeepSpeed's default, "
                              f"{'none' if 'offload' in key else 'stage 0'}", remedy)
    kept: dict[str, Any] = _dropped(values)
    return kept


def _dropped(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _dropped(v) for k, v in value.items() if v != "auto"}
    return value
