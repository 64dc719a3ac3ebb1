"""`prelora supervise`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prelora_ds.commands.preflight import Hostfile
from prelora_ds.console import stamped
from prelora_ds.errors import ConfigError

if TYPE_CHECKING:
    from prelora_ds.config.tree import Config


def supervise(
    command: Annotated[list[str], typer.Argument(
        help="-- LAUNCHER ... launch/pretrain.py ...; {hostfile} {hosts} {nodelist} {master} "
             "{port} {nodes} {ranks} are replaced")],
    hostfile: Hostfile,
    nodes: Annotated[int, typer.Option(
        min=1, help="hosts of the run; the others are spares")],
    min_nodes: Annotated[int | None, typer.Option(
        help="smallest number of hosts to continue with, if the global batch divides evenly "
             "(default: --nodes)")] = None,
    max_restarts: Annotated[int, typer.Option(
        min=0, help="give up after this many restarts")] = 3,
    patience: Annotated[float, typer.Option(
        help="seconds without a supervisor heartbeat after which a rank exits")] = 60.0,
    grace: Annotated[float, typer.Option(
        help="seconds to wait for the ranks to end before SIGTERM, and then again before "
             "SIGKILL")] = 15.0,
    probe_every: Annotated[float, typer.Option(
        help="seconds between host probes")] = 20.0,
    probe: Annotated[str | None, typer.Option(
        help="probe command ({host} is replaced; default: ssh {host} true); empty disables probing")] = None,
    interface: Annotated[str | None, typer.Option(
        help="network interface, see launch.interface")] = None,
    master_port: Annotated[int, typer.Option(
        help="port of rank 0; attempt n uses this port + n")] = 29500,
) -> None:
    """Run COMMAND on healthy hosts; restart it from the last checkpoint when a host fails.

    A failed host is replaced by a spare one.

    Example: prelora supervise --hostfile hosts --nodes 16 -- deepspeed --hostfile {hostfile} launch/pretrain.py
    --recipe launch/recipes/vit_large_in1k_prelora_exp1.yaml
    """
    import signal

    from prelora_ds.config.load import check_world
    from prelora_ds.hosts.exits import ignore_output_errors
    from prelora_ds.hosts.hostfile import read_hostfile
    from prelora_ds.hosts.supervisor import PROBE, Policy, Supervisor, check_policy
    from prelora_ds.run.folder import RunFolder

    config = config_of(command)
    hosts = read_hostfile(hostfile)
    folder = RunFolder(Path(config.run.output_dir).resolve())
    policy = Policy(nodes=nodes,
                    min_nodes=nodes if min_nodes is None else min_nodes,
                    max_restarts=max_restarts,
                    patience_s=patience,
                    grace_s=grace,
                    probe_s=probe_every,
                    probe=PROBE if probe is None else probe,
                    interface=interface or config.launch.interface,
                    master_port=master_port)
    check_policy(policy, hosts)

    def fits(ranks: int) -> bool:
        try:
            check_world(config, ranks)
        except ConfigError:
            return False
        return True

    def progress() -> str:
        return folder.latest.read_text() if folder.latest.is_file() else ""

    def say(text: str) -> None:
        print(stamped(f"supervise: {text}"), flush=True)

    check_world(config, sum(host.slots for host in hosts[:nodes]))
    ignore_output_errors()  # a full disk under the supervisor's log must not end the run
    supervisor = Supervisor(command, hosts, folder.supervise, policy, progress, fits, say)

    def request_stop(*_: object) -> None:
        supervisor.stop_requested = True

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        # `nohup` sets SIGHUP to be ignored: leave it so.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, request_stop)
    code = supervisor.run()
    if code:
        raise typer.Exit(code)


def config_of(command: Sequence[str]) -> Config:
    """Return the config of a command that ends in launch/pretrain.py and its arguments.

    Raises ConfigError.
    """
    from prelora_ds.config.load import load_config
    from prelora_ds.hosts.arguments import parse_arguments

    options = next((i for i, word in enumerate(command) if word.startswith("--recipe")),
                   len(command))
    script = next((i for i in range(options - 1, -1, -1) if command[i].endswith(".py")), None)
    if script is None:
        raise ConfigError("COMMAND", " ".join(command),
                          "does not contain `launch/pretrain.py --recipe ...`",
                          "write `-- LAUNCHER ... launch/pretrain.py --recipe RECIPE ...`")
    args = parse_arguments(command[script + 1:])
    return load_config(args.recipe, args.overrides, args.deepspeed_config)
