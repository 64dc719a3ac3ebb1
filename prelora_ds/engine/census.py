"""Live bytes by owner, counted from the tensors that exist. Shares no code with the prediction in cost/bytes.py."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from prelora_ds.engine.build import Engine
from prelora_ds.engine.state import EngineState
from prelora_ds.model.adapters import folded_bases

T = TypeVar("T")

OWNERS = ("weights", "gradients", "masters", "moments", "buffers", "host", "state", "other")


def census(engine: Engine | None = None, state: EngineState | None = None) -> dict[str, int]:
    """Bytes of all live tensor storages of this process, by owner; each storage counts once.

    weights: the module's parameters and their 16-bit flat buffers, gradients: everything gradients are kept in,
    masters, moments: the optimizer's fp32 copies, buffers: communication and staging, host: fp32 values of what is
    frozen (`Engine.parked`), state: an exported state on the
    host, other: the rest.
    """
    owner_of: dict[int, str] = {}
    for owner, tensors in _owned(engine, state):
        for t in tensors:
            owner_of.setdefault(t.untyped_storage()._cdata, owner)
    count = dict.fromkeys(OWNERS, 0)
    for key, nbytes in live_storages().items():
        count[owner_of.get(key, "other")] += nbytes
    return count


def live_storages() -> dict[int, int]:
    """Address of each live storage -> its bytes. Tensors on the meta device and fake ones hold none."""
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at deprecated module attributes warns
        objects = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    for t in objects:
        if t.device.type != "meta" and t.layout is torch.strided:
            storage = t.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def settled(count: Callable[[], T], done: Callable[[T], bool], seconds: float = 5.0) -> T:
    """``count()`` as soon as it is ``done``, or its last value after ``seconds``.

    A thread of gloo drops the tensors of a collective a moment after its wait() has returned, so bytes counted right
    behind one may still hold its buffer; what is leaked stays for longer than that.
    """
    deadline = time.monotonic() + seconds
    while not done(value := count()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def peak_rss_bytes() -> int:
    """The process's peak resident set (VmHWM)."""
    return _status_bytes("VmHWM")


def rss_bytes() -> int:
    """The process's resident set now."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _owned(engine: Engine | None, state: EngineState | None) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
    if state is not None:
        yield "state", [t for s in state.slices.values() for t in (s.value, *s.moments.values())]
    if engine is None or engine.ds is None:
        return
    yield "host", [s.value for s in engine.parked.values()]
    optimizer: Any = engine.ds.optimizer
    inner: Any = optimizer.optimizer
    stepped = [p for group in inner.param_groups for p in group["params"]]
    stepped += list(_tensors(getattr(optimizer, "fp32_partitioned_groups_flat", ())))  # ZeRO-3 lends them per step
    params = list(engine.module.parameters())
    yield "moments", _tensors([inner.state])
    yield "masters", stepped
    yield "gradients", [p.grad for p in (*stepped, *params) if p.grad is not None]
    yield "gradients", _attributes(optimizer, "averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer",
                                   "fp32_groups_gradients_flat", "accumulated_grads_in_cpu", "previous_reduced_grads",
                                   "_preflattened_grad_buffers", "offload_gradient_dict")
    yield "gradients", [g for p in params if (g := getattr(p, "grad_accum", None)) is not None]
    yield "weights", params
    yield "weights", [p.ds_tensor for p in params if hasattr(p, "ds_tensor")]
    yield "weights", _attributes(optimizer, "bit16_groups_flat", "bf16_groups_flat", "lp_param_buffer")
    yield "weights", engine.module.buffers()
    yield "weights", folded_bases(engine.module).values()
    yield "buffers", _attributes(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups",
                                 "temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload")
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        yield "buffers", _tensors([bucket.buffer])


def _attributes(holder: object, *names: str) -> Iterator[torch.Tensor]:
    return _tensors([getattr(holder, name, None) for name in names])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def engine_storages(engine: Engine) -> dict[int, int]:
    """Address -> bytes of every storage that ``engine`` owns now; what is parked outlives it."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for owner, tensors in _owned(engine, None) if owner != "host" for t in tensors}
