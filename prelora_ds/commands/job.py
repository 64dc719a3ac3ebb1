"""`prelora job`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.output import save, tell


def job(recipe: Path,
        profile: Annotated[str, typer.Option(help="polaris, perlmutter, frontier, pbs, slurm, or a .yaml file")],
        overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c")] = None,
        deepspeed_config: Annotated[Path | None, typer.Option()] = None,
        nodes: Annotated[int, typer.Option(min=1)] = 16, spares: Annotated[int, typer.Option(min=0)] = 1,
        walltime: Annotated[str, typer.Option(help="of one job: 3h, 90m or 03:00:00")] = "3h",
        warn: Annotated[int, typer.Option(min=1, help="s before the time limit at which the run stops")] = 300,
        max_jobs: Annotated[int, typer.Option(min=1, help="jobs of the chain")] = 50,
        account: Annotated[str | None, typer.Option()] = None, queue: Annotated[str | None, typer.Option()] = None,
        filesystems: Annotated[str | None, typer.Option(help="as PBS at ALCF wants them")] = None,
        stage: Annotated[bool, typer.Option(help="copy the shards to node-local disks first")] = False,
        network: Annotated[bool, typer.Option(help="set the profile's NCCL variables")] = True,
        setup: Annotated[list[str] | None, typer.Option(help="lines instead of the profile's modules")] = None,
        container: Annotated[str | None, typer.Option(help="such as `apptainer exec --nv image.sif`")] = None,
        out: Annotated[Path, typer.Option(help="the script to write")] = Path("job.sh"),
        dry_run: Annotated[bool, typer.Option(help="print it, write nothing")] = False) -> None:
    """Write a batch script that trains RECIPE to its end in a chain of jobs."""
    from prelora_ds.config.fields import parse_walltime
    from prelora_ds.config.load import check_world, load_config
    from prelora_ds.hosts.jobs import Job, load_profile, render
    from prelora_ds.run.folder import RunFolder

    site, config = load_profile(profile), load_config(recipe, overrides or (), deepspeed_config)
    check_world(config, nodes * site.ranks_per_node)
    supervise = RunFolder(Path(config.run.output_dir).resolve()).supervise
    text = render(Job(name=config.run.name, script=out.resolve(), folder=Path.cwd(), supervise=supervise,
                      recipe=recipe.resolve(), overrides=overrides or (), nodes=nodes, spares=spares,
                      walltime_s=parse_walltime(walltime),
                      deepspeed_config=None if deepspeed_config is None else deepspeed_config.resolve(), warn_s=warn,
                      max_jobs=max_jobs, account=account, queue=queue, filesystems=filesystems, stage=stage,
                      network=network, setup=setup, container=container), site, config)
    if dry_run:
        typer.echo(text, nl=False)
        return
    save(out, text, "--out", executable=True)
    tell(f"{out}: submit it with {'qsub' if site.scheduler == 'pbs' else 'sbatch'} {out}")
