"""What is known of a machine: the memory of its devices, and how fast they compute and talk."""

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


@dataclass(frozen=True)
class Cluster:
    """Where the run would be. gpu: a key of `GPUS`, or CPU; bandwidths in GB/s: of a GPU to the others of its host,
    and of a host to the others."""

    hosts: int
    gpus_per_host: int
    gpu: str
    intra_gb_s: float | None = None
    inter_gb_s: float | None = None

    @property
    def world_size(self) -> int:
        return self.hosts * self.gpus_per_host


def rates_and_memory(cluster: Cluster, calibration: Path | None) -> tuple[Rates | None, float | None]:
    """The rates of a device of ``cluster`` and its GiB of memory, each None where it is not known.

    calibration: a file that `prelora calibrate` wrote. Raises ConfigError for a GPU that is not in
    `GPUS`, and for a file that is not a calibration.
    """
    if cluster.gpu != "CPU" and cluster.gpu not in GPUS:
        near = difflib.get_close_matches(cluster.gpu, GPUS, n=1)
        raise ConfigError("--gpu", cluster.gpu, "unknown",
                          f"did you mean {near[0]}?" if near else f"choose among {', '.join([*GPUS, 'CPU'])}")
    sheet = GPUS.get(cluster.gpu)
    memory = sheet.memory_gib if sheet else None
    if calibration is None:
        return (data_sheet_rates(cluster.gpu, hosts=cluster.hosts, intra_gb_s=cluster.intra_gb_s,
                                 inter_gb_s=cluster.inter_gb_s) if sheet else None), memory
    rates, calibrated_gib = read_calibration(calibration, "--calibration")
    memory = memory or calibrated_gib
    link = cluster.intra_gb_s if cluster.hosts == 1 else cluster.inter_gb_s or INTER_GB_S
    if link:  # a calibration on one host has not seen this link
        rates = replace(rates, seconds={**rates.seconds, "wire_gb": 1 / (link * LINK_EFFICIENCY)},
                        source=f"{rates.source}; {LINK_EFFICIENCY:.0%} of {link:g} GB/s between ranks (assumed)")
    return rates, memory


def read_calibration(path: Path, key: str) -> tuple[Rates, float]:
    """Rates, and GiB of memory of a rank, that `prelora calibrate` wrote to ``path``; raises ConfigError."""
    try:
        content = read_json(path.read_text(encoding="utf-8"))
        rates = TypeAdapter(Rates).validate_json(json.dumps(content["rates"]), strict=True)
        memory_gib = TypeAdapter(float).validate_python(content["memory_gib"], strict=True)
        wrong = [kind for kind in KINDS if not 0 <= rates.seconds[kind] < math.inf]
        if wrong or not 0 < memory_gib < math.inf or not 0 < rates.sharing < math.inf:
            raise ValueError(f"{wrong[0] if wrong else 'memory_gib or sharing'} is not a figure of a machine")
        return rates, memory_gib
    except (OSError, ValueError, KeyError, TypeError) as exc:
        problem = str(exc).splitlines()[0] if isinstance(exc, ValueError | OSError) else repr(exc)
        raise ConfigError(key, str(path), f"is not a calibration: {problem}",
                          "write one with `prelora calibrate`") from exc
