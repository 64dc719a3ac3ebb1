"""`prelora preflight`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prelora_ds.commands.output import save_json

if TYPE_CHECKING:
    from prelora_ds.config.tree import Config

Hostfile = Annotated[Path, typer.Option(help="lines `NAME slots=N`")]


def preflight(hostfile: Hostfile,
              recipe: Annotated[Path | None, typer.Option(help="check its data and output, too")] = None,
              overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c")] = None,
              deepspeed_config: Annotated[Path | None, typer.Option()] = None,
              folder: Annotated[Path, typer.Option(help="on the shared disk; a recipe's output folder goes before")] =
              Path("."),
              scratch: Annotated[list[str] | None, typer.Option(help="node-local folders to write to")] = None,
              interface: Annotated[str | None, typer.Option(help="as launch.interface")] = None,
              master_port: int = 29500, ssh: Annotated[str | None, typer.Option(help="with {host} in it")] = None,
              json_file: Annotated[Path | None, typer.Option("--json", help="write all answers there")] = None) -> None:
    """Look at all hosts before a run: one table, exit code 0, or 75 when a host is not fit."""
    from prelora_ds.config.load import load_config
    from prelora_ds.errors import TRY_AGAIN_EXIT_CODE
    from prelora_ds.hosts.hostfile import read_hostfile
    from prelora_ds.hosts.preflight import SSH, Questions, print_preflight
    from prelora_ds.hosts.preflight import preflight as ask

    config = None if recipe is None else load_config(recipe, overrides or (), deepspeed_config)
    hosts = read_hostfile(hostfile)
    if config is not None:
        folder = existing_parent(Path(config.run.output_dir))
        interface = interface or config.launch.interface
    report = ask(hosts, Questions(
        folder=folder.resolve(), scratch=scratch or (), interface=interface, master_port=master_port, ssh=ssh or SSH,
        shards=() if config is None else folders_of(config),
        extensions=("cpu_adam",) if config is not None and config.zero.offload_optimizer else ()))
    if json_file is not None:
        save_json(json_file, report.to_json(), "--json")
    print_preflight(report)
    if not report.fit:
        raise typer.Exit(TRY_AGAIN_EXIT_CODE)


def folders_of(config: Config) -> list[str]:
    """The folders of shards that every host has to see; what is read by URL, or by a pattern, is none."""
    from prelora_ds.hosts.jobs import place

    found = [config.data.val] if config.data.reader == "webdataset" else [config.data.train, config.data.val]
    return [place(path) for path in found if "://" not in path]


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
