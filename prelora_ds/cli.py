"""`prelora`: shards, plan, evaluate, report, checkpoints, export; for many hosts preflight, supervise, job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prelora_ds.errors import ConfigError, cannot_write
from prelora_ds.launching import commands
from prelora_ds.launching.exits import one_message
from prelora_ds.sharding import shards_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Tools around prelora_ds runs; training itself starts with launch/pretrain.py.")
app.add_typer(shards_app, name="shards")
app.command()(commands.preflight)
app.command()(commands.supervise)
app.command()(commands.job)


@app.command()
def evaluate(model: Path, data: Annotated[Path, typer.Option(help="a folder of shards")]) -> None:
    """Top-1 of an exported MODEL folder, as transformers opens it; kept with the data's name in its accuracy.json."""
    from prelora_ds.evaluate import evaluate_folder

    result = evaluate_folder(model, data)
    accuracy = result.accuracy
    typer.echo(
        f"{model} on {data}: {accuracy.correct} of {accuracy.samples} right, {accuracy.acc1:.2%}"
    )
    _save_json(model / "accuracy.json", result.to_json(), "MODEL")


@app.command()
def report(output: Path) -> None:
    """The table of the run in OUTPUT: per phase, bytes predicted and measured, times, loss, accuracy, and why."""
    from prelora_ds.reporting.table import print_report

    print_report(output)


@app.command()
def checkpoints(run: Path) -> None:
    """The checkpoints of RUN, newest first, each verified; exit code 1 if one is broken."""
    from prelora_ds.checkpoints.folder import FOLDER, describe, list_checkpoints

    found = list_checkpoints(run / FOLDER)
    if not found:
        raise ConfigError("RUN", str(run), "has no checkpoints", "name the run.output_dir of a run")
    broken = False
    for folder in found:
        line = describe(folder)
        typer.echo(line)
        broken |= line.startswith(f"{folder.name}  BROKEN: ")
    if broken:
        raise typer.Exit(1)


@app.command()
def export(run_or_checkpoint: Path, out: Path,
           format: Annotated[str, typer.Option(help="hf, peft, timm or deepspeed")] = "hf") -> None:
    """Write a checkpoint (of a run its newest) to OUT, for transformers, peft, timm or DeepSpeed."""
    from prelora_ds.engine.runtime import choose_accelerator

    choose_accelerator()
    from prelora_ds.reporting.convert import export_checkpoint

    folder = export_checkpoint(run_or_checkpoint, out, format)
    typer.echo(f"{out}: {folder} as {format}")


@app.command()
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
         calibration: Annotated[Path | None, typer.Option(help="of `python -m prelora_ds.calibrate`")] = None) -> None:
    """Predict for RECIPE: bytes and step time per phase and ZeRO stage, what fits, epoch time, number of jobs."""
    from prelora_ds.configuring import load_config
    from prelora_ds.reporting.plan import Cluster, parse_walltime, predict_run, print_plan

    result = predict_run(load_config(recipe, overrides or (), deepspeed_config),
                         Cluster(hosts, gpus_per_host, gpu, intra_bandwidth, inter_bandwidth),
                         walltime_s=None if walltime is None else parse_walltime(walltime), images=images,
                         mean_rank=mean_rank, calibration=calibration)
    if json_file is not None:
        _save_json(json_file, result, "--json")
    print_plan(result)


def _save_json(path: Path, value: Any, key: str) -> None:
    from prelora_ds.files import replace_file
    from prelora_ds.metrics import to_json

    try:
        replace_file(path, to_json(value, indent=2) + "\n")
    except OSError as exc:
        raise cannot_write(key, str(path), exc) from exc


def main() -> None:
    """Entry point: what a user can expect to happen is one message; a mistake of the user's is exit code 2."""
    with one_message():
        app()


if __name__ == "__main__":
    main()
