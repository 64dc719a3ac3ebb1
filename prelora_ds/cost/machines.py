"""What is known about a machine: the memory of its devices, and the speed of computing and communication."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from prelora_ds.config.documents import read_json
from prelora_ds.cost.timing import GPUS, INTER_GB_S, KINDS, LINK_EFFICIENCY, Rates, data_sheet_rates
from prelora_ds.errors import ConfigError

# The GiB of a GPU that no model gets: the context, the communicators of NCCL and the workspaces of cuBLAS. It is an
# estimate, and has not been measured.
GPU_RESERVED_GIB = 2.0


@dataclass(frozen=True)
class Cluster:
    """The hosts and devices of a planned run.

    gpu: a key of `GPUS`, or CPU.
    intra_gb_s: GB/s between one GPU and the others of its host.
    inter_gb_s: GB/s between one host and the others.
    """

    hosts: int
    gpus_per_host: int
    gpu: str
    intra_gb_s: float | None = None
    inter_gb_s: float | None = None

    @property
    def world_size(self) -> int:
        return self.hosts * self.gpus_per_host


def rates_and_memory(cluster: Cluster, calibration: Path | None) -> tuple[Rates | None, float | None]:
    """The rates of one device of ``cluster`` and its GiB for a model; each is None if it is not known.

    calibration: a file that `prelora calibrate` wrote.

    Raises ConfigError for a GPU that is not in `GPUS`, and for a file that is not a calibration.
    """
    if cluster.gpu != "CPU" and cluster.gpu not in GPUS:
        near = difflib.get_close_matches(cluster.gpu, GPUS, n=1)
        raise ConfigError("--gpu", cluster.gpu, "is not a known GPU",
                          f"did you mean {near[0]}?" if near else f"choose one of {', '.join([*GPUS, 'CPU'])}")
    sheet = GPUS.get(cluster.gpu)
    memory = sheet.memory_gib - GPU_RESERVED_GIB if sheet else None
    if calibration is None and sheet is None:
        return None, None
    if calibration is None:
        return data_sheet_rates(cluster.gpu, hosts=cluster.hosts, intra_gb_s=cluster.intra_gb_s,
                                inter_gb_s=cluster.inter_gb_s), memory

    rates, calibrated_gib = read_calibration(calibration, "--calibration")
    memory = memory or calibrated_gib
    link = cluster.intra_gb_s if cluster.hosts == 1 else cluster.inter_gb_s or INTER_GB_S
    if link:  # which a calibration on one host did not measure
        rates = replace(rates, seconds={**rates.seconds, "wire_gb": 1 / (link * LINK_EFFICIENCY)},
                        source=f"{rates.source}; {LINK_EFFICIENCY:.0%} of {link:g} GB/s between ranks (assumed)")
    return rates, memory


def read_calibration(path: Path, key: str) -> tuple[Rates, float]:
    """The rates, and the GiB of memory per rank, that `prelora calibrate` wrote to ``path``. Raises ConfigError.

    A kind of work that an older version did not know costs nothing in its files.
    """
    try:
        content = read_json(path.read_text(encoding="utf-8"))
        content["rates"]["seconds"] = {"tensors": 0.0} | content["rates"]["seconds"]
        rates = TypeAdapter(Rates).validate_json(json.dumps(content["rates"]), strict=True)
        memory_gib = TypeAdapter(float).validate_python(content["memory_gib"], strict=True)
        wrong = [kind for kind in KINDS if not 0 <= rates.seconds[kind] < math.inf]
        if wrong or not 0 < memory_gib < math.inf or not 0 < rates.sharing < math.inf:
            raise ValueError(f"{wrong[0] if wrong else 'memory_gib or sharing'} has an impossible value")
        return rates, memory_gib
    except (OSError, ValueError, KeyError, TypeError) as exc:
        problem = repr(exc)
        if isinstance(exc, KeyError):
            problem = f"{exc} is missing"
        elif isinstance(exc, ValueError | OSError):
            problem = str(exc).splitlines()[0]
        raise ConfigError(key, str(path), f"is not a calibration file: {problem}",
                          "write one with `prelora calibrate`") from exc
