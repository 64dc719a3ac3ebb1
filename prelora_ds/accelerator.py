"""The GPU of this process: whether torch can use one, which one is the rank's, and how much memory it has.

Nothing here imports DeepSpeed, which chooses its accelerator when it is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from prelora_ds.errors import ConfigError

# What the drivers of NVIDIA and AMD create below /dev.
GPU_FILES = ("nvidiactl", "kfd")
# What Slurm sets in a job or step that has been given GPUs. (CUDA_VISIBLE_DEVICES says nothing: DeepSpeed's launcher
# sets it on a CPU too.)
GPU_VARIABLES = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
HIDING_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# Another process holds memory of the device if less than the total minus this is free. The context of this process
# itself takes about half of it.
CONTEXT_GIB = 1.0


def choose_accelerator(environ: MutableMapping[str, str] = os.environ, dev: Path = Path("/dev")) -> None:
    """Select DeepSpeed's CPU accelerator if there is no GPU; call it before torch looks for one.

    Where DS_ACCELERATOR=cpu selects the CPU, or CUDA_VISIBLE_DEVICES is empty, GPUs are hidden from torch as well:
    pinned memory and random generators would open a context on one.

    Raises ConfigError if there is a GPU that torch cannot use: the run would otherwise be a slow one on the CPU.
    """
    import torch

    if environ.get("DS_ACCELERATOR") == "cpu" or environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        environ["DS_ACCELERATOR"] = "cpu"
        environ.update(dict.fromkeys(HIDING_VARIABLES, ""))
        return
    if torch.cuda.is_available():
        if torch.version.cuda:  # ROCm does not have them
            # Segments that grow lose less memory to fragmentation. Torch reads this at the first allocation.
            environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        return
    signs = signs_of_a_gpu(environ, dev)
    if signs:
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        if not torch.version.cuda and not torch.version.hip:
            built_for = "the CPU"
        driver = driver_version()
        raise ConfigError(
            "accelerator", ", ".join(signs),
            f"there is a GPU here, but torch {torch.__version__}, which is built for {built_for}, cannot use it"
            + (f" (NVIDIA driver {driver})" if driver else ""),
            "install the torch wheel that fits the driver (CUDA 13 needs driver 580 or newer; ROCm has its own index), "
            "ask the batch system for GPUs, or set DS_ACCELERATOR=cpu for a run on the CPU")
    environ.setdefault("DS_ACCELERATOR", "cpu")


def signs_of_a_gpu(environ: MutableMapping[str, str] = os.environ, dev: Path = Path("/dev")) -> list[str]:
    """Return the device files of GPU drivers, and the variables of a batch system that has given out GPUs."""
    files = [str(dev / name) for name in GPU_FILES if (dev / name).exists()]
    return files + [f"{name}={environ[name]}" for name in GPU_VARIABLES if environ.get(name, "0") not in ("", "0")]


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of NVIDIA's kernel driver, or "" without one."""
    try:
        found = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", path.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def gpu_count() -> int:
    """Return the number of GPUs that this process sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_index(local_rank: int, seen: int) -> int:
    """Return the number of a rank's GPU among the ``seen`` ones.

    A launcher that shows each rank only its own GPU shows it as number 0, whatever the local rank.

    Raises ConfigError if there are several GPUs, but not as many as ranks.
    """
    if local_rank < seen:
        return local_rank
    if seen == 1:
        return 0
    raise ConfigError("LOCAL_RANK", local_rank, f"this process sees {seen} GPUs",
                      "start at most as many ranks per host as it has GPUs, or show each rank only its own GPU")


def take_gpu(local_rank: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make the rank's GPU the current device of torch, and tell DeepSpeed; does nothing without a GPU."""
    import torch

    seen = gpu_count()
    if seen:
        index = gpu_index(local_rank, seen)
        torch.cuda.set_device(index)
        tell_deepspeed(index, environ)


def tell_deepspeed(index: int, environ: MutableMapping[str, str]) -> None:
    """Set the local rank in ``environ`` to the number of the rank's GPU.

    DeepSpeed 0.19 takes LOCAL_RANK for that number in several places (comm/torch.py, runtime/engine.py,
    runtime/zero/partition_parameters.py, runtime/zero/utils.py), and asserts that Open MPI's variable is equal.
    """
    environ["LOCAL_RANK"] = str(index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environ:
        environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)


def accelerator_name() -> str | None:
    """Return the name of this rank's GPU from its driver, or None without a GPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def accelerator_fingerprint() -> dict[str, str]:
    """Return what the accelerators of all ranks have in common: their name without the memory, and torch's platform."""
    import torch

    name = accelerator_name()
    if name is None:
        return {"accelerator": "cpu"}
    platform = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return {"accelerator": re.sub(r"[- ]\d+GB\b", "", name), "platform of torch": platform}


def gpu_address() -> str:
    """Return the PCI address of this rank's GPU, by which NCCL tells GPUs apart; "" without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ""
    device: Any = torch.cuda.get_device_properties()  # torch 2.14 does not annotate its address
    return f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}"


def gpu_total_gib() -> float | None:
    """Return the memory of this rank's GPU in GiB; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties().total_memory) / 2**30


def gpu_free_gib() -> float | None:
    """Return the GiB of this rank's GPU that no other process holds; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return left_by_others(free / 2**30, total / 2**30)


def left_by_others(free_gib: float, total_gib: float) -> float:
    """Return ``total_gib`` if nobody else uses the device, otherwise the whole GiB that are free.

    Ranks with equal devices have to come to equal numbers, because `auto` is resolved before they can talk.
    """
    return total_gib if total_gib - free_gib <= CONTEXT_GIB else float(int(free_gib))
