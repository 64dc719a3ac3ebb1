"""Count live bytes by owner, from the tensors that exist.

This module shares no code with the prediction in cost/bytes.py, so the two check each other. It
knows the buffers of DeepSpeed 0.19's optimizers by attribute name (`_owned`); a buffer that it does
not know is counted as "other".
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from prelora_ds.engine.engine import Engine
from prelora_ds.engine.state import EngineState
from prelora_ds.model.adapters import besides_leaves

T = TypeVar("T")

OWNERS = ("weights", "gradients", "masters", "moments", "buffers", "host", "state", "other")


def census(engine: Engine | None = None, state: EngineState | None = None) -> dict[str, int]:
    """Return the bytes of all live tensor storages of this process by owner; each counts once.

    weights: the module's parameters and buffers, their 16-bit flat buffers, and what adapters keep
        besides their leaves, such as the fp32 weights of merged linears.
    gradients: everything that gradients are kept in.
    masters: the fp32 copies that the optimizer updates.
    moments: the Adam moments.
    buffers: buffers for communication and staging.
    host: fp32 values of frozen parameters (`Engine.parked`).
    state: an exported state on the host.
    other: everything else.
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
    """Return address -> bytes of each live storage, without meta and fake tensors."""
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inspecting deprecated module attributes warns
        objects = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    for t in objects:
        if t.device.type != "meta" and t.layout is torch.strided:
            storage = t.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return storages


def wait_until(count: Callable[[], T], done: Callable[[T], bool], seconds: float = 5.0) -> T:
    """Call ``count()`` until ``done`` accepts its value, or for ``seconds``; return the last value.

    A gloo thread releases the tensors of a collective shortly after its wait() has returned, so a
    single count may include them. A real leak persists.
    """
    deadline = time.monotonic() + seconds
    while not done(value := count()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def peak_rss_bytes() -> int:
    """Return the peak resident set of this process (VmHWM)."""
    return _status_bytes("VmHWM")


class PeakMemory:
    """The peaks of this process's resident memory and of its memory on the accelerator, since `restart` and in all."""

    def __init__(self) -> None:
        self._before = 0

    def restart(self) -> None:
        """Measure from now on. Where the kernel does not allow that, the resident peak goes on from the start."""
        self._before = self.rss_bytes()
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM: proc(5)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def rss_bytes(self) -> int:
        """Return the resident peak of the whole process."""
        return max(self._before, peak_rss_bytes())

    def columns(self) -> dict[str, float]:
        """Return the peaks since `restart` in GiB, as columns of a row; ``device_peak_gib`` only with a GPU."""
        columns = {"peak_gib": peak_rss_bytes() / 2**30}
        if torch.cuda.is_available():
            columns["device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return columns


def rss_bytes() -> int:
    """Return the current resident set of this process (VmRSS)."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _owned(
    engine: Engine | None, state: EngineState | None
) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
    """Yield (owner, tensors). A tensor may come under several owners; the first one counts."""
    if state is not None:
        yield "state", [t for s in state.slices.values() for t in (s.value, *s.moments.values())]
    if engine is None or engine.ds is None:
        return
    yield "host", [s.value for s in engine.parked.values()]
    optimizer: Any = engine.ds.optimizer
    inner: Any = optimizer.optimizer
    stepped = [p for group in inner.param_groups for p in group["params"]]
    # ZeRO-3 hands its masters to the inner optimizer only during a step.
    stepped += list(_tensors(getattr(optimizer, "fp32_partitioned_groups_flat", ())))
    params = list(engine.module.parameters())

    yield "moments", _tensors([inner.state])
    yield "masters", stepped
    yield "gradients", [p.grad for p in (*stepped, *params) if p.grad is not None]
    yield (
        "gradients",
        _attributes(
            optimizer,
            "averaged_gradients",
            "all_grad_tensors",
            "grad_partitions_flat_buffer",
            "fp32_groups_gradients_flat",
            "accumulated_grads_in_cpu",
            "previous_reduced_grads",
            "_preflattened_grad_buffers",
            "offload_gradient_dict",
        ),
    )
    yield "gradients", [g for p in params if (g := getattr(p, "grad_accum", None)) is not None]

    yield "weights", params
    yield "weights", [p.ds_tensor for p in params if hasattr(p, "ds_tensor")]
    yield (
        "weights",
        _attributes(optimizer, "bit16_groups_flat", "bf16_groups_flat", "lp_param_buffer"),
    )
    yield "weights", engine.module.buffers()
    yield "weights", besides_leaves(engine.module)

    yield (
        "buffers",
        _attributes(
            optimizer,
            "param_buffer_of_bit16_for_cpu_offload_groups",
            "temp_grad_buffer_for_cpu_offload",
            "temp_grad_buffer_for_gpu_offload",
        ),
    )
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        yield "buffers", _tensors([bucket.buffer])


def _attributes(holder: object, *names: str) -> Iterator[torch.Tensor]:
    return _tensors([getattr(holder, name, None) for name in names])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def engine_storages(engine: Engine) -> dict[int, int]:
    """Return address -> bytes of each storage that a release of ``engine`` must free.

    Parked values are not included: they outlive the engine.
    """
    return {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for owner, tensors in _owned(engine, None)
        if owner != "host"
        for t in tensors
    }
