"""Convert a checkpoint to a format of another library.

The formats are a Hugging Face folder, a peft adapter, a timm state dict and DeepSpeed's own folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prelora_ds.config.changes import with_new_names
from prelora_ds.config.load import validate
from prelora_ds.config.phases import PhaseSettings
from prelora_ds.config.tree import Config
from prelora_ds.core.classes import classes_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.errors import ConfigError, cannot_write
from prelora_ds.exporting.card import trained_by, write_card
from prelora_ds.exporting.deepspeed import write_deepspeed
from prelora_ds.exporting.hf import export_folder, merge, write_model
from prelora_ds.exporting.peft import write_peft
from prelora_ds.exporting.timm import write_timm
from prelora_ds.model.adapters import initial_adapter_value
from prelora_ds.model.families import find_layout
from prelora_ds.model.quantised import QUANTISERS
from prelora_ds.model.vit import build_model
from prelora_ds.run.checkpoints.checkpoint_folder import (
    BrokenCheckpointError,
    CheckpointManifest,
    list_checkpoints,
    read_run_state,
    root_of,
)
from prelora_ds.run.checkpoints.resume import Checkpoint, checkpoints_at, read_checkpoint
from prelora_ds.run.folder import RunFolder

FORMATS = ("hf", "peft", "timm", "deepspeed")
SEEN, IN_FP32 = BASES = ("seen", "fp32")


def export_checkpoint(source: Path, out: Path, export_format: str, base: str = SEEN) -> Path:
    """Convert a checkpoint to ``export_format`` and write it to the new folder ``out``.

    source: a checkpoint, or a run (its newest checkpoint).
    export_format: one of `FORMATS`.
        hf: for transformers' pipeline and from_pretrained, LoRA merged.
        peft: the adapter, and in ``out/base`` the model that it belongs to.
        timm: for ``timm.create_model("local-dir:OUT", pretrained=True)``, LoRA merged.
        deepspeed: DeepSpeed's folder for one rank at stage 2, including the moments.

    base: one of `BASES`.
        seen: a frozen weight has the value that training saw, in BF16 or quantised.
        fp32: it has the fp32 value that it had when it was frozen.

    All values are fp32. The class names are included if the checkpoint has them. Each format has a
    model card, README.md, and no path of this machine.

    Returns the folder of the checkpoint. Raises ConfigError, and NotSavedError if the disk fails
    while ``out`` is written; ``out`` does not exist then.
    """
    if export_format not in FORMATS:
        raise ConfigError(
            "--format", export_format, "is not a known format", f"choose among {', '.join(FORMATS)}"
        )
    if base not in BASES:
        raise ConfigError("--base", base, "is not a known value", f"choose among {', '.join(BASES)}")
    folder = checkpoints_at(str(source), "RUN")[0]
    _check_out(out, folder)
    try:
        document = read_run_state(folder)
        stored = document["config"]
        manifest = CheckpointManifest.load(folder)
        config = _export_config(stored, manifest, folder, export_format)
        classes = classes_of(document)
        if classes is None:
            raise BrokenCheckpointError(f"{folder}: its state lacks the number of classes")
        with torch.device("meta"):
            model = build_model(config.model, len(classes))
            layout = find_layout(model, config.families(), config.model.families)
        checkpoint = read_checkpoint(folder, layout, 0, 1)
    except (BrokenCheckpointError, KeyError, TypeError, OSError) as exc:
        others = [f.name for f in list_checkpoints(folder.parent) if f != folder]
        raise ConfigError(
            "RUN_OR_CHECKPOINT",
            str(folder),
            f"cannot be read: {exc}",
            f"choose another checkpoint: {', '.join(others) or 'there is none'}",
        ) from exc
    plan = checkpoint.run.phase.plan
    _check_format_fits(export_format, config, checkpoint)
    if base == IN_FP32:
        _check_has_fp32(export_format, checkpoint, layout)
    run = RunFolder.of_checkpoints(root_of(folder))
    trained = trained_by(run, with_new_names(stored), checkpoint.run, checkpoint.data)

    with export_folder(out, replace=False) as partial:
        if export_format == "deepspeed":
            write_deepspeed(config, classes, layout, checkpoint, partial)
        else:
            values = _full_values(checkpoint, plan, layout, config, in_fp32=base == IN_FP32)
            if export_format == "peft":
                write_peft(values, plan, layout, config, classes, partial)
            else:
                persistent = _persistent_names(config, len(classes))
                buffers = {n: b for n, b in checkpoint.engine.buffers.items() if n in persistent}
                write = write_model if export_format == "hf" else write_timm
                write(merge(values, plan, layout) | buffers, config, classes, partial)
        write_card(partial, export_format, trained if base == SEEN else trained.on_fp32_base(), config, classes)
    return folder


def _check_format_fits(export_format: str, config: Config, checkpoint: Checkpoint) -> None:
    """Raise ConfigError if the checkpoint cannot be converted to this format."""
    plan = checkpoint.run.phase.plan
    if export_format in ("peft", "timm") and config.model.factory is not None:
        raise ConfigError(
            "--format",
            export_format,
            f"is only for a ViT, but this model is a {config.model.factory}",
            "choose hf",
        )
    kinds = sorted({spec.kind for spec in plan.adapters.values()})
    if export_format == "peft" and len(kinds) > 1:
        raise ConfigError(
            "--format",
            export_format,
            f"holds adapters of one kind, but the checkpoint has the kinds {', '.join(kinds)}",
            "choose hf",
        )
    if export_format == "deepspeed" and plan.quantised():
        raise ConfigError(
            "--format",
            export_format,
            f"has no place for quantised weights, but those of phase {plan.phase} are in "
            f"{plan.base_dtype}",
            "choose another format, or a checkpoint of another phase",
        )
    if export_format == "peft" and not plan.adapters:
        raise ConfigError(
            "--format",
            export_format,
            f"the checkpoint at step {checkpoint.run.step} is in phase {plan.phase} and has no "
            "adapters",
            "choose hf, or a later checkpoint",
        )


def _check_has_fp32(export_format: str, checkpoint: Checkpoint, layout: Layout) -> None:
    """Raise ConfigError unless frozen weights can be written in fp32."""
    if export_format == "deepspeed":
        raise ConfigError(
            "--base",
            IN_FP32,
            "is not possible in DeepSpeed's format, whose weights are in BF16",
            f"choose {SEEN}, or another format",
        )
    slices = checkpoint.engine.slices
    rounded = [name for name in layout.parameters if slices[name].value.dtype != torch.float32]
    if rounded:
        raise ConfigError(
            "--base",
            IN_FP32,
            f"the checkpoint has only BF16 values of {len(rounded)} frozen parameters, such as {rounded[0]}",
            f"choose {SEEN}, which exports the values that training saw",
        )


def _export_config(
    stored: Mapping[str, Any], manifest: CheckpointManifest, folder: Path, export_format: str
) -> Config:
    """Return a config with the ``stored`` settings that the export needs, otherwise with defaults.

    An older version may have accepted values that this one refuses; folders, seeds and ZeRO keys,
    for example, do not matter for an export. Raises ConfigError, and KeyError or TypeError if
    ``stored`` is not a config.
    """
    if not isinstance(stored, dict):
        raise TypeError("its config is not a mapping")
    named = with_new_names(stored)
    # DeepSpeed's format includes the optimizer, whose groups and batch must be those of the run.
    trains = export_format == "deepspeed"
    optimizer = {}
    if trains:
        optimizer = _only(named.get("optimizer", {}), "lr", "betas", "eps", "weight_decay")
    return validate(
        {
            "run": {"name": "export", "output_dir": "-"},
            "model": named["model"],
            "data": {"train": "-", "val": "-", **_only(named["data"], "crop")},
            "train": {
                "duration": "1 epoch",
                "global_batch_size": named["train"]["global_batch_size"] if trains else 1,
                "micro_batch_size": 1,
                **_only(named["train"], "loss"),
            },
            "optimizer": optimizer,
            "convergence": None if named.get("convergence") is None else {"tau": 1.0, "zeta": 1.0},
            "lora": {key: value for key, value in named.get("lora", {}).items() if key != "warmup"},
            "phases": _phases_at_stage(named.get("phases", {}), manifest),
        },
        str(folder),
    )


def _phases_at_stage(phases: Any, manifest: CheckpointManifest) -> Any:
    """Return the ``phases`` of a stored config without their settings.

    Only the ZeRO stage is set: the checkpoint's stage for the checkpoint's phase, 0 for the others.
    """

    def stage(name: str) -> int:
        return manifest.zero_stage if name == manifest.phase else 0

    if isinstance(phases, list):
        without_settings = [
            {key: value for key, value in phase.items() if key not in PhaseSettings.model_fields}
            for phase in phases
        ]
        return [{**phase, "zero_stage": stage(phase["name"])} for phase in without_settings]
    stages = {name: {"zero_stage": stage(name)} for name in ("full", "warmup", "lora")}
    return {"preset": phases.get("preset"), **stages}


def _only(section: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: section[key] for key in keys if key in section}


def _check_out(out: Path, checkpoint: Path) -> None:
    """Raise ConfigError unless ``out`` can be created outside of the checkpoint's run."""
    if out.exists() or out.is_symlink():
        raise ConfigError("OUT", str(out), "already exists", "choose a new folder")
    root = root_of(checkpoint.resolve())
    run = RunFolder.of_checkpoints(root)
    owner = checkpoint.resolve() if run is None else run.path
    if owner in out.resolve().parents:
        raise ConfigError(
            "OUT",
            str(out),
            f"is inside {owner}, which belongs to the run",
            "choose a folder outside of the run",
        )
    try:
        out.mkdir(parents=True)
        out.rmdir()
    except OSError as exc:
        raise cannot_write("OUT", str(out), exc) from exc


