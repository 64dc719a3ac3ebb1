"""`prelora job`: create a batch script from a recipe and a site profile."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.exceptions import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prelora_ds.config.documents import UnreadableError, read_yaml
from prelora_ds.config.tree import Config
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.heartbeat import HEARTBEAT_FILE

PROFILES = Path(__file__).with_name("profiles")
SCRIPT = Path("launch/pretrain.py")  # what a job starts, relative to its folder
SCRIPT_TEMPLATE = "job.sh.j2"


class Profile(BaseModel):
    """What a site requires of a job; a YAML file from profiles/, or the user's own.

    directives: lines without ``#PBS``/``#SBATCH``; {{ account }}, {{ queue }}, {{ filesystems }},
    {{ walltime }} and {{ total_nodes }} are replaced.
    setup: shell lines that load the site's modules.
    launcher: the launcher of `prelora supervise`, with its placeholders.
    on_host: a command that runs another command on the host $host.
    probe: the probe command of `prelora supervise`.
    walltime_limits: largest number of nodes -> largest walltime in seconds, for the queue that a
    job gets without --queue.
    scratch: the node-local folder for --stage.
    network: variables of NCCL and its plugin, omitted with --no-network.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheduler: Literal["pbs", "slurm"]
    ranks_per_node: Annotated[int, Field(gt=0)]
    directives: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    launcher: str
    on_host: str
    probe: str
    walltime_limits: dict[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = {}
    scratch: str | None = None
    interface: str | None = None
    network: dict[str, str] = {}


@dataclass(frozen=True)
class Task:
    """A run of a job.

    overrides: what sets the run apart from others of the same recipe.
    output_dir, supervise: the folders of the run and of its supervisor, absolute.
    """

    overrides: tuple[str, ...]
    output_dir: Path
    supervise: Path


@dataclass(frozen=True)
class Job:
    """One job of a chain. All paths are absolute.

    folder: the checkout that contains launch/pretrain.py.
    tasks: the runs; several make the job an array.
    resume: the checkpoint that each run begins from, or None.
    stage: copy the shards to the profile's scratch folder first.
    """

    name: str
    script: Path
    folder: Path
    tasks: tuple[Task, ...]
    recipe: Path
    overrides: Sequence[str]
    deepspeed_config: Path | None
    nodes: int
    spares: int
    walltime_s: float
    warn_s: int
    max_jobs: int
    account: str | None = None
    queue: str | None = None
    filesystems: str | None = None
    stage: bool = False
    network: bool = True
    setup: Sequence[str] | None = None
    container: str | None = None
    resume: Path | None = None


def load_profile(name: str) -> Profile:
    """Return the profile of a site, by name or path. Raises ConfigError."""
    path = Path(name) if name.endswith(".yaml") else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ConfigError("--profile", name, "there is no such profile",
                          f"choose {known}, or the path of a .yaml file")
    try:
        return Profile.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    except (UnreadableError, UnicodeDecodeError, ValidationError) as exc:
        raise ConfigError("--profile", name, f"is not a valid profile: {exc}",
                          "see prelora_ds/hosts/profiles/") from exc


def render(job: Job, profile: Profile, config: Config) -> str:
    """Return the batch script.

    Raises ConfigError for settings that the site or the scheduler would refuse.
    """
    _check(job, profile)
    shards = [absolute_location(path) for path in (config.data.train, config.data.val)]
    if job.stage and any("://" in path or config.data.reader == "webdataset" for path in shards):
        raise ConfigError("--stage", True,
                          "only folders can be staged, and data.train or data.val is a URL or a "
                          "pattern",
                          "omit it and set data.cache_dir, which copies shards during training")
    # The hash of the path keeps data sets with the same folder name, or of other runs, apart.
    copies = [f"{profile.scratch}/prelora/{Path(path).name}-"
              f"{sha256(path.encode()).hexdigest()[:8]}" for path in shards]

    environment = Environment(loader=FileSystemLoader(PROFILES), undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    values = _template_values(job, profile, config, shards, copies)
    site = {"account": job.account, "queue": job.queue, "filesystems": job.filesystems, **values}
    try:
        directives = [environment.from_string(line).render(site) for line in profile.directives]
    except TemplateError as exc:
        raise ConfigError("--profile", list(profile.directives), str(exc),
                          "fix the profile's directives") from exc
    directives += [flag + value for flag, value in _account_and_queue_flags(job, profile)]
    template = environment.get_template(SCRIPT_TEMPLATE)
    script = template.render(values | {"directives": directives})
    _check_bash_syntax(script, job)
    return script


def _template_values(job: Job, profile: Profile, config: Config, shards: Sequence[str],
                     copies: Sequence[str]) -> dict[str, Any]:
    # The shell must not expand the placeholders, which the supervisor replaces.
    launcher = re.sub(r"(\S*{\w+}\S*)", r"'\1'", profile.launcher)
    if job.container:
        launcher += f" {job.container}"
    network = profile.network if job.network else {}
    stage = ""
    if job.stage:
        stage = " ".join(f'{shlex.quote(source)} "{copy}"'
                         for source, copy in zip(shards, copies, strict=True))
    return {
        "scheduler": profile.scheduler,
        "name": job.name,
        "nodes": job.nodes,
        "spares": job.spares,
        "total_nodes": job.nodes + job.spares,
        "ranks_per_node": profile.ranks_per_node,
        "warn_s": job.warn_s,
        "walltime": _clock(job.walltime_s),
        "walltime_s": int(job.walltime_s),
        "timer_s": int(job.walltime_s) - job.warn_s,
        "max_jobs": job.max_jobs,
        "folder": shlex.quote(str(job.folder)),
        "script": shlex.quote(str(job.script)),
        "setup": profile.setup if job.setup is None else job.setup,
        "environment": {key: shlex.quote(value) for key, value in network.items()},
        "tasks": [
            {
                "overrides": " ".join(
                    map(shlex.quote, [*task.overrides, f"run.output_dir={task.output_dir}"])
                ),
                "output_dir": shlex.quote(str(task.output_dir)),
                "heartbeat_file": shlex.quote(str(task.supervise / HEARTBEAT_FILE)),
            }
            for task in job.tasks
        ],
        "stage": stage,
        "on_host": profile.on_host,
        "prelora": f"{shlex.quote(sys.executable)} -u -m prelora_ds.cli",
        "probe": shlex.quote(profile.probe),
        "launcher": launcher,
        "run": _training_command(job, profile, config, shards, copies),
    }


def _training_command(job: Job, profile: Profile, config: Config,
                      shards: Sequence[str], copies: Sequence[str]) -> str:
    words = [str(job.recipe)]
    if job.deepspeed_config:
        words += ["--deepspeed_config", str(job.deepspeed_config)]
    if job.resume:
        words += ["--resume", str(job.resume)]
    words += job.overrides
    if not job.stage:
        words += [f"data.train={shards[0]}", f"data.val={shards[1]}"]
    if profile.interface is not None and config.launch.interface is None:
        words.append(f"launch.interface={profile.interface}")
    arguments = " ".join(map(shlex.quote, words))
    command = f"{shlex.quote(sys.executable)} -u {SCRIPT} --recipe {arguments}"
    command += ' "${overrides[@]}"'
    if job.stage:  # in double quotes: the site's scratch folder contains ${USER}
        command += f' "data.train={copies[0]}" "data.val={copies[1]}"'
    return command


def _check_bash_syntax(script: str, job: Job) -> None:
    """Raise ConfigError if lines of the user break the script, for example with an open quote."""
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True,
                             check=False)
    if checked.returncode:
        message = checked.stderr.strip().splitlines()[0]
        raise ConfigError("--setup, --container", [*(job.setup or ()), job.container],
                          f"produce a script that bash cannot parse ({message})",
                          "close what they open, or correct these lines in the profile")


def absolute_location(data: str) -> str:
    """Return the location of a data set for a job that runs elsewhere.

    A URL is unchanged; a folder or pattern becomes absolute.
    """
    return data if "://" in data else os.path.abspath(data)


def _account_and_queue_flags(job: Job, profile: Profile) -> list[tuple[str, str]]:
    """Return the flags for account and queue that the profile's directives do not contain."""
    directives = " ".join(profile.directives)
    if profile.scheduler == "pbs":
        flags = {"account": "-A ", "queue": "-q "}
    else:
        flags = {"account": "--account=", "queue": "--partition="}
    return [(flags[key], value) for key in flags
            if (value := getattr(job, key)) and key not in directives]


def _check(job: Job, profile: Profile) -> None:
    if not (job.folder / SCRIPT).is_file():
        raise ConfigError("the working folder", str(job.folder),
                          f"does not contain {SCRIPT}, which the job would start there",
                          "run `prelora job` in a checkout of prelora_ds that all hosts see")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", job.name):
        raise ConfigError("run.name", job.name, "is not a valid job name",
                          "start with a letter, then letters, digits, _ or -")
    lines = [("--container", job.container), *(("--setup", line) for line in job.setup or ())]
    for key, line in lines:
        if line is not None and not line.isprintable():
            raise ConfigError(key, line, "is more than one line",
                              "write one line; --setup can be repeated")
    names = "".join(filter(None, (job.account, job.queue, job.filesystems)))
    if not re.fullmatch(r"[A-Za-z0-9_./:@-]*", names):
        raise ConfigError("--account, --queue", f"{job.account} {job.queue}",
                          "contains unsupported characters", "use letters, digits and _./:@-")
    if "account" in " ".join(profile.directives) and job.account is None:
        raise ConfigError("--account", None, "is required at this site",
                          "pass the project to charge")
    _check_limits(job, profile)
    if job.walltime_s <= 2 * job.warn_s:
        raise ConfigError("--walltime", _clock(job.walltime_s),
                          f"is too short for --warn {job.warn_s}",
                          "request more than twice --warn, or lower --warn")
    if job.stage and profile.scratch is None:
        raise ConfigError("--stage", True, "the profile has no scratch folder",
                          "set scratch in a copy of the profile")


def _check_limits(job: Job, profile: Profile) -> None:
    """Check nodes and walltime against the limits of the queue that is used without --queue."""
    if not profile.walltime_limits or job.queue is not None:
        return
    total = job.nodes + job.spares
    limits = sorted(profile.walltime_limits.items())
    limit_s = next((seconds for nodes, seconds in limits if total <= nodes), None)
    if limit_s is None:
        raise ConfigError("--nodes", job.nodes,
                          f"with {job.spares} spares exceeds the site's limit of "
                          f"{max(profile.walltime_limits)} nodes",
                          "request fewer nodes, or set --queue")
    if job.walltime_s > limit_s:
        raise ConfigError("--walltime", _clock(job.walltime_s),
                          f"exceeds the site's limit of {_clock(limit_s)} for {total} nodes",
                          "request less (the run continues in the next job), or set --queue")


def _clock(seconds: float) -> str:
    """Format seconds as HH:MM:SS."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
