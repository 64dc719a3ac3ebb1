"""`prelora plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prelora_ds.commands.output import save_json

if TYPE_CHECKING:
    from prelora_ds.config.tree import Config

IMAGENET_IMAGES, IMAGENET_LABELS = 1_281_167, 1000
ASSUMED = "assumed, as of ImageNet-1k: data.train has no manifest here"


def plan(recipe: Path, overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c")] = None,
         deepspeed_config: Annotated[Path | None, typer.Option()] = None,
         hosts: Annotated[int, typer.Option(min=1)] = 1, gpus_per_host: Annotated[int, typer.Option(min=1)] = 4,
         gpu: Annotated[str, typer.Option(help="A100-40, A100-80, H100, H200, MI250X (a die each) or CPU")] = "A100-40",
         intra_bandwidth: Annotated[float | None, typer.Option(min=1e-3, help="GB/s of a GPU within its host")] = None,
         inter_bandwidth: Annotated[float | None, typer.Option(min=1e-3, help="GB/s of a host to others")] = None,
         walltime: Annotated[str | None, typer.Option(help="of one job: 6h, 90m or 06:00:00")] = None,
         images: Annotated[int | None, typer.Option(min=1, help="an epoch's; else the manifest's, ImageNet's")] = None,
         mean_rank: Annotated[int, typer.Option(min=1, help="LoRA rank of the adapters")] = 30,
         json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
         calibration: Annotated[Path | None, typer.Option(help="of `prelora calibrate`")] = None) -> None:
    """Predict for RECIPE: bytes and step time per phase and ZeRO stage, what fits, epoch time, number of jobs."""
    import torch

    from prelora_ds.config.fields import parse_walltime
    from prelora_ds.config.load import load_config
    from prelora_ds.cost.forecast import check_costs_are_known, predict_run
    from prelora_ds.cost.machines import Cluster
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model
    from prelora_ds.reporting.forecast_table import print_forecast

    config = load_config(recipe, overrides or (), deepspeed_config)
    check_costs_are_known(config)
    images, images_from, labels, labels_from = _data(config, images)
    with torch.device("meta"):
        layout = find_layout(build_model(config.model, labels), config.families())
    result = predict_run(config, Cluster(hosts, gpus_per_host, gpu, intra_bandwidth, inter_bandwidth), layout, images,
                         walltime_s=None if walltime is None else parse_walltime(walltime), mean_rank=mean_rank,
                         calibration=calibration)
    result |= {"images_from": images_from, "labels": labels, "labels_from": labels_from}
    if json_file is not None:
        save_json(json_file, result, "--json")
    print_forecast(result)


def _data(config: Config, images: int | None) -> tuple[int, str, int, str]:
    """Images of an epoch and number of classes, each with where it is from, in words."""
    from prelora_ds.data.manifest import MANIFEST_NAME, Manifest

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
