"""`prelora supervise`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prelora_ds.commands.preflight import Hostfile
from prelora_ds.errors import ConfigError

if TYPE_CHECKING:
    from prelora_ds.config.tree import Config


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

    from prelora_ds.config.load import check_world
    from prelora_ds.hosts.exits import outlive_streams
    from prelora_ds.hosts.hostfile import read_hostfile
    from prelora_ds.hosts.supervisor import PROBE, Policy, Supervisor, check_policy
    from prelora_ds.run.folder import RunFolder

    config, hosts = config_of(command), read_hostfile(hostfile)
    folder = RunFolder(Path(config.run.output_dir).resolve())
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
        return folder.latest.read_text() if folder.latest.is_file() else ""

    check_world(config, sum(host.slots for host in hosts[:nodes]))
    outlive_streams()  # a full disk under its output must not end the run that it watches
    supervisor = Supervisor(command, hosts, folder.supervise, policy, progress, fits,
                            lambda text: print(f"supervise: {text}", flush=True))

    def ask_to_stop(*_: object) -> None:
        supervisor.stop_asked = True

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as of `nohup`
            signal.signal(number, ask_to_stop)
    code = supervisor.run()
    if code:
        raise typer.Exit(code)


def config_of(command: Sequence[str]) -> Config:
    """The config of a command line that ends in launch/pretrain.py and its arguments; raises ConfigError."""
    from prelora_ds.config.load import load_config
    from prelora_ds.hosts.arguments import parse_arguments

    options = next((i for i, word in enumerate(command) if word.startswith("--recipe")), len(command))
    script = next((i for i in range(options - 1, -1, -1) if command[i].endswith(".py")), None)
    if script is None:
        raise ConfigError("COMMAND", " ".join(command), "has no `launch/pretrain.py --recipe ...`",
                          "write `-- LAUNCHER ... launch/pretrain.py --recipe RECIPE ...`")
    args = parse_arguments(command[script + 1:])
    return load_config(args.recipe, args.overrides, args.deepspeed_config)