def _full_values(
    checkpoint: Checkpoint, plan: Plan, layout: Layout, config: Config, *, in_fp32: bool = False
) -> dict[str, torch.Tensor]:
    """Return full parameters in fp32, with the values that the model computes with.

    Parameters that train are not rounded to BF16. in_fp32: whether those of the model itself never are.
    """
    quantised = plan.quantised()
    exact = plan.trainable | (layout.parameters.keys() if in_fp32 else set())
    merged = config.for_phase(plan.phase).kernel() == "merged"
    kept_in_fp32 = {f"{path}.weight" for path in plan.frozen_targets()} if merged else set()
    values: dict[str, torch.Tensor] = {}
    leaves = plan.leaves(layout)
    for name, shape in plan.parameters(layout).items():
        part = checkpoint.engine.slices.get(name)
        if part is None:
            weight = values[f"{leaves[name][0]}.weight"]  # as training saw it, because an adapter like this was frozen
            value = initial_adapter_value(name, shape, plan, leaves, weight.bfloat16())
        else:
            value = part.value.view(shape)
        if name in exact or name in kept_in_fp32:
            values[name] = value.float()
        elif name in quantised:
            values[name] = QUANTISERS[plan.base_dtype](value.float()).dense(torch.float32)
        else:
            values[name] = value.bfloat16().float()
    return values


def _persistent_names(config: Config, labels: int) -> set[str]:
    """Return the names in the model's state dict, which lacks non-persistent buffers."""
    with torch.device("meta"):
        return set(build_model(config.model, labels).state_dict())
