"""`prelora plan`: what a recipe would need and take on a machine that need not be there. Every figure is predicted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prelora_ds.configuring import check_world, read_calibration
from prelora_ds.core import costs
from prelora_ds.core.config import Config, ZeroSettings
from prelora_ds.core.fields import parse_seconds
from prelora_ds.core.fitting import USABLE, reuse_distance, setting, settings
from prelora_ds.core.plan import Layout, Phase, Plan, full_plan, lora_plan, warmup_plan
from prelora_ds.core.schedule import Timeline
from prelora_ds.core.timing import GPUS, INTER_GB_S, LINK_EFFICIENCY, Rates, data_sheet_rates
from prelora_ds.data.manifest import MANIFEST_NAME, Manifest
from prelora_ds.errors import ConfigError
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model

IMAGENET_IMAGES, IMAGENET_LABELS = 1_281_167, 1000
ASSUMED = "assumed, as of ImageNet-1k: data.train has no manifest here"
OWNERS = ("weights", "gradients", "masters", "moments", "buckets", "activations")
NOTES = (
    "all figures are predicted; bytes are of one rank: states at the end of backward, activations when it begins",
    "peak: the larger of the two moments, with staging copies and gathered weights; it fits if it takes at most "
    f"{USABLE:.0%} of the memory",
    "step: computing, optimizer and communication one after another; without loading, evaluation and checkpoints",
    "jobs: of the walltime, one after another, without waiting, start-up and steps that are done again",
)


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


def predict_run(config: Config, cluster: Cluster, *, walltime_s: float | None = None, images: int | None = None,
                mean_rank: int = 30, calibration: Path | None = None) -> dict[str, Any]:
    """Bytes, step and epoch seconds per ZeRO stage and phase, and hours and jobs of the run, as JSON.

    ``images`` and the number of classes come from the manifest in ``data.train`` where there is one,
    for shards without one from `data.samples_per_epoch` and ``data.val``; else they are ImageNet-1k's.
    ``images_from`` and ``labels_from`` of the result tell which. Every adapter has ``mean_rank``.
    Seconds and what fits are None where nothing is known of the machine.

    Raises ConfigError for a batch that does not divide, an unknown GPU, a bad calibration, or a model
    that is not a ViT.
    """
    if config.model.factory is not None:
        raise ConfigError("model.factory", config.model.factory, "only the costs of the ViT are known",
                          "plan a recipe without model.factory")
    world = cluster.world_size
    check_world(config, world)
    rates, memory_gib = _machine(cluster, calibration)
    images, images_from, labels, labels_from = _data(config, images)
    with torch.device("meta"):
        layout = find_layout(build_model(config.model, labels), config.lora.families)
    accum = config.grad_accum_steps(world)
    timeline = Timeline(images, config.train.global_batch_size, config.train.duration)
    rows, runs = [], []
    for zero in _settings(config, accum):
        own = [_row(config, plan, layout, zero, cluster, rates, memory_gib, images)
               for plan in _plans(config, layout, mean_rank)]
        rows += own
        if rates is not None:
            runs.append(_run(config, zero, own, timeline, walltime_s))
    return {"predicted": True, "recipe": config.run.name, **asdict(cluster), "world_size": world, "images": images,
            "images_from": images_from, "labels": labels, "labels_from": labels_from, "mean_rank": mean_rank,
            "micro_batch_size": config.train.micro_batch_size, "grad_accum_steps": accum,
            "walltime_s": walltime_s, "memory_gib": memory_gib,
            "rates": rates and asdict(rates), "rows": rows, "runs": runs, "notes": list(NOTES)}


def _data(config: Config, images: int | None) -> tuple[int, str, int, str]:
    """Images of an epoch and number of classes, each with where it is from, in words."""
    data, number_from, labels, labels_from = config.data, "--images", IMAGENET_LABELS, ASSUMED
    if images is None:
        images, number_from = IMAGENET_IMAGES, ASSUMED
        if data.samples_per_epoch is not None:
            images, number_from = data.samples_per_epoch, "data.samples_per_epoch"
    for key, folder in (("data.val", data.val), ("data.train", data.train)):  # the latter counts
        if (Path(folder) / MANIFEST_NAME).is_file():
            found = Manifest.load(folder, key)
            labels, labels_from = len(found.classes), f"{key} = {folder}"
            if key == "data.train" and number_from == ASSUMED:
                images, number_from = len(found), labels_from
    return images, number_from, labels, labels_from


def fastest_images_per_s(config: Config, ranks_per_host: int, world_size: int, gpu: str | None) -> float | None:
    """Images a second that one rank takes in its fastest phase, as predicted for ``gpu``, a key of `GPUS`.

    None without one, for a model that is no ViT, and for hosts that differ in ranks.
    """
    if gpu is None or config.model.factory is not None or world_size % ranks_per_host:
        return None
    cluster = Cluster(world_size // ranks_per_host, ranks_per_host, gpu)
    rows = predict_run(config, cluster)["rows"]
    step_s = min(row["step_s"] for row in rows if (zero := config.for_phase(row["phase"]).zero)
                 and (row["stage"], row["offload_optimizer"]) == (zero.stage, zero.offload_optimizer))
    return config.train.global_batch_size / world_size / float(step_s)


def parse_walltime(text: str) -> float:
    """Seconds of ``6h``, ``90m`` or ``06:00:00``; raises ConfigError."""
    try:
        return parse_seconds(text)
    except ValueError as exc:
        raise ConfigError("--walltime", text, "is no walltime", "write 6h, 90m or 06:00:00") from exc


def print_plan(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `predict_run` returned."""
    console = console or Console(width=150)
    unit, factor = ("GiB", 2**30) if max(row["peak_bytes"] for row in result["rows"]) > 2**28 else ("MiB", 2**20)
    table = Table(title=escape(f"{result['recipe']}, predicted: {result['hosts']} x {result['gpus_per_host']} "
                               f"{result['gpu']}, micro-batch {result['micro_batch_size']} x "
                               f"{result['grad_accum_steps']}, LoRA rank {result['mean_rank']}; {unit} a rank"))
    for column in ("ZeRO", "phase", *OWNERS, "peak", "fits", "largest batch", "step, ms", "epoch, min"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in result["rows"]:
        table.add_row(_stage(row), row["phase"], *(f"{row[f'{c}_bytes'] / factor:.2f}" for c in (*OWNERS, "peak")),
                      {True: "yes", False: "no", None: "-"}[row["fits"]],
                      "-" if row["largest_micro_batch"] is None else str(row["largest_micro_batch"]),
                      *("-" if row[key] is None else f"{row[key] * per_unit:.1f}"
                        for key, per_unit in (("step_s", 1e3), ("epoch_s", 1 / 60))))
    console.print(table)
    for run in result["runs"]:
        console.print(f"ZeRO {_stage(run)}: " + "; ".join(_sentence(name, run[name]) for name in ("earliest", "never")
                                                          if run[name]), highlight=False)
    for line in (f"images of an epoch: {result['images']:,} ({result['images_from']})",
                 f"classes: {result['labels']:,} ({result['labels_from']})"):
        console.print(line, highlight=False, markup=False)
    rates = result["rates"]
    source = rates["source"] if rates else "nothing is known of this machine: calibrate it (prelora_ds.calibrate)"
    for line in (f"time: {source}", *result["notes"]):
        console.print(line, highlight=False, markup=False)


def _machine(cluster: Cluster, calibration: Path | None) -> tuple[Rates | None, float | None]:
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


def _settings(config: Config, accum: int) -> Iterator[ZeroSettings]:
    """All stages that can train this recipe, and the configured one with offload if it has that."""
    for stage in range(4):
        if not (stage == 0 and accum > 1) and not (stage == 3 and config.lora.mode == "merged"):
            yield replace(config.zero, stage=stage, offload_optimizer=False)
    if config.zero.offload_optimizer:
        yield config.zero


def _plans(config: Config, layout: Layout, rank: int) -> list[Plan]:
    full = full_plan(layout, init_seed=0)
    if config.convergence is None:
        return [full]
    warmup = warmup_plan(layout, {family: dict.fromkeys(layers, rank) for family, layers in layout.targets.items()},
                         alpha_over_r=config.lora.alpha_over_r, init_seed=0, since_step=0,
                         train_a=config.lora.mode != "fa")
    return [full, warmup, lora_plan(layout, warmup, train_rest=config.lora.train_rest, since_step=0)]


def _row(config: Config, plan: Plan, layout: Layout, zero: ZeroSettings, cluster: Cluster, rates: Rates | None,
         memory_gib: float | None, images: int) -> dict[str, Any]:
    config = config.for_phase(plan.phase)
    world, batch, micro = cluster.world_size, config.train.global_batch_size, config.train.micro_batch_size
    image = costs.micro_batch(config.model, plan, layout, 1, mode=config.lora_mode(zero.stage))
    own, every = setting(config, plan, layout, zero, world, micro), settings(config, plan, layout, zero, world)
    step_s = rates and rates.step_seconds(own.work, cluster.gpus_per_host)
    extra = costs.buckets_bytes(plan, layout, zero) + costs.gathered_bytes(plan, layout, zero,
                                                                           reuse_distance=reuse_distance(config))
    return {"stage": zero.stage, "offload_optimizer": zero.offload_optimizer, "phase": plan.phase.value,
            **{f"{owner}_bytes": getattr(own.states, owner)
               for owner in ("weights", "gradients", "masters", "moments")},
            "buckets_bytes": own.states.buffers + extra, "activations_bytes": micro * image.saved_bytes,
            "peak_bytes": own.peak_bytes, "fits": None if memory_gib is None else own.fits(memory_gib),
            "largest_micro_batch": memory_gib and max((s.micro_batch_size for s in every if s.fits(memory_gib)),
                                                      default=0),
            "step_s": step_s, "epoch_s": step_s and step_s * images / batch,
            "wire_bytes": int(own.work.wire_gb * 1e9), "gflop_per_image": image.flops / 1e9}


def _run(config: Config, zero: ZeroSettings, rows: list[dict[str, Any]], timeline: Timeline,
         walltime_s: float | None) -> dict[str, Any]:
    step_s = {row["phase"]: row["step_s"] for row in rows}

    def entry(steps: dict[Phase, int]) -> dict[str, Any]:
        seconds = sum(step_s[phase] * count for phase, count in steps.items())
        return {"steps": steps, "hours": seconds / 3600, "jobs": walltime_s and math.ceil(seconds / walltime_s)}

    return {"stage": zero.stage, "offload_optimizer": zero.offload_optimizer,
            "earliest": config.convergence and entry(_earliest(config, timeline)),
            "never": entry({Phase.FULL: timeline.total_steps})}


def _earliest(config: Config, timeline: Timeline) -> dict[Phase, int]:
    """Steps of each phase when Algorithm 1 passes at its first test."""
    assert config.convergence is not None
    c, total = config.convergence, timeline.total_steps
    ticks = sorted(timeline.ticks(c.every))
    warm = ticks[c.k * c.m - 1] if len(ticks) >= c.k * c.m else total
    due = max(warm + 1, timeline.step_after(warm, config.lora.warmup))
    lora = next((tick for tick in ticks if tick >= due), total)
    return {Phase.FULL: warm, Phase.WARMUP: lora - warm, Phase.LORA: total - lora}


def _stage(row: dict[str, Any]) -> str:
    return f"{row['stage']}{' offload' if row['offload_optimizer'] else ''}"


def _sentence(name: str, run: dict[str, Any]) -> str:
    jobs = "" if run["jobs"] is None else f", {run['jobs']} jobs"
    return {"earliest": "switching as early as Algorithm 1 can", "never": "never switching"}[name] + (
        f" {run['hours']:.3g} h{jobs}")
