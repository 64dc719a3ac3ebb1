"""The final model as a folder that others open, LoRA merged in fp32."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from prelora_ds.config.tree import Config
from prelora_ds.core.classes import unnamed
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.engine.build import Engine
from prelora_ds.engine.release import release
from prelora_ds.engine.state import export_state, gather_full
from prelora_ds.errors import NotSavedError, is_disk_fault
from prelora_ds.files import new_folder
from prelora_ds.model.adapters import effective_weight
from prelora_ds.model.vit import build_model
from prelora_ds.run.checkpoints.checkpoint_folder import list_checkpoints
from prelora_ds.run.folder import RunFolder


def export_model(engine: Engine, folder: Path, classes: Sequence[str] | None = None) -> None:
    """Write ``engine``'s model to ``folder`` and end the engine. Collective; rank 0 writes.

    A ViT becomes a folder for ``ViTForImageClassification.from_pretrained``; any other module model.safetensors (its
    own names) and factory.json. What trained is written from the fp32 masters; a frozen weight as the BF16 value that
    the adapters were trained on, into which they are folded in fp32. Appears whole or not at all.

    classes: the names of the labels, which go into the folder; None where they are not known.
    Raises NotSavedError, on all ranks, when the folder cannot be written.
    """
    kept = set(engine.module.state_dict())  # a buffer may be no part of a module's state
    device, state = engine.ds.device, export_state(engine.ds)
    release(engine)
    values = {}
    for name, shape in engine.plan.parameters(engine.layout).items():
        full = gather_full(state, name, "value", shape, device)
        if dist.get_rank() == 0:
            values[name] = full.cpu()
    failure: list[NotSavedError | None] = [None]
    if dist.get_rank() == 0:
        buffers = {name: buffer for name, buffer in state.buffers.items() if name in kept}
        try:
            with whole_folder(folder, replace=True, kept=left_by_run(folder.parent)) as partial:
                write_model(merge(values, engine.plan, engine.layout) | buffers, engine.config,
                            classes or unnamed(engine.num_labels), partial)
        except NotSavedError as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def merge(values: Mapping[str, torch.Tensor], plan: Plan, layout: Layout) -> dict[str, torch.Tensor]:
    """The parameters of the model without adapters, fp32, each adapter of ``plan`` folded into its weight."""
    merged = {name: values[name].float() for name in layout.parameters}
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, (path, leaf) in plan.leaves(layout).items():
        held.setdefault(path, {})[leaf] = values[name]
    for path, spec in plan.adapters.items():
        merged[f"{path}.weight"] = effective_weight(values[f"{path}.weight"], held[path], spec)
    return merged


@contextmanager
def whole_folder(folder: Path, *, replace: bool, kept: str = "the checkpoint is as it was") -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` at the end, whole and on disk (`new_folder`).

    kept: what there is still, in words, when it cannot be written.

    Raises NotSavedError when the file system refuses it; then
    nothing of it is left, and ``folder`` is as it was.
    """
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise NotSavedError(f"the model could not be written to {folder}: there is a "
                            f"{'link' if folder.is_symlink() else 'file'} of that name, and it is to be a folder\n"
                            f"  remedy: remove or rename it and give the same command again; {kept}")
    try:
        with new_folder(folder, replace=replace) as partial:
            yield partial
    except (OSError, SafetensorError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and not is_disk_fault(exc):
            raise
        full = is_disk_fault(exc) or not isinstance(exc, OSError)
        raise NotSavedError(
            f"the model could not be written to {folder}: {exc}\n"
            f"  remedy: {'make room there' if full else 'make it a place that you may write to'} and give the same "
            f"command again; {kept}"
        ) from exc


def left_by_run(out: Path) -> str:
    """What the run of ``out`` goes on from when it is started again, in words."""
    try:
        found = list_checkpoints(RunFolder(out).checkpoints)
    except OSError:
        found = []
    return f"it goes on from {found[0].name}" if found else "no checkpoint was written, so it trains from the beginning"


def write_model(
    weights: Mapping[str, torch.Tensor], config: Config, classes: Sequence[str], folder: Path
) -> None:
    """Write the model of ``weights``, fp32, into the existing ``folder``. Raises OSError or SafetensorError."""
    if config.model.factory is None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # its lines would be no part of a run's output, or of a command's
        with torch.device("meta"):
            model: Any = build_model(config.model, len(classes))  # a ViTForImageClassification
        model.config.eval_crop = config.data.crop  # how `prelora evaluate` prepares images
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: label for label, name in enumerate(classes)}
        model.load_state_dict(weights, assign=True)
        model.save_pretrained(folder)
    else:
        save_file(
            {name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors"
        )
        (folder / "factory.json").write_text(
            json.dumps(
                {
                    "factory": config.model.factory,
                    "args": config.model.factory_args,
                    "num_labels": len(classes),
                    "classes": list(classes),
                },
                indent=2,
            )
        )
