"""The commands of `prelora` that are about hosts: preflight, supervise, job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from prelora_ds.core.config import Config
from prelora_ds.errors import ConfigError

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
    from prelora_ds.configuring import load_config
    from prelora_ds.errors import TRY_AGAIN_EXIT_CODE
    from prelora_ds.launching.hostfile import read_hostfile
    from prelora_ds.launching.preflight import SSH, Questions, print_report
    from prelora_ds.launching.preflight import preflight as ask

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
        from prelora_ds.files import replace_file

        replace_file(json_file, json.dumps(report.to_json(), indent=2) + "\n")
    print_report(report)
    if not report.fit:
        raise typer.Exit(TRY_AGAIN_EXIT_CODE)


def supervise(command: Annotated[list[str], typer.Argument(help="-- LAUNCHER ... launch/pretrain.py ...; {hostfile} "
              "{hosts} {nodelist} {master} {port} {nodes} {ranks} are filled in")], hostfile: Hostfile,
              nodes: Annotated[int, typer.Option(min=1, help="hosts of the run; the others are spares")],
              min_nodes: Annotated[int | None, typer.Option(help="go on with so few, where the batch divides")] = None,
              max_restarts: Annotated[int, typer.Option(min=0)] = 3,
              patience: Annotated[float, typer.Option(help="s without a lease after which a rank ends")] = 60.0,
              grace: Annotated[float, typer.Option(help="s from an end to SIGTERM, and from that to SIGKILL")] = 15.0,
              probe_every: Annotated[float, typer.Option(help="s between two looks at the hosts")] = 20.0,
              probe: Annotated[str | None, typer.Option(help="a command with {host}; empty: none")] = None,
              interface: Annotated[str | None, typer.Option(help="as launch.interface")] = None,
              master_port: int = 29500) -> None:
    """Run COMMAND on healthy hosts, and again from the last checkpoint when a host fails; spares come in."""
    import signal

    from prelora_ds.configuring import check_world
    from prelora_ds.launching.exits import outlive_streams
    from prelora_ds.launching.hostfile import read_hostfile
    from prelora_ds.launching.supervise import PROBE, Policy, Supervisor, check_policy

    config, hosts = config_of(command), read_hostfile(hostfile)
    out = Path(config.run.output_dir).resolve()
    policy = Policy(nodes, nodes if min_nodes is None else min_nodes, max_restarts, patience, grace, probe_every,
                    PROBE if probe is None else probe, interface or config.launch.interface, master_port)
    check_policy(policy, hosts)

    def fits(ranks: int) -> bool:
        try:
            check_world(config, ranks)
        except ConfigError:
            return False
        return True

    def progress() -> str:
        latest = out / "checkpoints" / "latest"
        return latest.read_text() if latest.is_file() else ""

    check_world(config, sum(host.slots for host in hosts[:nodes]))
    outlive_streams()  # a full disk under its output must not end the run that it watches
    supervisor = Supervisor(command, hosts, out.with_name(out.name + ".supervise"), policy, progress, fits,
                            lambda text: print(f"supervise: {text}", flush=True))

    def ask_to_stop(*_: object) -> None:
        supervisor.stop_asked = True

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as of `nohup`
            signal.signal(number, ask_to_stop)
    code = supervisor.run()
    if code:
        raise typer.Exit(code)


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
    from prelora_ds.configuring import check_world, load_config
    from prelora_ds.files import replace_file
    from prelora_ds.launching.jobs import Job, load_profile, render
    from prelora_ds.reporting.plan import parse_walltime

    site, config = load_profile(profile), load_config(recipe, overrides or (), deepspeed_config)
    check_world(config, nodes * site.ranks_per_node)
    text = render(Job(name=config.run.name, script=out.resolve(), folder=Path.cwd(), recipe=recipe.resolve(),
                      overrides=overrides or (), nodes=nodes, spares=spares, walltime_s=parse_walltime(walltime),
                      deepspeed_config=None if deepspeed_config is None else deepspeed_config.resolve(), warn_s=warn,
                      max_jobs=max_jobs, account=account, queue=queue, filesystems=filesystems, stage=stage,
                      network=network, setup=setup, container=container), site, config)
    if dry_run:
        typer.echo(text, nl=False)
        return
    replace_file(out, text, executable=True)
    typer.echo(f"{out}: submit it with {'qsub' if site.scheduler == 'pbs' else 'sbatch'} {out}")


def config_of(command: Sequence[str]) -> Config:
    """The config of a command line that ends in launch/pretrain.py and its arguments; raises ConfigError."""
    from prelora_ds.configuring import load_config
    from prelora_ds.launching.arguments import parse_arguments

    options = next((i for i, word in enumerate(command) if word.startswith("--recipe")), len(command))
    script = next((i for i in range(options - 1, -1, -1) if command[i].endswith(".py")), None)
    if script is None:
        raise ConfigError("COMMAND", " ".join(command), "has no `launch/pretrain.py --recipe ...`",
                          "write `-- LAUNCHER ... launch/pretrain.py --recipe RECIPE ...`")
    args = parse_arguments(command[script + 1:])
    return load_config(args.recipe, args.overrides, args.deepspeed_config)


def folders_of(config: Config) -> list[str]:
    """The folders of shards that every host has to see; what is read by URL, or by a pattern, is none."""
    from prelora_ds.launching.jobs import place

    found = [config.data.val] if config.data.reader == "webdataset" else [config.data.train, config.data.val]
    return [place(path) for path in found if "://" not in path]


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
