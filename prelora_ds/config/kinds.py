"""A recipe with adapters of another kind."""

from __future__ import annotations

from typing import Any

from prelora_ds.config.adapters import check_kind
from prelora_ds.config.fields import FieldError
from prelora_ds.config.load import validate
from prelora_ds.config.tree import Config
from prelora_ds.core.adapters import KINDS
from prelora_ds.core.plan import ADAPTERS, BASE
from prelora_ds.errors import ConfigError


def with_kind(config: Config, kind: str, rank: int) -> Config:
    """Return ``config`` with new adapters of ``kind``, whose options have their defaults.

    A preset becomes a list of phases. Settings that other kinds do not have are left out.

    rank: the rank of all adapters where a rule would give each its own, if the kind cannot have that. A rank that is
        the size of blocks becomes the next smaller power of two.

    Raises ConfigError if there is no such kind, or if its adapters cannot be what the recipe wants of them.
    """
    try:
        check_kind(kind)
    except FieldError as exc:
        known = ", ".join(KINDS)
        raise ConfigError("kind", kind, str(exc), exc.remedy or f"choose among {known}") from exc
    values = config.model_dump(mode="json")
    phases = [phase.model_dump(mode="json") for phase in config.phase_list]
    for phase in phases:
        _change(phase, kind, rank)
    return validate({**values, "phases": phases, "convergence": None, "lora": None}, f"the recipe with {kind}")


def _change(phase: dict[str, Any], kind: str, rank: int) -> None:
    can = KINDS[kind].can
    adapters = phase["adapters"]
    if isinstance(phase["lr_scale"], dict):
        roles = (BASE, ADAPTERS, *KINDS[kind].roles())
        phase["lr_scale"] = {role: factor for role, factor in phase["lr_scale"].items() if role in roles}
    if not isinstance(adapters, dict):
        return
    if adapters["mode"] not in can.kernels:
        adapters["mode"] = "auto"
    if not can.dropout:
        adapters["dropout"] = 0.0
    if adapters["from"] == "keep":
        return
    adapters |= {"kind": kind, "options": {}}
    if not can.scaled:
        adapters |= {"alpha_over_r": 1.0, "rs_alpha": None}
    if not can.ranked:
        adapters |= {"ranks": None, "rank": None}
    elif adapters["ranks"] is not None and not can.rank_per_module:
        adapters |= {"ranks": None, "rank": rank}
    if can.blocks:  # of a size that divides the widths of most models
        adapters["rank"] = max(2, 1 << adapters["rank"].bit_length() - 1)
