"""Giving an engine's memory back. DeepSpeed's own `destroy()` frees nothing while the module lives."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from prelora_ds.engine.build import Engine


def release(engine: Engine) -> None:
    """Free everything ``engine`` holds; afterwards its ``ds`` is None.

    Raises RuntimeError when the DeepSpeed engine survives: a switch that does not free is a lie. What must be undone,
    seen in DeepSpeed 0.19: two forward hooks on the module hold the engine; at stage 3 so do an attribute on every
    parameter, a module-global stack and a class-level cache. And a late ``__del__`` would run destroy() a second time,
    on mappings that a newer engine owns, so the engine must be dead before the next one is built.
    """
    ds, engine.ds = engine.ds, None
    ds.module_forward_pre_hook.remove()
    ds.module_forward_post_hook.remove()
    for p in ds.module.parameters():
        p.grad = None
        for attribute in ("_z3_optimizer", "_hp_mapping", "_zero_optimizer"):
            if hasattr(p, attribute):
                setattr(p, attribute, None)
    ds.destroy()
    ds.optimizer.optimizer.state.clear()
    ds.optimizer.optimizer.param_groups.clear()
    ds.optimizer, ds.basic_optimizer, ds.client_optimizer = None, None, None
    parameter_offload.FWD_MODULE_STACK.clear()
    # The cache of this method keeps the coordinator, and so the module, alive.
    clear_cache(PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release)
    dead = weakref.ref(ds)
    del ds, p
    trim_memory()
    if dead() is not None:
        holders = sorted({type(r).__name__ for r in gc.get_referrers(dead())})
        raise RuntimeError(f"the old DeepSpeed engine is still referenced, by: {', '.join(holders)}")


def clear_cache(method: Any) -> None:
    """Clear the functools.lru_cache of ``method``, which a decorator may hide in its closure.

    Raises RuntimeError for a method without a cache, which is another version of DeepSpeed than this module knows.
    """
    cells = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
    cached = next((function for function in (method, *cells) if hasattr(function, "cache_clear")), None)
    if cached is None:
        raise RuntimeError(f"DeepSpeed {deepspeed.__version__} is not known to release.py: {method.__qualname__} has "
                           "no cache to clear")
    cached.cache_clear()


def trim_memory() -> None:
    """Collect cycles and hand free pages back to the system (glibc keeps them) and to the device."""
    # One collection is not enough: a tensor that one of torch's C++ nodes holds is freed by the one after the node's.
    # Whether there is such a tensor depends on when Python collected by itself.
    while gc.collect():
        pass
    if torch.cuda.is_available():
        get_accelerator().empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:  # not glibc: nothing to trim
        return
