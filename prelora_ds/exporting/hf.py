"""Export the final model to a folder for other libraries, with LoRA merged in fp32."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import ViTImageProcessor
from transformers.image_utils import PILImageResampling

from prelora_ds.config.tree import Config
from prelora_ds.core.classes import unnamed
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.data.transforms import eval_short_side
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.release import release
from prelora_ds.engine.state import export_state, gather_full
from prelora_ds.errors import NotSavedError, is_disk_fault
from prelora_ds.files import new_folder
from prelora_ds.model.adapters import effective_bias, effective_weight
from prelora_ds.model.vit import build_model
from prelora_ds.run.checkpoints.checkpoint_folder import list_checkpoints
from prelora_ds.run.folder import RunFolder

# The share of red, green and blue in a grey value, as in Pillow's conversion to "L".
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
PATCHES = "vit.embeddings.patch_embeddings.projection.weight"


def export_model(
    engine: Engine,
    folder: Path,
    classes: Sequence[str] | None = None,
    *,
    card: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write the engine's model to ``folder`` and release the engine. Collective; rank 0 writes.

    A ViT becomes a folder for transformers (`write_model`). Any other module becomes
    model.safetensors (with the module's own names) and factory.json. Trained parameters are
    written from the fp32 masters. A frozen weight is written as the BF16 value that the adapters
    were trained on; the adapters are merged into it in fp32. The folder appears complete or not at
    all.

    classes: the names of the labels, which are stored in the folder; None if they are not known.
    card: writes the model card into the folder that it is given.

    Raises NotSavedError on all ranks if the folder cannot be written.
    """
    config = engine.config
    names = classes or unnamed(engine.num_labels)

    def write(weights: Mapping[str, torch.Tensor], partial: Path) -> None:
        write_model(weights, config, names, partial)
        card(partial)

    export_weights(engine, folder, write)


def export_weights(engine: Engine, folder: Path, write: Callable[[Mapping[str, torch.Tensor], Path], object]) -> None:
    """Release the engine, and let rank 0 write the weights of the model without adapters to ``folder``. Collective.

    write: called with the fp32 parameters and the persistent buffers, by name, and a temporary folder, which becomes
        ``folder`` once it is complete.

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
                write(merge(values, engine.plan, engine.layout) | buffers, partial)
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
        weight, bias = f"{path}.weight", f"{path}.bias"
        merged[weight] = effective_weight(values[weight], leaves_by_path[path], spec)
        if bias in merged:
            merged[bias] = effective_bias(values[bias], leaves_by_path[path], spec)
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

    A ViT can be opened with ``pipeline("image-classification", folder)`` and with
    ``ViTForImageClassification.from_pretrained(folder)``. It takes RGB images, also if it was
    trained on grey ones (`with_rgb_patches`).

    Raises OSError or SafetensorError.
    """
    if config.model.factory is None:
        _write_vit(weights, config, classes, folder)
    else:
        write_tensors(weights, folder)
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


def _write_vit(
    weights: Mapping[str, torch.Tensor], config: Config, classes: Sequence[str], folder: Path
) -> None:
    rgb = config.model.model_copy(update={"num_channels": 3})
    with torch.device("meta"):
        model: Any = build_model(rgb, len(classes))  # a ViTForImageClassification
    # How `prelora evaluate` prepares images: as in training.
    model.config.eval_crop = config.data.crop
    model.config.eval_channels = config.model.num_channels
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: label for label, name in enumerate(classes)}
    if config.train.loss == "sigmoid":
        model.config.problem_type = "multi_label_classification"  # pipeline then applies a sigmoid
    write_pretrained(with_rgb_patches(weights), model, folder)
    image_processor(config).save_pretrained(folder)


def with_rgb_patches(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the ``weights`` of a ViT for RGB images.

    transformers' pipeline converts every image to RGB. So the weight of the patch embedding of a
    model for grey images, [D, 1, P, P], is multiplied by the share of each colour in a grey value:
    [D, 3, P, P]. The model then sees a grey image as it did in training, and a colour image as its
    grey version, except for rounding.
    """
    patches = weights[PATCHES]
    if patches.shape[1] == 1:
        luma = torch.tensor(LUMA, dtype=torch.float64).view(1, 3, 1, 1)
        patches = (patches.double() * luma).float()
    return {**weights, PATCHES: patches}


def image_processor(config: Config) -> ViTImageProcessor:
    """Return the image processor that prepares RGB images as `eval_transform` does.

    transformers 5 cuts out the centre at ``floor(margin / 2)``, and `eval_transform` rounds a half
    to even, as torchvision does. They differ by one pixel where the margin leaves the remainder 3
    when it is divided by 4.
    """
    size = config.model.image_size
    crop = config.data.crop == "inception"
    return ViTImageProcessor(
        do_convert_rgb=True,  # for grey arrays; the pipeline itself converts only files and Pillow images
        do_resize=True,
        size={"shortest_edge": eval_short_side(size)} if crop else {"height": size, "width": size},
        resample=PILImageResampling.BILINEAR,
        do_center_crop=crop,
        crop_size={"height": size, "width": size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def write_pretrained(weights: Mapping[str, torch.Tensor], model: Any, folder: Path) -> None:
    """Write transformers' ``model``, which is on the meta device, for ``from_pretrained``.

    Raises OSError or SafetensorError.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # It would clutter the output.
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder)


def write_tensors(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write model.safetensors with the module's own names. Raises OSError or SafetensorError."""
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
