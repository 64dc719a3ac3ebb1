"""`prelora job`: a batch script from a recipe and a site profile."""

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
from prelora_ds.hosts.heartbeat import LEASE

PROFILES = Path(__file__).with_name("profiles")
SCRIPT = Path("launch/pretrain.py")  # what a job starts, in its folder


class Profile(BaseModel):
    """What a site wants of a job; a YAML file of profiles/, or your own.

    directives: without ``#PBS``/``#SBATCH``; {{ account }}, {{ queue }}, {{ filesystems }}, {{ walltime }} and
    {{ total_nodes }} are filled in. launcher: as of `prelora supervise`. on_host: starts a command on $host.
    walltime_limits: seconds that a job of so many nodes may take in the queue that it gets when none is asked for.
    network: the variables of NCCL and its plugin, left out by --no-network.
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
class Job:
    """One job of a chain. Paths are absolute.

    folder: the checkout, in which launch/pretrain.py is. supervise: the folder that the run's
    supervisor writes. stage: copy the shards to the profile's scratch folder first.
    """

    name: str
    script: Path
    folder: Path
    supervise: Path
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


def load_profile(name: str) -> Profile:
    """The profile of a site, by name or path; raises ConfigError."""
    path = Path(name) if name.endswith(".yaml") else PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError("--profile", name, "there is no such profile",
                          f"choose {', '.join(sorted(p.stem for p in PROFILES.glob('*.yaml')))}, or a .yaml file")
    try:
        return Profile.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    except (UnreadableError, UnicodeDecodeError, ValidationError) as exc:
        raise ConfigError("--profile", name, f"is not a profile: {exc}", "see prelora_ds/hosts/profiles/") from exc


def render(job: Job, profile: Profile, config: Config) -> str:
    """The batch script. Raises ConfigError for what the site or the scheduler would refuse."""
    _check(job, profile)
    launcher = re.sub(r"(\S*{\w+}\S*)", r"'\1'", profile.launcher)  # the shell leaves the supervisor's words alone
    out = Path(config.run.output_dir).resolve()
    sets = [place(path) for path in (config.data.train, config.data.val)]
    if job.stage and any("://" in path or config.data.reader == "webdataset" for path in sets):
        raise ConfigError("--stage", True, "stages folders, and data.train or data.val is a URL or a pattern",
                          "leave it out, and set data.cache_dir, which fetches shards while training goes on")
    # By content of the path: two sets of one basename, or another run's, do not meet in one folder.
    copies = [f"{profile.scratch}/prelora/{Path(path).name}-{sha256(path.encode()).hexdigest()[:8]}" for path in sets]
    words = [str(job.recipe), *(["--deepspeed_config", str(job.deepspeed_config)] if job.deepspeed_config else []),
             *job.overrides, f"run.output_dir={out}"]
    if not job.stage:
        words += [f"data.train={sets[0]}", f"data.val={sets[1]}"]
    if profile.interface is not None and config.launch.interface is None:
        words.append(f"launch.interface={profile.interface}")
    run = f"{shlex.quote(sys.executable)} -u {SCRIPT} --recipe " + " ".join(map(shlex.quote, words))
    if job.stage:  # in double quotes: the site's folder has ${USER} in it
        run += f' "data.train={copies[0]}" "data.val={copies[1]}"'
    environment = Environment(loader=FileSystemLoader(PROFILES), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True)
    values: dict[str, Any] = {
        "scheduler": profile.scheduler, "name": job.name, "nodes": job.nodes, "spares": job.spares,
        "total_nodes": job.nodes + job.spares, "ranks_per_node": profile.ranks_per_node, "warn_s": job.warn_s,
        "walltime": _clock(job.walltime_s), "timer_s": int(job.walltime_s) - job.warn_s, "max_jobs": job.max_jobs,
        "folder": shlex.quote(str(job.folder)), "script": shlex.quote(str(job.script)),
        "setup": profile.setup if job.setup is None else job.setup,
        "environment": {key: shlex.quote(value) for key, value in (profile.network if job.network else {}).items()},
        "output_dir": shlex.quote(str(out)), "lease": shlex.quote(str(job.supervise / LEASE)),
        "stage": " ".join(f'{shlex.quote(a)} "{b}"' for a, b in zip(sets, copies, strict=True)) if job.stage else "",
        "on_host": profile.on_host,
        "prelora": f"{shlex.quote(sys.executable)} -u -m prelora_ds.cli", "probe": shlex.quote(profile.probe),
        "launcher": launcher + (f" {job.container}" if job.container else ""), "run": run}
    site = {"account": job.account, "queue": job.queue, "filesystems": job.filesystems, **values}
    try:
        directives = [environment.from_string(line).render(site) for line in profile.directives]
    except TemplateError as exc:
        raise ConfigError("--profile", list(profile.directives), str(exc), "mend the profile's directives") from exc
    directives += [flag + value for flag, value in _asked(job, profile)]
    script = environment.get_template("job.sh.j2").render(values | {"directives": directives})
    _check_bash_reads(script, job)
    return script


def _check_bash_reads(script: str, job: Job) -> None:
    """Raise ConfigError for lines of the user that leave a quote open or the like."""
    read = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    if read.returncode:
        raise ConfigError("--setup, --container", [*(job.setup or ()), job.container],
                          f"make a script that bash cannot read ({read.stderr.strip().splitlines()[0]})",
                          "close what they open, or correct these lines in the profile")


def place(data: str) -> str:
    """Where a data set lies, for a job that runs elsewhere: a URL as it is, a folder or pattern in full."""
    return data if "://" in data else os.path.abspath(data)


def _asked(job: Job, profile: Profile) -> list[tuple[str, str]]:
    """Account and queue, where the profile itself does not place them."""
    text = " ".join(profile.directives)
    flags = {"account": "-A ", "queue": "-q "} if profile.scheduler == "pbs" else {"account": "--account=",
                                                                                  "queue": "--partition="}
    return [(flags[key], value) for key in flags if (value := getattr(job, key)) and key not in text]


def _check(job: Job, profile: Profile) -> None:
    if not (job.folder / SCRIPT).is_file():
        raise ConfigError("the working folder", str(job.folder),
                          f"has no {SCRIPT}, which the job would start there",
                          "run `prelora job` in a checkout of prelora_ds that all hosts see")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", job.name):
        raise ConfigError("run.name", job.name, "is not a name of a job",
                          "begin with a letter; letters, digits, _ and -")
    for key, line in (("--container", job.container), *(("--setup", line) for line in job.setup or ())):
        if line is not None and not line.isprintable():
            raise ConfigError(key, line, "is more than one line", "write one line; --setup may be given again")
    if not re.fullmatch(r"[A-Za-z0-9_./:@-]*", "".join(filter(None, (job.account, job.queue, job.filesystems)))):
        raise ConfigError("--account, --queue", f"{job.account} {job.queue}", "has odd characters", "give plain names")
    if "account" in " ".join(profile.directives) and job.account is None:
        raise ConfigError("--account", None, "is required at this site", "name the project that pays")
    total = job.nodes + job.spares
    if profile.walltime_limits and job.queue is None:
        limit = next((seconds for nodes, seconds in sorted(profile.walltime_limits.items()) if total <= nodes), None)
        if limit is None:
            raise ConfigError("--nodes", job.nodes, f"with {job.spares} spares: the site's limit is "
                              f"{max(profile.walltime_limits)}", "ask for less, or name a --queue")
        if job.walltime_s > limit:
            raise ConfigError("--walltime", _clock(job.walltime_s), f"the site's limit for {total} nodes is "
                              f"{_clock(limit)}", "ask for less, the run goes on in the next job; or name a --queue")
    if job.walltime_s <= 2 * job.warn_s:
        raise ConfigError("--walltime", _clock(job.walltime_s), f"is too short for a warning {job.warn_s} s ahead",
                          "ask for more, or a later --warn")
    if job.stage and profile.scratch is None:
        raise ConfigError("--stage", True, "the profile has no scratch folder", "set scratch in a copy of the profile")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600:02d}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"
