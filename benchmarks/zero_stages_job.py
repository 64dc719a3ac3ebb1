"""The ZeRO stages of a recipe on the ranks that a launcher started (zero_stages.py --recipe).

The processes of the launcher only supervise. For each setting, every one of them starts a child with the same rank, and
the children form a process group of their own. So a setting that fails, for example because a GPU has too little
memory, ends its children and not the job: it gets a row with its error, and the next setting begins.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from harness import print_table, record
from ranks import free_port

from prelora_ds.config.load import load_config
from prelora_ds.config.phases import PhaseSettings
from prelora_ds.config.tree import Config
from prelora_ds.errors import ConfigError, LaunchError
from prelora_ds.hosts.ancestors import find_launcher
from prelora_ds.hosts.check_in import CheckIn
from prelora_ds.hosts.exits import LOST_PEER
from prelora_ds.hosts.installed import environment_fingerprint, installed_code
from prelora_ds.hosts.mpi import discover_ranks, with_master_addr
from prelora_ds.hosts.network import choose_interface

POLL_S = 1.0
GRACE_S = 10.0  # after the first failure of a setting, for the other ranks to fail by themselves
SHOWN = 200  # characters of an error in the table

Row = dict[str, Any]


def on_the_ranks_of_a_launcher(recipe: str, overrides: Sequence[str], settings: Mapping[str, Mapping[str, Any]],
                               steps: int, folder: Path) -> None:
    """Time ``steps`` steps of each phase of ``recipe`` with each of the ``settings``; rank 0 prints and records them.

    settings: name -> ``zero_optimization``.
    """
    config = load_config(recipe, overrides)
    ranks = with_master_addr(discover_ranks(os.environ), config.launch.interface)
    assert ranks.master_addr is not None, "with_master_addr finds the address or raises"
    choose_interface(config.launch.interface, ranks.master_addr, os.environ)
    ranks.export(os.environ)

    def give_up(error: LaunchError) -> None:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    check_in = CheckIn(ranks, os.environ, config.launch.timeout_s, give_up, find_launcher())
    hosts = check_in.meet(environment_fingerprint("", installed_code()))
    dist.init_process_group("gloo")
    rows: list[Row] = []
    for name, zero in settings.items():
        found = _rows_of(name, zero, recipe, overrides, steps)
        if ranks.rank == 0:
            rows += found
            print(*found, sep="\n", flush=True)
    if ranks.rank == 0:
        _show(rows, config, hosts, folder)
    dist.barrier()
    dist.destroy_process_group()


def _rows_of(name: str, zero: Mapping[str, Any], recipe: str, overrides: Sequence[str], steps: int) -> list[Row]:
    """Return the rows of a setting on rank 0, from children of all ranks. Collective."""
    port: list[Any] = [free_port() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(port, src=0)
    # The store of the parents is not that of the children.
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    with tempfile.TemporaryDirectory() as place:
        out, log = Path(place) / "rows", Path(place) / "log"
        out.touch()
        command = [sys.executable, __file__, json.dumps({
            "recipe": recipe, "overrides": list(overrides), "zero": zero, "steps": steps, "out": str(out)})]
        with log.open("w") as file:
            child = subprocess.Popen(command, env=environ | {"MASTER_PORT": str(port[0])}, stdout=file, stderr=file)
        errors = _wait_for_all(child, log)
        rows = [{"ZeRO": name, **json.loads(line)} for line in out.read_text().splitlines()]
    done = [row for row in rows if "step s" in row]
    if errors:
        phase = rows[-1]["phase"] if rows else "before the first"
        return [*done, {"ZeRO": name, "phase": phase, "failed": _first_cause(errors)[:SHOWN]}]
    return done


def _wait_for_all(child: subprocess.Popen[Any], log: Path) -> list[str]:
    """Wait until the children of all ranks have ended; return the errors of those that failed. Collective.

    When one of them has failed, the others are killed after GRACE_S, because they may wait for it.
    """
    rank, failed_at = dist.get_rank(), None
    states: list[Any] = [None] * dist.get_world_size()
    while True:
        code = child.poll()
        error = f"rank {rank} on {socket.gethostname()}: {_last_line(log, code)}" if code else None
        dist.all_gather_object(states, (code is None, error))
        if not any(running for running, _ in states):
            return [text for _, text in states if text is not None]
        if failed_at is None and any(text is not None for _, text in states):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            child.kill()
        time.sleep(POLL_S)


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"ended by signal {-code}"
    # Below an error of ours is its remedy.
    causes = [line for line in lines if "Error" in line or line.startswith("error: ")]
    return (causes or lines or [f"exit code {code}"])[-1]


def _first_cause(errors: Sequence[str]) -> str:
    """Return an error that does not follow from that of another rank, if there is one."""
    return next((error for error in errors if not any(sign in error for sign in (*LOST_PEER, "signal 9"))), errors[0])


def _show(rows: Sequence[Row], config: Config, hosts: Sequence[str], folder: Path) -> None:
    print_table([{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows],
                f"{config.run.name} on {len(hosts)} ranks of {len(set(hosts))} hosts: seconds per step, GiB of rank 0")
    timed = [row for row in rows if "step s" in row]
    fastest = {phase: min((row for row in timed if row["phase"] == phase), key=lambda row: row["step s"])
               for phase in dict.fromkeys(row["phase"] for row in timed)}
    figures = {
        "ranks": len(hosts), "hosts": len(set(hosts)),
        "failed": sorted({row["ZeRO"] for row in rows if "failed" in row}),
        "fastest": {phase: row["ZeRO"] for phase, row in fastest.items()},
        "images_per_s": {phase: row["img/s"] for phase, row in fastest.items()},
    }
    print(record(f"zero_stages_{config.run.name}", figures, rows, NOTES, folder), flush=True)


NOTES = ("Every phase has an engine of its own with first weights, and adapters of the highest rank that its rule can "
         "give. A step is one of the recipe's global batch, from its data, without data workers; its parts are those "
         "of rank 0, and medians over steps. A setting that failed is passed by.")


# ---- the children

def rank_of_a_setting(recipe: str, overrides: Sequence[str], zero: Mapping[str, Any], steps: int, out: str) -> None:
    """Measure all phases with one setting; rank 0 appends a row to ``out`` when a phase begins, and when it ends."""
    from prelora_ds.engine.runtime import check_zero_config, init_process_group

    config = load_config(recipe, overrides)
    check_zero_config(dict(zero))
    init_process_group(deterministic=config.run.deterministic)
    for phase in config.phase_list:
        micro = phase.micro_batch_size if isinstance(phase.micro_batch_size, int) else None
        deepspeed = config.for_phase(phase.name).deepspeed
        settings = PhaseSettings(micro_batch_size=micro, deepspeed={**deepspeed, "zero_optimization": dict(zero)})
        config = config.with_settings(phase.name, settings)
    for row in _phases(config, steps):
        if dist.get_rank() == 0:
            with Path(out).open("a") as file:
                file.write(json.dumps(row) + "\n")
    dist.barrier()


def _phases(config: Config, steps: int) -> Any:
    """Yield the name of each phase when it begins, and its row when it has been measured."""
    from zero_stages_ranks import GIB, PARTS, bytes_after_backward, owners, peak_bytes, step

    from prelora_ds.config.load import check_world
    from prelora_ds.core.phases import plans_at_rank
    from prelora_ds.cost.bytes import worst_deviation
    from prelora_ds.data.setup import make_loader, open_data
    from prelora_ds.engine.build import build_engine
    from prelora_ds.engine.release import release
    from prelora_ds.engine.runtime import freeze_imports
    from prelora_ds.engine.state import initial_state
    from prelora_ds.model.families import find_layout
    from prelora_ds.model.vit import build_model

    world, rank = dist.get_world_size(), dist.get_rank()
    data, _ = open_data(config)
    labels = len(data.classes)
    with torch.device("meta"):
        layout = find_layout(build_model(config.model, labels), config.families(), config.model.families)
    freeze_imports()
    for plan in plans_at_rank(config.specs(), layout, seed=config.run.seed):
        yield {"phase": plan.phase}
        check_world(config, world)
        torch.manual_seed(config.run.seed)
        weights = initial_state(build_model(config.model, labels), rank, world)
        engine = build_engine(config, plan, layout, labels, weights)
        del weights
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        size = engine.config.train.micro_batch_size
        bytes_after_backward(engine, layout, world, size=size)  # creates the moments; ZeRO-3 records its trace
        predicted, measured = bytes_after_backward(engine, layout, world, size=size)
        loader = make_loader(engine.config, data, rank=rank, world_size=world, workers=0)
        timed = [step(engine, loader) for _ in range(1 + steps)][1:]
        loader.close()
        seconds = {part: median(t[part] for t in timed) for part in ("step", *PARTS)}
        yield {
            "phase": plan.phase,
            **{f"{part} s": value for part, value in seconds.items()},
            "img/s": config.train.global_batch_size / seconds["step"],
            "sent GB": timed[-1]["bytes"] / 1e9,
            **owners(measured),
            "states off by": worst_deviation(predicted, measured),
            "peak GiB": peak_bytes() / GIB,
        }
        release(engine)
        del engine


if __name__ == "__main__":
    try:
        rank_of_a_setting(**json.loads(sys.argv[1]))
    except ConfigError as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
