"""The DeepSpeed section of a config: which keys are accepted, which are refused, and which the recipe sets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from prelora_ds.errors import ConfigError

# DeepSpeed keys that must not be set here, and the key of the recipe that sets each (or why nothing does).
OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size / (train.micro_batch_size x ranks)",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "communication_data_type": "train.reduce_dtype",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup and optimizer.min_lr_ratio",
    "tensorboard": "run.trackers",
    "csv_monitor": "run.trackers",
    "wandb": "run.trackers",
    "comet": "run.trackers",
}
NOT_SUPPORTED = {
    "fp16": "the engine trains in BF16",
    "data_types": "gradients are accumulated in fp32",
    "prescale_gradients": "gradients are averaged in one way",
    "gradient_predivide_factor": "gradients are averaged in one way",
    "timers": "they would wait for the device in each micro-batch; metrics.jsonl has the seconds of every step",
    "zero_allow_untested_optimizer": "the optimizer is an AdamW with its own step count for each parameter",
}
# The other keys that are allowed. DeepSpeed itself ignores misspelt ones silently.
KNOWN_KEYS = ("zero_optimization", "bf16", "zero_force_ds_cpu_optimizer", "comms_logger", "wall_clock_breakdown",
              "memory_breakdown")
BOOLEAN_KEYS = ("zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "memory_breakdown")  # true or false
BF16_KEYS = ("enabled", "immediate_grad_update", "check_grad_overflow")  # true or false
COMMS_LOGGER_KEYS = ("enabled", "verbose", "prof_all", "debug", "prof_ops")  # true or false, and a list
# Keys of zero_optimization that were tested with another value than DeepSpeed's default: tests/ranks/test_zero_keys.py
# trains with each of them and compares the losses with those of the default. Any other key is refused.
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
# Keys of zero_optimization that are refused, the value that switches each off (which is accepted), and why.
_ACROSS_A_SWITCH = "is not supported across a switch"
_DEPRECATED = "is deprecated in DeepSpeed"
REFUSED_ZERO_KEYS: dict[str, tuple[Any, str]] = {
    "offload_param": (None, _ACROSS_A_SWITCH), "zenflow": (None, _ACROSS_A_SWITCH),
    "zero_hpz_partition_size": (1, _ACROSS_A_SWITCH), "mics_shard_size": (-1, _ACROSS_A_SWITCH),
    "zero_quantized_weights": (False, _ACROSS_A_SWITCH), "zero_quantized_gradients": (False, _ACROSS_A_SWITCH),
    "zero_quantized_nontrainable_weights": (False, _ACROSS_A_SWITCH),
    "compute_grad_norm": (True, "would hide divergence, which is detected by the gradient norm"),
    "ignore_unused_parameters": (True, "would abort a step in which an adapter has no gradient"),
    "leaf_module": (None, "is set by prelora_ds for whole blocks"),
    "stage3_module_granularity_threshold": (0, "does not see the parameters of a model that is built in parts"),
    "save_muon_momentum_buffer_in_memory": (False, "has no effect: the optimizer is AdamW"),
    "legacy_stage1": (False, _DEPRECATED), "elastic_checkpoint": (False, _DEPRECATED),
    "cpu_offload": (False, _DEPRECATED), "cpu_offload_param": (False, _DEPRECATED),
    "cpu_offload_use_pin_memory": (False, _DEPRECATED),
    "stage3_gather_fp16_weights_on_model_save": (False, _DEPRECATED),
}


def check_deepspeed(values: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for a key that the recipe sets or that is not supported, in a config without "auto"."""
    for key, owner in OWNED_BY_RECIPE.items():
        if key in values:
            raise ConfigError(f"{source}: {key}", values[key], f"this key is set by the recipe ({owner})",
                              f'remove "{key}" from {source} and set it in the recipe')
    for key, why in NOT_SUPPORTED.items():
        if key in values:
            raise ConfigError(f"{source}: {key}", values[key], f"is not supported: {why}",
                              f'remove "{key}" from {source}')
    _only(values, (*OWNED_BY_RECIPE, *KNOWN_KEYS), f"{source}: ")
    zero = _section(values, "zero_optimization", f"{source}: ")
    bf16 = _section(values, "bf16", f"{source}: ")
    comms = _section(values, "comms_logger", f"{source}: ")
    _only(bf16, BF16_KEYS, f"{source}: bf16.")
    _only(comms, COMMS_LOGGER_KEYS, f"{source}: comms_logger.")
    _check_booleans(values, BOOLEAN_KEYS, f"{source}: ")
    _check_booleans(bf16, BF16_KEYS, f"{source}: bf16.")
    _check_booleans(comms, COMMS_LOGGER_KEYS[:-1], f"{source}: comms_logger.")
    operations = comms.get("prof_ops", [])
    if not isinstance(operations, list) or not all(isinstance(name, str) for name in operations):
        raise ConfigError(f"{source}: comms_logger.prof_ops", operations, "is not a list of names",
                          'write, for example, ["all_reduce"]')
    if bf16.get("enabled") is False:
        raise ConfigError(f"{source}: bf16.enabled", False, "training runs in BF16", "set it to true")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{source}: zero_optimization.stage", stage, "is not a ZeRO stage", "choose 0, 1, 2 or 3")
    for key in ("reduce_bucket_size", "stage3_param_persistence_threshold"):
        if isinstance(zero.get(key), bool) or not isinstance(zero.get(key, 0), int | float):
            raise ConfigError(f"{source}: zero_optimization.{key}", zero[key], "is not a number",
                              "set it to a number of elements")
    if stage in (1, 2):
        check_alignment(zero, source)
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


