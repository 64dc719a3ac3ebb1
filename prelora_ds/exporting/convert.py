"""A checkpoint as others open it: a Hugging Face folder, a peft adapter, a timm state dict, DeepSpeed's own folder."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from prelora_ds.config.changes import with_new_names
from prelora_ds.config.load import validate
from prelora_ds.config.phases import PhaseSettings
from prelora_ds.config.tree import Config
from prelora_ds.core.classes import classes_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.errors import ConfigError, cannot_write
from prelora_ds.exporting.hf import merge, whole_folder, write_model
from prelora_ds.model.adapters import first_value
from prelora_ds.model.adapters.lora import peft_config
from prelora_ds.model.families import find_layout
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
# Path in transformers' ViT -> path in timm's; q, k and v are one linear there.
_TIMM = {"vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed",
         "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layernorm": "norm",
         "classifier": "head", "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj",
         "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def export_checkpoint(source: Path, out: Path, form: str) -> Path:
    """Write the newest checkpoint of the run ``source``, or the one it names, to the new folder ``out``, in fp32.

    hf: LoRA merged, for ``ViTForImageClassification.from_pretrained``. peft: the adapter, and in ``out/base`` the model
    that it belongs to. timm: ``model.safetensors`` for the timm model that ``timm.json`` describes, LoRA merged.
    deepspeed: DeepSpeed's folder for one rank at stage 2, moments included. A weight that was frozen
    has the BF16 value that training saw. Each has the class names, where the checkpoint knows them.

    Returns the checkpoint. Raises ConfigError, and NotSavedError when the disk fails while ``out`` is
    written; then nothing of it is left.
    """
    if form not in FORMATS:
        raise ConfigError("--format", form, "is not a format", f"choose among {', '.join(FORMATS)}")
    folder = checkpoints_at(str(source), "RUN")[0]
    _check_out(out, folder)
    try:
        document = read_run_state(folder)
        config = _config(document["config"], CheckpointManifest.load(folder), folder, form)
        classes = classes_of(document)
        if classes is None:
            raise BrokenCheckpointError(f"{folder}: its state does not tell the number of classes")
        with torch.device("meta"):
            layout = find_layout(
                build_model(config.model, len(classes)), config.families(), config.model.families
            )
        found = read_checkpoint(folder, layout, 0, 1)
    except (BrokenCheckpointError, KeyError, TypeError, OSError) as exc:
        older = [f.name for f in list_checkpoints(folder.parent) if f != folder]
        raise ConfigError("RUN_OR_CHECKPOINT", str(folder), f"cannot be read: {exc}",
                          f"name another checkpoint: {', '.join(older) or 'there is none'}") from exc
    plan = found.run.phase.plan
    if form in ("peft", "timm") and config.model.factory is not None:
        raise ConfigError("--format", form, f"is for a ViT, and this is a {config.model.factory}", "choose hf")
    if form == "peft" and not plan.adapters:
        raise ConfigError("--format", form, f"the checkpoint of step {found.run.step} is of phase {plan.phase}, which "
                          "has no adapters", "choose hf, or a later checkpoint")
    with whole_folder(out, replace=False) as partial:
        if form == "deepspeed":
            _write_deepspeed(config, classes, layout, found, partial)
            return folder
        values = _values(found, plan, layout, config)
        merged = merge(values, plan, layout) | {name: b for name, b in found.engine.buffers.items()
                                                if name in _persistent(config, len(classes))}
        if form == "hf":
            write_model(merged, config, classes, partial)
        elif form == "timm":
            _write_timm(merged, config, classes, partial)
        else:
            _write_peft(values, plan, layout, config, classes, partial, base_named=out.resolve() / "base")
    return folder


def _config(stored: Mapping[str, Any], manifest: CheckpointManifest, folder: Path, form: str) -> Config:
    """What an export as ``form`` needs of the ``stored`` config; all else is as by default.

    An older version may have allowed what this one refuses, and a folder, a seed or a ZeRO key is of no weight here.
    Raises ConfigError, and KeyError or TypeError for what is no config.
    """
    if not isinstance(stored, dict):
        raise TypeError("its config is not a mapping")
    named = with_new_names(stored)
    trains = form == "deepspeed"  # with an optimizer, whose groups and batch are those of the run
    return validate(
        {
            "run": {"name": "export", "output_dir": "-"},
            "model": named["model"],
            "data": {"train": "-", "val": "-", **_only(named["data"], "crop")},
            "train": {
                "duration": "1 epoch",
                "global_batch_size": named["train"]["global_batch_size"] if trains else 1,
                "micro_batch_size": 1,
            },
            "optimizer": _only(named.get("optimizer", {}), "lr", "betas", "eps", "weight_decay") if trains else {},
            "convergence": None if named.get("convergence") is None else {"tau": 1.0, "zeta": 1.0},
            "lora": {key: value for key, value in named.get("lora", {}).items() if key != "warmup"},
            "phases": _at_stage(named.get("phases", {}), manifest),
        },
        str(folder),
    )


def _at_stage(phases: Any, manifest: CheckpointManifest) -> Any:
    """``phases`` of a stored config without their settings, but for the ZeRO stage of the checkpoint's own."""

    def stage(name: str) -> int:
        return manifest.zero_stage if name == manifest.phase else 0

    if isinstance(phases, list):
        method = [{key: value for key, value in own.items() if key not in PhaseSettings.model_fields} for own in phases]
        return [{**own, "zero_stage": stage(own["name"])} for own in method]
    stages = {name: {"zero_stage": stage(name)} for name in ("full", "warmup", "lora")}
    return {"preset": phases.get("preset"), **stages}


