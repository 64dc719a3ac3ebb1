"""The final model as a folder that others open, LoRA merged in fp32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from prelora_ds.core.config import Config
from prelora_ds.core.plan import Layout, Plan
from prelora_ds.engine.build import Engine
from prelora_ds.engine.release import release
from prelora_ds.engine.state import assemble, export_state
from prelora_ds.model.adapters import merged_weight
from prelora_ds.model.vit import build_model


def export_model(engine: Engine, folder: Path) -> None:
    """Write ``engine``'s model to ``folder`` and end the engine. Collective; rank 0 writes.

    A ViT becomes a folder for ``ViTForImageClassification.from_pretrained``; any other module model.safetensors (its
    own names) and factory.json. What trained is written from the fp32 masters; a frozen weight as the BF16 value that
    the adapters were trained on, to which s*B*A is added in fp32. Appears whole or not at all.
    """
    kept = set(engine.module.state_dict())  # a buffer may be no part of a module's state
    device, state = engine.ds.device, export_state(engine.ds)
    release(engine)
    values = {}
    for name, shape in engine.plan.parameters(engine.layout).items():
        full = assemble(state, name, "value", shape, device)
        if dist.get_rank() == 0:
            values[name] = full.cpu()
    if dist.get_rank() == 0:
        buffers = {name: buffer for name, buffer in state.buffers.items() if name in kept}
        write_model(merge(values, engine.plan, engine.layout) | buffers, engine.config, engine.num_labels, folder)
    dist.barrier()


def merge(values: Mapping[str, torch.Tensor], plan: Plan, layout: Layout) -> dict[str, torch.Tensor]:
    """The parameters of the model without adapters, fp32: W + s*B*A where ``plan`` has an adapter."""
    merged = {name: values[name].float() for name in layout.parameters}
    for path, spec in plan.adapters.items():
        merged[f"{path}.weight"] = merged_weight(values[f"{path}.weight"], values[f"{path}.lora_A.weight"],
                                                 values[f"{path}.lora_B.weight"], spec.scaling)
    return merged


def write_model(weights: Mapping[str, torch.Tensor], config: Config, num_labels: int, folder: Path) -> None:
    """Write the model of ``weights``, fp32, to ``folder``: whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if config.model.factory is None:
        with torch.device("meta"):
            model = build_model(config.model, num_labels)
        model.config.eval_crop = config.data.crop  # how `prelora evaluate` prepares images
        model.load_state_dict(weights, assign=True)
        model.save_pretrained(partial)
    else:
        save_file({name: t.contiguous() for name, t in weights.items()}, partial / "model.safetensors")
        (partial / "factory.json").write_text(json.dumps(
            {"factory": config.model.factory, "args": config.model.factory_args, "num_labels": num_labels}, indent=2))
    shutil.rmtree(folder, ignore_errors=True)  # of this run, if it was cut off right here and resumed
    partial.rename(folder)