def check_alignment(zero: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for a bucket size that DeepSpeed's optimizer of stages 1 and 2 rejects by an assertion.

    DeepSpeed would do so only after the process group is created.
    """
    size = zero.get("allgather_bucket_size", 0)
    if isinstance(size, int | float) and size % 2:
        raise ConfigError(f"{source}: zero_optimization.allgather_bucket_size", size,
                          "is odd, but stages 1 and 2 need an even number of BF16 elements",
                          f"write {int(size) + 1}, for example")


def _only(values: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{prefix}{key}", values[key], "unknown key",
                              f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(known)}")


def _section(values: Mapping[str, Any], key: str, prefix: str) -> Mapping[str, Any]:
    section = values.get(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{prefix}{key}", section, "must be a mapping", "see ds_configs/")
    return section


def _check_booleans(values: Mapping[str, Any], keys: Sequence[str], prefix: str) -> None:
    for key in keys:
        if not isinstance(values.get(key, True), bool):
            raise ConfigError(f"{prefix}{key}", values[key], "is not a boolean", "set it to true or false")


def without_auto(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A DeepSpeed config without the keys whose value is "auto".

    The recipe or DeepSpeed's default sets such a key. Raises ConfigError for the ZeRO stage and for
    offloading, for which DeepSpeed would silently use stage 0 and no offloading.
    """
    zero = values.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    hint = "it cannot be auto here, but phases.*.zero_stage can"
    for section, key, remedy in (
            (values, "zero_optimization", f"set its keys; zero_optimization.stage is 0, 1, 2 or 3: {hint}"),
            (zero, "zero_optimization.stage", f"set it to 0, 1, 2 or 3; {hint}"),
            (zero, "zero_optimization.offload_optimizer", 'set it to {"device": "none"} or {"device": "cpu"}'),
            (offload, "zero_optimization.offload_optimizer.device", 'set it to "none" or "cpu"')):
        if isinstance(section, dict) and section.get(key.rpartition(".")[2]) == "auto":
            default = "none" if "offload" in key else "stage 0"
            raise ConfigError(f"{source}: {key}", "auto",
                              f"would silently mean DeepSpeed's default, {default}", remedy)
    kept: dict[str, Any] = _drop_auto(values)
    return kept


def _drop_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value
