"""`prelora preflight`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prelora_ds.commands.options import AsJson, DeepspeedConfig, Overrides
from prelora_ds.commands.output import print_json

if TYPE_CHECKING:
    from prelora_ds.config.tree import Config

Hostfile = Annotated[Path, typer.Option(help="hostfile with one `NAME slots=N` per line")]


def preflight(
    hostfile: Hostfile,
    recipe: Annotated[Path | None, typer.Option(
        help="also check this recipe's data and output folders")] = None,
    overrides: Overrides = None,
    deepspeed_config: DeepspeedConfig = None,
    folder: Annotated[Path, typer.Option(
        help="folder on the shared file system (a recipe's output folder takes precedence)",
    )] = Path("."),
    scratch: Annotated[list[str] | None, typer.Option(
        help="node-local folders to write to")] = None,
    interface: Annotated[str | None, typer.Option(
        help="network interface, see launch.interface")] = None,
    master_port: Annotated[int, typer.Option(help="port of rank 0")] = 29500,
    ssh: Annotated[str | None, typer.Option(
        help="ssh command; {host} is replaced by the host name")] = None,
    json: AsJson = False,
) -> None:
    """Check all hosts before a run. Exits with 0, or with 75 if a host fails a check.

    Example: prelora preflight --hostfile hosts --recipe launch/recipes/vit_large_in1k_prelora_exp1.yaml
    """
    from prelora_ds.config.load import load_config
    from prelora_ds.errors import TRY_AGAIN_EXIT_CODE
    from prelora_ds.hosts.hostfile import read_hostfile
    from prelora_ds.hosts.preflight import SSH, Checks, print_preflight, run_preflight

    config = None if recipe is None else load_config(recipe, overrides or (), deepspeed_config)
    hosts = read_hostfile(hostfile)
    shards: list[str] = []
    extensions: tuple[str, ...] = ()
    if config is not None:
        folder = existing_parent(Path(config.run.output_dir))
        interface = interface or config.launch.interface
        shards = shard_folders(config)
        if config.zero.offload_optimizer:
            extensions = ("cpu_adam",)
    report = run_preflight(hosts, Checks(folder=folder.resolve(),
                                         scratch=scratch or (),
                                         shards=shards,
                                         extensions=extensions,
                                         interface=interface,
                                         master_port=master_port,
                                         ssh=ssh or SSH))
    if json:
        print_json(report.to_json())
    else:
        print_preflight(report)
    if not report.ok:
        raise typer.Exit(TRY_AGAIN_EXIT_CODE)


def shard_folders(config: Config) -> list[str]:
    """Return the folders of shards that every host must see.

    Data that is read from a URL, or through a pattern of shards, has none.
    """
    from prelora_ds.hosts.jobs import absolute_location

    paths = [config.data.train, config.data.val]
    if config.data.reader == "webdataset":
        paths = [config.data.val]
    return [absolute_location(path) for path in paths if "://" not in path]


def existing_parent(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
