"""LoRA adapters in peft's layout, attached through peft and held against the plan."""

from __future__ import annotations

import hashlib
import math

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from prelora_ds.core.plan import Plan
from prelora_ds.model.families import canonical_name
from prelora_ds.model.lora_linear import ADAPTER_NAME, LoraLinear


def peft_config(plan: Plan, dropout: float) -> PeftLoraConfig:
    """The peft config of a plan's adapters, as it stands in an adapter_config.json."""
    some_spec = next(iter(plan.adapters.values()))
    return PeftLoraConfig(
        target_modules=sorted(plan.adapters),
        r=some_spec.rank,
        lora_alpha=some_spec.alpha,  # type: ignore[arg-type]
        rank_pattern={module: spec.rank for module, spec in plan.adapters.items()},
        alpha_pattern={module: spec.alpha for module, spec in plan.adapters.items()},
        lora_dropout=dropout,
    )


def attach_adapters(module: nn.Module, plan: Plan, *, dropout: float, fast: bool = True) -> nn.Module:
    """Wrap the linears that ``plan`` names, in our own LoRA linear or, if not ``fast``, in peft's.

    Raises RuntimeError when what peft made is not what the plan says: peft accepts a rank_pattern key that matches
    nothing in silence, and gives another scaling where an alpha_pattern is missing.
    """
    idle = {name for module in plan.adapters.keys() - plan.active for name in plan.trainable
            if name.startswith(f"{module}.lora_")}
    if idle and (dropout > 0 or not fast):
        raise RuntimeError(f"{min(idle)} is inactive, and peft's forward pass, which runs with lora.dropout and "
                           "lora.mode=peft, would train it all the same")
    if plan.adapters:
        config = peft_config(plan, dropout)
        if fast:
            config._register_custom_module({nn.Linear: LoraLinear})  # peft's door for a layer of one's own
        inject_adapter_in_model(config, module, adapter_name=ADAPTER_NAME)
    for path, m in module.named_modules():
        if isinstance(m, LoraLinear):
            m.active = path in plan.active
    check_adapters(module, plan)
    return module


def check_adapters(module: nn.Module, plan: Plan) -> None:
    """Assert each realised rank and scaling against ``plan``; raises RuntimeError that names the first difference."""
    found = {path: m for path, m in module.named_modules() if isinstance(m, PeftLinear)}
    if found.keys() != plan.adapters.keys():
        odd = sorted(found.keys() ^ plan.adapters.keys())
        raise RuntimeError(f"adapters of the model and of the plan differ, first at {odd[0]}")
    for path, spec in plan.adapters.items():
        real = found[path]
        weight = real.lora_A[ADAPTER_NAME].weight
        rank = getattr(weight, "ds_shape", weight.shape)[0]
        if (real.r[ADAPTER_NAME], rank) != (spec.rank, spec.rank):
            raise RuntimeError(f"{path}: rank {rank} realised, {spec.rank} planned")
        if not math.isclose(real.scaling[ADAPTER_NAME], spec.scaling, rel_tol=1e-12):
            raise RuntimeError(f"{path}: scaling {real.scaling[ADAPTER_NAME]} realised, {spec.scaling} planned")


def fresh_adapter(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The first value of a LoRA parameter, fp32: A kaiming-uniform(sqrt 5), B zero (LoRA, section 4.1).

    It depends on ``seed`` and ``name`` alone, so every rank at every world size draws the same.
    """
    value = torch.zeros(shape)
    if ".lora_A." in name:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def merged_weight(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """``W + s * B A`` in fp32, whatever the inputs' dtype. Shapes: W [out, in], A [rank, in], B [out, rank]."""
    return torch.addmm(base.float(), b.float(), a.float(), alpha=scaling)


def bases(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name of a weight -> its fp32 base, where the weight holds W + s B A (`LoraLinear.keep_base`)."""
    return {canonical_name(f"{path}.weight"): m.base for path, m in module.named_modules()
            if isinstance(m, LoraLinear) and m.base is not None}
