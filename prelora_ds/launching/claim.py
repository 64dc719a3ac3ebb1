"""Whether a run may have its output folder: a new one, or its own from before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prelora_ds.checkpoints.folder import FOLDER, BrokenCheckpointError, discard_partial, read_run_state, write_text
from prelora_ds.checkpoints.resume import candidates
from prelora_ds.configuring import dump_yaml, load_config
from prelora_ds.core.config import Config
from prelora_ds.core.errors import ConfigError
from prelora_ds.core.resuming import differences
from prelora_ds.launching.lease import NAME, Lease
from prelora_ds.metrics import read_lines


def claim_output(folder: Path, config: Config, resume: str) -> Lease:
    """Take the output folder for this job and write config.yaml into it; by rank 0, before anything expensive.

    Raises ConfigError when a living job has it, when it holds something else than this run, unfinished, or when it
    cannot be written; then nothing in it has changed.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run.output_dir", str(folder), "is no folder", "choose another run.output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lease = Lease(folder).take()
    except OSError as exc:
        raise ConfigError("run.output_dir", str(folder), f"cannot be written ({exc.strerror})",
                          "choose a folder that you may write to") from exc
    try:
        _check(folder, config, resume)
        discard_partial(folder / FOLDER)
        write_text(folder / "config.yaml", dump_yaml(config))
    except OSError as exc:
        lease.release()
        raise ConfigError("run.output_dir", str(folder), f"cannot be written ({exc.strerror})",
                          "choose a folder that you may write to") from exc
    except ConfigError:
        lease.release()
        raise
    return lease


def _check(folder: Path, config: Config, resume: str) -> None:
    held = [path for path in folder.iterdir() if not path.name.startswith((NAME, ".config.yaml"))]
    own = (folder / "config.yaml").is_file()
    if held and (resume == "never" or not own):
        what = "holds another run" if own else "exists and is not empty"
        raise ConfigError("run.output_dir", str(folder), what, "choose another run.output_dir, or move this one away")
    if is_finished(folder):
        raise ConfigError("run.output_dir", str(folder), "holds a finished run",
                          "choose another run.output_dir; `prelora report` prints what came of this one")
    if own:
        before = load_config(folder / "config.yaml").model_dump(mode="json")
        _same(before, config, folder, new_run=False)
    if resume not in ("auto", "never"):
        source = candidates(folder, resume)[0]
        new_run = source.resolve().parent.parent != folder.resolve()
        if held and new_run:
            raise ConfigError("--resume", resume, f"is of another run, and {folder} holds one already",
                              "choose another run.output_dir")
        try:
            before = read_run_state(source)["config"]
        except (BrokenCheckpointError, KeyError):
            return  # told when it is loaded
        _same(before, config, source, new_run=new_run)


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` came to its end."""
    plans = folder / "plans.jsonl"
    return plans.is_file() and any(row["event"] == "end" for row in read_lines(plans))


def _same(before: Mapping[str, Any], config: Config, where: Path, *, new_run: bool) -> None:
    for key, old, new in differences(before, config.model_dump(mode="json"), new_run=new_run):
        raise ConfigError(key, new, f"was {old!r} in {where}, and a resumed run keeps it",
                          f"set {key}={old}, or choose another run.output_dir"
                          + ("" if new_run else " and begin it with --resume " + str(where)))
