"""Free an engine's memory. DeepSpeed's own `destroy()` frees nothing while the module lives."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from prelora_ds.engine.engine import Engine


def release(engine: Engine) -> None:
    """Free everything that ``engine`` holds; afterwards its ``ds`` is None.

    Raises RuntimeError if the DeepSpeed engine survives: a switch must free the old engine.

    In DeepSpeed 0.19 an engine is kept alive by two forward hooks on its module (runtime/engine.py,
    _create_module_forward_pre_hook and _create_module_forward_post_hook). At stage 3 it is also
    kept alive by an attribute of every parameter (`_z3_optimizer`), a global stack
    (FWD_MODULE_STACK in runtime/zero/parameter_offload.py) and a cache of a class
    (PartitionedParameterCoordinator.__params_to_release). All of them are cleared here.

    The engine must be dead before the next one is built: a late ``DeepSpeedEngine.__del__`` would
    run destroy() a second time, on mappings that a newer engine owns.

    The next engine must also compute as in a new process, so torch's own linear is put back.
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
    restore_linear()
    dead = weakref.ref(ds)
    del ds, p
    trim_memory()
    if dead() is not None:
        holders = sorted({type(r).__name__ for r in gc.get_referrers(dead())})
        raise RuntimeError(
            f"the old DeepSpeed engine is still referenced, by: {', '.join(holders)}"
        )


def restore_linear() -> None:
    """Put back torch's own ``torch.nn.functional.linear``.

    An engine at ZeRO stage 3 replaces it in DeepSpeed 0.19, for the whole process, by a function
    that rounds differently (runtime/zero/partition_parameters.py, _enable_mem_efficient_linear).
    """
    original = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None:
        torch.nn.functional.linear = original


def clear_cache(method: Any) -> None:
    """Clear the functools.lru_cache of ``method``, which a decorator may hide in its closure.

    Raises RuntimeError if ``method`` has no cache: this version of DeepSpeed is then not supported.
    """
    cells = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
    cached = next(
        (function for function in (method, *cells) if hasattr(function, "cache_clear")), None
    )
    if cached is None:
        raise RuntimeError(
            f"release.py does not support DeepSpeed {deepspeed.__version__}: "
            f"{method.__qualname__} has no cache to clear"
        )
    cached.cache_clear()


def trim_memory() -> None:
    """Collect reference cycles, and return free memory to the system and the device.

    glibc would otherwise keep free pages.
    """
    # Repeat until nothing is collected: a tensor held by a C++ autograd node is freed only in the
    # pass after the one that frees the node.
    while gc.collect():
        pass
    if torch.cuda.is_available():
        get_accelerator().empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:  # not glibc: nothing to trim
        return
