"""The process group and the device of this rank."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch

from prelora_ds.accelerator import choose_accelerator, gpu_free_gib, take_gpu
from prelora_ds.cost.machines import GPU_RESERVED_GIB
from prelora_ds.errors import ConfigError
from prelora_ds.model.products import lacks_bf16_products, multiply_in_fp32

T = TypeVar("T")

GPU_RANK_THREADS = 8  # at most, of a rank that computes on a GPU


def check_zero_config(zero: dict[str, Any]) -> None:
    """Let DeepSpeed validate the keys and values of ``zero_optimization``. Raises ConfigError."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as exc:
        error = exc.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *error["loc"])))
        raise ConfigError(
            key, error["input"], f"DeepSpeed rejects it: {error['msg']}", "fix the DeepSpeed config"
        ) from exc


def init_process_group(timeout_s: float = 1800.0, *, deterministic: bool = False) -> None:
    """Create the default process group from the launcher's environment variables.

    These are RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Does nothing if the group
    exists. On a CPU the backend is gloo, and the JIT build of DeepSpeed 0.19's shared-memory
    collectives (over 90 s on every node at first use) is skipped, because gloo does the same work.
    A CPU without instructions for BF16 multiplies in fp32 from here on (see `model.products`).

    deterministic: see `compute_deterministically`, which applies to a group that exists as well.

    Raises ConfigError if one of the variables is not set, if there is a GPU that torch cannot use, and if there are
    fewer GPUs than ranks on this host.
    """
    choose_accelerator()
    if deterministic:
        compute_deterministically()
    import deepspeed
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    if comm.is_initialized():
        return
    required = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in required if name not in os.environ]
    if missing:
        raise ConfigError(
            "environment",
            ", ".join(missing),
            "not set: this process was not started by a launcher",
            "start it with a launcher, such as `deepspeed launch/pretrain.py ...`",
        )

    # DeepSpeed 0.19 calls collectives by names that torch 2.14 deprecates: one warning per call
    # would flood the log.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
    )
    if get_accelerator().device_name() == "cpu":
        if lacks_bf16_products():
            multiply_in_fp32()
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        take_gpu(int(os.environ["LOCAL_RANK"]))
    if "OMP_NUM_THREADS" not in os.environ:
        # By default every rank would use all cores, and the ranks of a host would spend their time
        # waiting for each other. Beside a GPU only checkpoints compute here, and data workers need the cores.
        share = max(1, len(os.sched_getaffinity(0)) // local_world_size())
        torch.set_num_threads(share if get_accelerator().device_name() == "cpu" else min(share, GPU_RANK_THREADS))
    comm.init_distributed(
        auto_mpi_discovery=False, timeout=timedelta(seconds=timeout_s), verbose=False
    )


def compute_deterministically() -> None:
    """Let this process use only kernels that give the same bits in every run; torch raises where it has none.

    On a GPU the gradients of attention and of convolutions are otherwise summed in an order that varies. cuBLAS reads
    its variable when it computes its first product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    switches: Any = torch.utils.deterministic
    switches.fill_uninitialized_memory = False  # nothing reads such memory, and filling takes time


def share_timeout() -> None:
    """Give every process group the timeout of the default one.

    DeepSpeed 0.19 makes its own groups without a timeout (comm/torch.py, new_group). With NCCL torch's is then 10
    minutes, and its watchdog would abort a rank that hangs before the guard can say where.
    """
    if torch.distributed.get_backend() not in ("gloo", "nccl"):
        return  # torch's fake group never waits
    world = torch.distributed.distributed_c10d._get_default_group()
    timeout = world._get_backend(device()).options._timeout
    for group in torch.distributed.distributed_c10d._world.pg_map:
        torch.distributed.set_timeout(timeout, group)


def local_world_size() -> int:
    """Return the number of ranks on this host, or 1 if the launcher does not provide it."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def rank_memory_gib(ranks_per_host: int) -> float:
    """Return the GiB that a model can have: of this rank's GPU, or without one of its share of the host's memory.

    Of a GPU it is what no other process holds, without `GPU_RESERVED_GIB`.
    """
    gpu_gib = gpu_free_gib()
    if gpu_gib is not None:
        return gpu_gib - GPU_RESERVED_GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / ranks_per_host


def freeze_imports() -> None:
    """Exclude all current objects from garbage collection.

    Switches and censuses then need not scan imported modules. Call it after all imports and before
    a model is built, because the census does not see frozen tensors.
    """
    gc.collect()
    gc.freeze()


def on_rank_0(decide: Callable[[], T]) -> T:
    """Call ``decide`` on rank 0 and return its result on all ranks. Collective.

    An exception of ``decide`` is raised on all ranks: raised on rank 0 only, it would leave the
    others waiting in the broadcast.
    """
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as exc:
            outcome[1] = exc
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    decision: T = outcome[0]
    return decision


def on_all_ranks(act: Callable[[], T]) -> T:
    """Call ``act`` on every rank, and return this rank's result. Collective.

    If it raises on some ranks, every rank raises: raised on some only, the error would leave the others waiting in the
    next collective. The others raise the same ConfigError, or for another error a RuntimeError with its text.
    """
    outcome: T | None = None
    error: Exception | None = None
    try:
        outcome = act()
    except Exception as exc:
        error = exc
    errors: list[Any] = [None] * torch.distributed.get_world_size()
    shown = error if isinstance(error, ConfigError) or error is None else f"{type(error).__name__}: {error}"
    torch.distributed.all_gather_object(errors, shown)
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if isinstance(other, ConfigError):
            raise other
        if other is not None:
            raise RuntimeError(f"rank {rank} failed: {other}")
    result: Any = outcome
    return cast(T, result)


def device() -> torch.device:
    """Return this rank's device."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def synchronize() -> None:
    """Wait for the device's queued work; does nothing on a CPU."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()
