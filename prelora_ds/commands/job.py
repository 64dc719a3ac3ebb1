"""`prelora job`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.commands.options import DeepspeedConfig, Overrides, Recipe
from prelora_ds.commands.output import save, tell


def job(
    recipe: Recipe,
    profile: Annotated[str, typer.Option(
        help="polaris, perlmutter, frontier, pbs, slurm, or the path of a .yaml file")],
    overrides: Overrides = None,
    deepspeed_config: DeepspeedConfig = None,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of the run")] = 16,
    spares: Annotated[int, typer.Option(
        min=0, help="additional nodes that replace failed ones")] = 1,
    walltime: Annotated[str, typer.Option(
        help="walltime per job, e.g. 3h, 90m, 03:00:00")] = "3h",
    warn: Annotated[int, typer.Option(
        min=1, help="stop this many seconds before the time limit")] = 300,
    max_jobs: Annotated[int, typer.Option(min=1, help="maximum number of chained jobs")] = 50,
    account: Annotated[str | None, typer.Option(help="project to charge")] = None,
    queue: Annotated[str | None, typer.Option(
        help="queue, partition or QOS (default: the profile's)")] = None,
    filesystems: Annotated[str | None, typer.Option(
        help="PBS filesystems resource (ALCF)")] = None,
    stage: Annotated[bool, typer.Option(
        help="copy the shards to node-local disks first")] = False,
    network: Annotated[bool, typer.Option(help="set the profile's NCCL variables")] = True,
    setup: Annotated[list[str] | None, typer.Option(
        help="replace the profile's setup lines")] = None,
    container: Annotated[str | None, typer.Option(
        help="command in front of Python, e.g. `apptainer exec --nv image.sif`")] = None,
    out: Annotated[Path, typer.Option(help="script to write")] = Path("job.sh"),
    dry_run: Annotated[bool, typer.Option(
        help="print the script without writing it")] = False,
) -> None:
    """Write a batch script that trains RECIPE to completion in a chain of jobs.

    Example: prelora job launch/recipes/vit_large_in1k_prelora_exp1.yaml --profile slurm --nodes 16 --walltime 6h
    """
    from prelora_ds.config.fields import parse_walltime
    from prelora_ds.config.load import check_world, load_config
    from prelora_ds.hosts.jobs import Job, load_profile, render
    from prelora_ds.run.folder import RunFolder

    site = load_profile(profile)
    config = load_config(recipe, overrides or (), deepspeed_config, recipe_key="RECIPE")
    check_world(config, nodes * site.ranks_per_node)
    request = Job(name=config.run.name,
                  script=out.resolve(),
                  folder=Path.cwd(),
                  supervise=RunFolder(Path(config.run.output_dir).resolve()).supervise,
                  recipe=recipe.resolve(),
                  overrides=overrides or (),
                  deepspeed_config=None if deepspeed_config is None else deepspeed_config.resolve(),
                  nodes=nodes,
                  spares=spares,
                  walltime_s=parse_walltime(walltime),
                  warn_s=warn,
                  max_jobs=max_jobs,
                  account=account,
                  queue=queue,
                  filesystems=filesystems,
                  stage=stage,
                  network=network,
                  setup=setup,
                  container=container)
    text = render(request, site, config)
    if dry_run:
        typer.echo(text, nl=False)
        return
    save(out, text, "--out", executable=True)
    submit = "qsub" if site.scheduler == "pbs" else "sbatch"
    tell(f"{out}: submit it with `{submit} {out}`")
