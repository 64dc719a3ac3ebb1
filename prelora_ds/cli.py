"""`prelora`: the tools around runs. Each command is a file of prelora_ds/commands."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from prelora_ds.commands.calibrate import calibrate
from prelora_ds.commands.checkpoints import checkpoints
from prelora_ds.commands.diff import diff
from prelora_ds.commands.evaluate import evaluate
from prelora_ds.commands.export import export
from prelora_ds.commands.job import job
from prelora_ds.commands.output import expected_errors_as_messages, refuse_empty
from prelora_ds.commands.plan import plan
from prelora_ds.commands.preflight import preflight
from prelora_ds.commands.replay import replay
from prelora_ds.commands.report import report
from prelora_ds.commands.shards import shards_app
from prelora_ds.commands.supervise import supervise
from prelora_ds.commands.watch import watch
from prelora_ds.hosts.exits import ignore_stderr_errors
from prelora_ds.version import __version__

HELP = "Tools for prelora_ds runs. To train, run launch/pretrain.py."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP,
                  context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(shards_app, name="shards")
for command in (plan, calibrate, preflight, supervise, job, watch, report, replay, diff, evaluate, checkpoints, export):
    app.command()(command)


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"prelora_ds {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def options(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True,
                                          help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error as well.")] = False,
) -> None:
    """Declare the options that stand before a command; `main` reads ``--debug`` itself, before anything can fail."""


def main() -> None:
    """Run the command line. Expected errors are printed as one message; user errors exit with code 2."""
    streams = sys.stdout, sys.stderr
    arguments = sys.argv[1:]
    # Only options of `prelora` itself stand before the command.
    before_command = arguments[: next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)]
    ignore_stderr_errors()  # it carries progress, and never a result
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have letters that the locale has not
    try:
        with expected_errors_as_messages(tracebacks="--debug" in before_command):
            refuse_empty(arguments)
            app()
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


if __name__ == "__main__":
    main()
