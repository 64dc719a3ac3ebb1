"""`prelora`: the tools around runs. Each command is a file of prelora_ds/commands."""

from __future__ import annotations

import sys

import typer

from prelora_ds.commands.calibrate import calibrate
from prelora_ds.commands.checkpoints import checkpoints
from prelora_ds.commands.evaluate import evaluate
from prelora_ds.commands.export import export
from prelora_ds.commands.job import job
from prelora_ds.commands.output import one_message, refuse_empty
from prelora_ds.commands.plan import plan
from prelora_ds.commands.preflight import preflight
from prelora_ds.commands.report import report
from prelora_ds.commands.shards import shards_app
from prelora_ds.commands.supervise import supervise
from prelora_ds.hosts.exits import ignore_stderr_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Tools around prelora_ds runs; training itself starts with launch/pretrain.py.")
app.add_typer(shards_app, name="shards")
for command in (plan, calibrate, preflight, supervise, job, report, evaluate, checkpoints, export):
    app.command()(command)


def main() -> None:
    """Entry point: what a user can expect to happen is one message; a mistake of the user's is exit code 2."""
    streams = sys.stdout, sys.stderr
    ignore_stderr_errors()  # progress, and no part of a result
    try:
        with one_message():
            refuse_empty(sys.argv[1:])
            app()
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


if __name__ == "__main__":
    main()