def _only(section: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: section[key] for key in keys if key in section}


def _check_out(out: Path, checkpoint: Path) -> None:
    """Raise ConfigError unless ``out`` can be made: a new folder outside of the run of ``checkpoint``."""
    if out.exists() or out.is_symlink():
        raise ConfigError("OUT", str(out), "exists", "name a new folder")
    root = root_of(checkpoint.resolve())
    run = RunFolder.of_checkpoints(root)
    owner = checkpoint.resolve() if run is None else run.path
    if owner in out.resolve().parents:
        raise ConfigError(
            "OUT",
            str(out),
            f"lies inside {owner}, and a run owns all that is in its folder",
            "name a folder outside of the run",
        )
    try:
        out.mkdir(parents=True)
        out.rmdir()
    except OSError as exc:
        raise cannot_write("OUT", str(out), exc) from exc


def _values(found: Checkpoint, plan: Plan, layout: Layout, config: Config) -> dict[str, torch.Tensor]:
    """Whole parameters in fp32, as the model computes with them (but for the rounding of what trains)."""
    merged = config.for_phase(plan.phase).kernel() == "merged"
    kept_in_fp32 = {f"{path}.weight" for path in plan.frozen_targets()} if merged else set()
    values, leaves = {}, plan.leaves(layout)
    for name, shape in plan.parameters(layout).items():
        held = found.engine.slices.get(name)
        value = first_value(name, shape, plan, leaves) if held is None else held.value.view(shape)
        rounded = name not in plan.trainable and name not in kept_in_fp32
        values[name] = value.bfloat16().float() if rounded else value.float()
    return values


def _persistent(config: Config, labels: int) -> set[str]:
    with torch.device("meta"):
        return set(build_model(config.model, labels).state_dict())


