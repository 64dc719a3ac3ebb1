"""`prelora job`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prelora_ds.commands.options import DeepspeedConfig, Overrides, Recipe
from prelora_ds.commands.output import save, tell

if TYPE_CHECKING:
    from prelora_ds.config.tree import Config
    from prelora_ds.hosts.jobs import Task

FIXED = ("run.output_dir", "run.name", "data.train", "data.val")


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
    sweep: Annotated[list[str] | None, typer.Option(
        metavar="KEY=A,B,...", help="a job array with one run per value; repeated: per combination of values")] = None,
    resume: Annotated[Path | None, typer.Option(
        help="checkpoint from which each run begins, as a fork where its method agrees")] = None,
    setup: Annotated[list[str] | None, typer.Option(
        help="replace the profile's setup lines")] = None,
    container: Annotated[str | None, typer.Option(
        help="command in front of Python, e.g. `apptainer exec --nv image.sif`")] = None,
    out: Annotated[Path, typer.Option(help="script to write")] = Path("job.sh"),
    dry_run: Annotated[bool, typer.Option(
        help="print the script without writing it")] = False,
) -> None:
    """Write a batch script that trains RECIPE to completion in a chain of jobs.

    With --sweep the script is a job array: each of its tasks is a run with its own output folder.

    Example: prelora job launch/recipes/vit_large_in1k_prelora_exp1.yaml --profile slurm --nodes 16 --walltime 6h
    """
    from prelora_ds.config.fields import parse_walltime
    from prelora_ds.config.load import check_world, load_config
    from prelora_ds.hosts.jobs import Job, load_profile, render

    site = load_profile(profile)
    config = load_config(recipe, overrides or (), deepspeed_config, recipe_key="RECIPE")
    runs = {more: load_config(recipe, [*(overrides or ()), *more], deepspeed_config, recipe_key="RECIPE")
            for more in combinations(sweep or ())}
    for each in runs.values():
        check_world(each, nodes * site.ranks_per_node)
    tasks = tuple(task_of(each, more) for more, each in runs.items())
    request = Job(name=config.run.name,
                  script=out.resolve(),
                  folder=Path.cwd(),
                  tasks=tasks,
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
                  container=container,
                  resume=None if resume is None else resume.resolve())
    text = render(request, site, config)
    if dry_run:
        typer.echo(text, nl=False)
        return
    save(out, text, "--out", executable=True)
    submit = "qsub" if site.scheduler == "pbs" else "sbatch"
    tell(f"{out}: submit it with `{submit} {out}`")
    if sweep:
        tell(f"The array has {len(tasks)} runs:")
        for task in tasks:
            tell(f"  {task.output_dir}: {shlex.join(task.overrides)}")


def combinations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the overrides of each run of a sweep; one run without any if there is no sweep. Raises ConfigError."""
    from prelora_ds.config.overrides import swept
    from prelora_ds.errors import ConfigError

    values = [swept(text) for text in sweeps]
    keys = [overrides[0].partition("=")[0] for overrides in values]
    for key in keys:
        if key in FIXED or keys.count(key) > 1:
            raise ConfigError("--sweep", key, "is swept twice" if key not in FIXED else "is the same for all runs of a "
                              "job array, or is derived from the values", "sweep another key")
    return list(product(*values))


def task_of(config: Config, swept: tuple[str, ...]) -> Task:
    """Return the run of ``config``; its name and its folder end in the values of its sweep."""
    from prelora_ds.hosts.jobs import Task
    from prelora_ds.run.folder import RunFolder

    suffix = "".join(f"-{label(override)}" for override in swept)
    output_dir = Path(f"{Path(config.run.output_dir).resolve()}{suffix}")
    overrides = (*swept, f"run.name={config.run.name}{suffix}") if swept else ()
    return Task(overrides, output_dir, RunFolder(output_dir).supervise)


def label(override: str) -> str:
    """Return a part of a file name for ``a.b=c``: the last part of the key, and the value."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.]+', '_', value).strip('_')}"
