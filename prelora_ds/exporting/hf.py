"""Export the final model to a folder for other libraries, with LoRA merged in fp32."""

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
    """Write the engine's model to ``folder`` and release the engine. Collective; rank 0 writes.

    A ViT becomes a folder for ``ViTForImageClassification.from_pretrained``. Any other module
    becomes model.safetensors (with the module's own names) and factory.json. Trained parameters are
    written from the fp32 masters. A frozen weight is written as the BF16 value that the adapters
    were trained on; the adapters are merged into it in fp32. The folder appears complete or not at
    all.

    classes: the names of the labels, which are stored in the folder; None if they are not known.

    Raises NotSavedError on all ranks if the folder cannot be written.
    """
    persistent = set(engine.module.state_dict())  # Not every buffer is part of a module's state.
    device = engine.ds.device
    state = export_state(engine.ds)
    release(engine)
    values = {}
    for name, shape in engine.plan.parameters(engine.layout).items():
        full = gather_full(state, name, "value", shape, device)
        if dist.get_rank() == 0:
            values[name] = full.cpu()
    failure: list[NotSavedError | None] = [None]
    if dist.get_rank() == 0:
        buffers = {name: buffer for name, buffer in state.buffers.items() if name in persistent}
        try:
            fallback = resume_hint(folder.parent)
            with export_folder(folder, replace=True, fallback=fallback) as partial:
                weights = merge(values, engine.plan, engine.layout) | buffers
                names = classes or unnamed(engine.num_labels)
                write_model(weights, engine.config, names, partial)
        except NotSavedError as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def merge(
    values: Mapping[str, torch.Tensor], plan: Plan, layout: Layout
) -> dict[str, torch.Tensor]:
    """Merge each adapter into its weight; return the fp32 parameters of the model without adapters."""
    merged = {name: values[name].float() for name in layout.parameters}
    leaves_by_path: dict[str, dict[str, torch.Tensor]] = {}
    for name, (path, leaf) in plan.leaves(layout).items():
        leaves_by_path.setdefault(path, {})[leaf] = values[name]
    for path, spec in plan.adapters.items():
        weight = f"{path}.weight"
        merged[weight] = effective_weight(values[weight], leaves_by_path[path], spec)
    return merged


@contextmanager
def export_folder(
    folder: Path, *, replace: bool, fallback: str = "the checkpoint is unchanged"
) -> Iterator[Path]:
    """Yield a temporary folder to write into; at the end it is renamed to ``folder`` (`new_folder`).

    fallback: states what is available if the folder cannot be written; part of the error message.

    Raises NotSavedError if the file system fails; ``folder`` is then unchanged, and the temporary
    folder is removed.
    """
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        kind = "link" if folder.is_symlink() else "file"
        raise NotSavedError(
            f"the model could not be written to {folder}: there is a {kind} with this name, but it "
            "must be a folder\n"
            f"  remedy: remove or rename it and run the same command again; {fallback}"
        )
    try:
        with new_folder(folder, replace=replace) as partial:
            yield partial
    except (OSError, SafetensorError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and not is_disk_fault(exc):
            raise
        disk_full = is_disk_fault(exc) or not isinstance(exc, OSError)
        remedy = "free space there" if disk_full else "make it writable"
        raise NotSavedError(
            f"the model could not be written to {folder}: {exc}\n"
            f"  remedy: {remedy} and run the same command again; {fallback}"
        ) from exc


def resume_hint(output_dir: Path) -> str:
    """State what the run in ``output_dir`` continues from when its command is run again."""
    try:
        checkpoints = list_checkpoints(RunFolder(output_dir).checkpoints)
    except OSError:
        checkpoints = []
    if not checkpoints:
        return "no checkpoint was written, so the run starts from the beginning"
    return f"the run resumes from {checkpoints[0].name}"


def write_model(
    weights: Mapping[str, torch.Tensor], config: Config, classes: Sequence[str], folder: Path
) -> None:
    """Write the model with the fp32 ``weights`` into the existing ``folder``.

    Raises OSError or SafetensorError.
    """
    if config.model.factory is None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # It would clutter the output.
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