def _write_peft(
    values: Mapping[str, torch.Tensor],
    plan: Plan,
    layout: Layout,
    config: Config,
    classes: Sequence[str],
    out: Path,
    *,
    base_named: Path,
) -> None:
    """``base_named``: where the adapter's config and card say that its base is."""
    from peft import get_peft_model, set_peft_model_state_dict
    from transformers import ViTForImageClassification

    (out / "base").mkdir()
    write_model({name: values[name] for name in layout.parameters}, config, classes, out / "base")
    base = ViTForImageClassification.from_pretrained(out / "base")
    base.name_or_path = base.config.name_or_path = str(base_named)  # peft copies both
    model = get_peft_model(base, peft_config(plan.adapters, config.for_phase(plan.phase).adapters.dropout))
    adapters = {f"base_model.model.{name}": value
                for name, value in values.items() if name not in layout.parameters}
    loaded: Any = set_peft_model_state_dict(model, adapters)  # a namedtuple, which peft makes in the function
    if loaded.unexpected_keys:
        raise RuntimeError(f"peft has no parameter {loaded.unexpected_keys[0]}")
    # Otherwise peft looks for a vocabulary in the base, which has not got its name yet.
    model.save_pretrained(str(out), save_embedding_layers=False)


def _write_timm(
    weights: Mapping[str, torch.Tensor], config: Config, classes: Sequence[str], out: Path
) -> None:
    renamed = {}
    for name, value in weights.items():
        block = re.fullmatch(r"vit\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            path, dot, leaf = (name, "", "") if name in _TIMM else name.rpartition(".")
            renamed[_TIMM[path] + dot + leaf] = value
        elif block[2] == "attention.q_proj":
            stem = name.replace("q_proj", "{}_proj")
            renamed[f"blocks.{block[1]}.attn.qkv.{block[3]}"] = torch.cat([weights[stem.format(x)] for x in "qkv"])
        elif block[2] not in ("attention.k_proj", "attention.v_proj"):
            renamed[f"blocks.{block[1]}.{_TIMM[block[2]]}.{block[3]}"] = value
    m = config.model
    arguments = {
        "img_size": m.image_size,
        "patch_size": m.patch_size,
        "in_chans": m.num_channels,
        "num_classes": len(classes),
        "embed_dim": m.hidden_size,
        "depth": m.num_hidden_layers,
        "num_heads": m.num_attention_heads,
        "mlp_ratio": mlp_ratio(m.hidden_size, m.intermediate_size),
    }
    save_file({name: value.contiguous() for name, value in renamed.items()}, out / "model.safetensors")
    (out / "timm.json").write_text(
        json.dumps(
            {
                "class": "timm.models.VisionTransformer",
                "arguments": arguments,
                "label_names": list(classes),
                "note": "norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-12), as in transformers; "
                "inputs in [-1, 1]",
            },
            indent=2,
        )
        + "\n"
    )


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio that timm makes ``hidden`` of again: it truncates ``width * ratio`` to an integer.

    Raises ConfigError for sizes beyond what a float can tell apart.
    """
    ratio = hidden / width
    if int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    if int(width * ratio) != hidden:
        raise ConfigError(
            "model.intermediate_size",
            hidden,
            f"timm has no ratio of it to hidden_size {width}",
            "choose another --format",
        )
    return ratio


def _write_deepspeed(
    config: Config, classes: Sequence[str], layout: Layout, found: Checkpoint, out: Path
) -> None:
    from prelora_ds.engine.build import build_engine
    from prelora_ds.engine.release import release
    from prelora_ds.engine.runtime import init_process_group

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    init_process_group()
    # Stage 2: DeepSpeed 0.19's optimizer of stage 1 in BF16 writes neither its stage nor what is frozen, and
    # zero_to_fp32.py asks for both. Branch: a folded weight would hold the adapters that stand beside it.
    phase = found.run.phase.plan.phase
    own = config.with_settings(phase, PhaseSettings(micro_batch_size=config.train.global_batch_size, zero_stage=2))
    engine = build_engine(
        own.with_kernel("branch"),
        found.run.phase.plan,
        layout,
        len(classes),
        found.engine,
        found.counters,
    )
    state = {"classes": list(classes)}
    engine.ds.save_checkpoint(str(out), tag=found.folder.name, client_state=state)
    release(engine)
