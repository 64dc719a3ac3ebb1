"""Write an adapter, and the model that it belongs to, in the form that peft reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.exporting.hf import write_model
from prelora_ds.model.adapters import half_of

# The folder of the base model, relative to that of the adapter. peft resolves it against the
# current folder of the process.
BASE = "base"


def write_peft(
    values: Mapping[str, torch.Tensor],
    plan: Plan,
    layout: Layout,
    config: Config,
    classes: Sequence[str],
    folder: Path,
) -> None:
    """Write the adapter to ``folder`` and its base model to ``folder/base``.

    values: the fp32 parameters of the model and of its adapters.

    Raises OSError or SafetensorError.
    """
    from peft import get_peft_model, set_peft_model_state_dict
    from transformers import ViTForImageClassification

    (folder / BASE).mkdir()
    write_model({name: values[name] for name in layout.parameters}, config, classes, folder / BASE)
    base = ViTForImageClassification.from_pretrained(folder / BASE)
    base.name_or_path = base.config.name_or_path = BASE  # peft copies both
    dropout = config.for_phase(plan.phase).adapters.dropout
    kind = next(iter(plan.adapters.values())).kind
    peft_config, adapters = half_of(kind).in_peft(plan.adapters, values, dropout)
    model = get_peft_model(base, peft_config)
    # The result is a namedtuple that peft defines inside the function.
    loaded: Any = set_peft_model_state_dict(model, adapters)
    if loaded.unexpected_keys:
        raise RuntimeError(f"peft has no parameter {loaded.unexpected_keys[0]}")
    # With save_embedding_layers peft would look for a vocabulary in the folder BASE.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's card, which states nothing; ours takes its place
