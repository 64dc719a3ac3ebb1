"""`prelora plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prelora_ds.commands.options import AsJson, DeepspeedConfig, Overrides, Recipe
from prelora_ds.commands.output import print_json

if TYPE_CHECKING:
    from prelora_ds.config.tree import Config

IMAGENET_IMAGES = 1_281_167
IMAGENET_LABELS = 1000
MEAN_RANK = 30  # for ranks from 8 to 64, as in the benchmarks
ASSUMED = "assumed, as in ImageNet-1k: data.train has no manifest here"


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    deepspeed_config: DeepspeedConfig = None,
    hosts: Annotated[int, typer.Option(min=1, help="number of hosts")] = 1,
    gpus_per_host: Annotated[int, typer.Option(min=1, help="number of GPUs, and ranks, per host")] = 4,
    gpu: Annotated[str, typer.Option(
        help="A100-40, A100-80, H100, H200, MI250X (one rank per die) or CPU")] = "A100-40",
    intra_bandwidth: Annotated[float | None, typer.Option(min=1e-3, help="GB/s between GPUs of one host")] = None,
    inter_bandwidth: Annotated[float | None, typer.Option(min=1e-3, help="GB/s between hosts")] = None,
    walltime: Annotated[str | None, typer.Option(help="walltime per job, e.g. 6h, 90m, 06:00:00")] = None,
    images: Annotated[int | None, typer.Option(
        min=1, help="images per epoch (default: from the manifest, otherwise ImageNet-1k's 1,281,167)")] = None,
    mean_rank: Annotated[int | None, typer.Option(
        min=1, help="the rank of adapters whose rank a rule chooses (default: 30, or the rule's highest)")] = None,
    adapter: Annotated[str | None, typer.Option(
        help="predict the last phase with adapters of this kind instead, or of `all` kinds side by side")] = None,
    json: AsJson = False,
    calibration: Annotated[Path | None, typer.Option(help="use rates measured by `prelora calibrate`")] = None,
) -> None:
    """Predict memory, step time, epoch time and number of jobs for RECIPE, for each phase and ZeRO stage.

    Example: prelora plan launch/recipes/vit_large_in1k_prelora_exp1.yaml --hosts 16 --gpus-per-host 4
    """
    from prelora_ds.config.fields import parse_walltime
    from prelora_ds.config.load import load_config
    from prelora_ds.core.adapters import KINDS
    from prelora_ds.core.adapters.refused import REFUSED
    from prelora_ds.core.rank_rules.uniform import UniformRank
    from prelora_ds.cost.forecast import check_costs_are_known, predict_kinds, predict_run
    from prelora_ds.cost.machines import Cluster
    from prelora_ds.errors import ConfigError
    from prelora_ds.reporting.forecast_table import print_forecast, print_kinds
    from prelora_ds.start import check_phases

    config = load_config(recipe, overrides or (), deepspeed_config, recipe_key="RECIPE")
    check_costs_are_known(config)
    images, images_from, labels, labels_from = _data(config, images)
    layout = check_phases(config, labels)

    cluster = Cluster(hosts, gpus_per_host, gpu, intra_bandwidth, inter_bandwidth)
    walltime_s = None if walltime is None else parse_walltime(walltime)
    if mean_rank is None:
        rules = [spec.adapters.ranks for spec in config.specs() if spec.adapters is not None]
        mean_rank = min([MEAN_RANK, *(rule.highest for rule in rules if not isinstance(rule, UniformRank))])
    if adapter is not None:
        kinds = [*KINDS, *REFUSED] if adapter == "all" else [adapter]
        compared = predict_kinds(config, cluster, layout, images, kinds, mean_rank=mean_rank, calibration=calibration)
        row = compared["kinds"][0]
        if adapter != "all" and row["refused"] is not None:
            raise ConfigError("--adapter", adapter, row["refused"], row["remedy"])
        if json:
            print_json(compared)
        else:
            print_kinds(compared)
        return
    result = predict_run(config, cluster, layout, images, walltime_s=walltime_s, mean_rank=mean_rank,
                         calibration=calibration)
    result |= {"images_from": images_from, "labels": labels, "labels_from": labels_from}
    if json:
        print_json(result)
    else:
        print_forecast(result)


def _data(config: Config, images: int | None) -> tuple[int, str, int, str]:
    """Return images per epoch and number of classes, each with its source in words.

    images: the value of --images, which takes precedence.
    """
    from prelora_ds.data.manifest import MANIFEST_NAME, Manifest

    data = config.data
    images_from = "--images"
    if images is None and data.samples_per_epoch is not None:
        images, images_from = data.samples_per_epoch, "data.samples_per_epoch"
    elif images is None:
        images, images_from = IMAGENET_IMAGES, ASSUMED

    labels, labels_from = IMAGENET_LABELS, ASSUMED
    for key, folder in (("data.val", data.val), ("data.train", data.train)):  # data.train takes precedence
        if (Path(folder) / MANIFEST_NAME).is_file():
            manifest = Manifest.load(folder, key)
            labels, labels_from = len(manifest.classes), f"{key} = {folder}"
            if key == "data.train" and images_from == ASSUMED:
                images, images_from = len(manifest), labels_from
    return images, images_from, labels, labels_from
