"""Host lists: DeepSpeed's hostfile, Slurm's nodelist, and the environment file that pdsh's ranks get."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from prelora_ds.errors import ConfigError
from prelora_ds.files import replace_file

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_LINE = re.compile(r"(\S+)\s+slots=([0-9]+)")
_MOST_SLOTS = 9999  # ranks of one host
_MOST_HOSTS = 100_000  # of a nodelist, which names more in a few characters than memory holds


@dataclass(frozen=True)
class Host:
    """One host and how many ranks it takes."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file of lines ``NAME slots=N``; blank lines and ``#`` lines are skipped.

    Raises ConfigError that names file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as exc:  # ValueError: not UTF-8, or a path that cannot be
        raise ConfigError("--hostfile", str(path), f"cannot be read ({exc})", "name a file of `host slots=N` lines") \
            from exc
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, source: str) -> list[Host]:
    """As `read_hostfile`, of a text. DeepSpeed itself takes `a slots=4x` for 4 and a missing file for this host."""
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which ends lines at a form feed too
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where, problem = f"{source}:{number}", _problem_of(line)
        if problem is not None:
            raise ConfigError(where, line, f"is not a line of a hostfile: {problem}",
                              f"write `NAME slots=N`, N from 1 to {_MOST_SLOTS}")
        name, slots = line.split()
        if name.lower() in hosts:
            raise ConfigError(where, name, "stands there twice",
                              "name each host once, with all its slots")
        hosts[name.lower()] = Host(name, int(slots.removeprefix("slots=")))
    if not hosts:
        raise ConfigError("--hostfile", source, "names no host", "write `NAME slots=N` for each host")
    return list(hosts.values())


def _problem_of(line: str) -> str | None:
    """What is wrong with a line of a hostfile, if anything is."""
    words = line.split()
    if "#" in line:
        return "a comment needs a line of its own"
    if "@" in words[0]:
        return "it names a user, which belongs into ~/.ssh/config (User)"
    if len(words[0]) > 253 or not _NAME.fullmatch(words[0]):
        return f"{words[0]!r} is not the name of a host"
    match = _LINE.fullmatch(line)
    if match is None:
        rest = " ".join(words[1:])
        return f"after the name comes slots=N, without blanks, and here {rest!r}" if rest else \
            "slots=N is missing"
    if len(match[2]) > len(str(_MOST_SLOTS)) or int(match[2]) == 0:
        return f"a host has from 1 to {_MOST_SLOTS} slots"
    return None


def format_hostfile(hosts: Iterable[Host]) -> str:
    """What `parse_hostfile` and DeepSpeed read."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def format_mpi_hosts(hosts: Sequence[Host]) -> str:
    """For ``mpirun --host``: the same in Open MPI's and MPICH's command line."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def substitute(word: str, values: Mapping[str, str]) -> str:
    """``word`` with each {key} of ``values`` filled in, other braces untouched."""
    for key, value in values.items():
        word = word.replace("{" + key + "}", value)
    return word


def split_command(key: str, text: str, values: Mapping[str, str]) -> list[str]:
    """The words of the command line ``text``, filled in. Raises ConfigError for the option ``key``."""
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise ConfigError(key, text, f"is not a command line ({exc})", "close its quotes") from exc
    return [substitute(word, values) for word in words]


def is_shell_safe(value: str) -> bool:
    """Whether a remote shell leaves ``value`` as it is."""
    return re.fullmatch(r"[A-Za-z0-9_./:,=@%+^-]+", value) is not None


def write_ds_env(path: Path, values: Mapping[str, str]) -> None:
    """Write the file of DS_ENV_FILE: one KEY=VALUE a line and nothing else; DeepSpeed stops at a comment or blank line.

    The value goes unquoted through the remote shell, so what that would expand or split is refused (ConfigError).
    """
    for key, value in values.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ConfigError(str(path), key, "is not the name of a variable", "rename it")
        if not is_shell_safe(value):
            raise ConfigError(str(path), f"{key}={value}", "would be changed by the remote shell",
                              "use letters, digits and _./:,=@%+^- only")
    replace_file(path, "".join(f"{key}={value}\n" for key, value in sorted(values.items())))


def expand_nodelist(text: str) -> list[str]:
    """The hosts of a Slurm nodelist, ``node[01-03,07],gpu3`` and ``r[1-2]n[1-4]``, in order. Raises ConfigError."""
    hosts: list[str] = []
    for part in _split_outside_brackets(text):
        choices: list[list[str]] = []
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([0-9,-]+)\]", part):
            choices.append([literal] if literal else [number for r in ranges.split(",") for number in _range(r, text)])
        if not choices or "".join(re.findall(r"[^\[\]]+|\[[0-9,-]+\]", part)) != part:
            raise ConfigError("SLURM_NODELIST", text, f"{part!r} is not a part of a nodelist",
                              "start with srun itself")
        if len(hosts) + math.prod(map(len, choices)) > _MOST_HOSTS:
            raise _too_many(text)
        hosts += ["".join(pieces) for pieces in product(*choices)]
    if not hosts:
        raise ConfigError("SLURM_NODELIST", text, "names no host", "start with srun itself")
    return hosts


def _too_many(text: str) -> ConfigError:
    return ConfigError("SLURM_NODELIST", text, f"names more than {_MOST_HOSTS:,} hosts",
                       "start with srun itself")


def _split_outside_brackets(text: str) -> list[str]:
    return [part for part in re.split(r",(?![^\[]*\])", text.strip()) if part]


def _range(text: str, whole: str) -> list[str]:
    match = re.fullmatch(r"([0-9]{1,12})(?:-([0-9]{1,12}))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ConfigError("SLURM_NODELIST", whole, f"{text!r} is not a range",
                          "start with srun itself")
    numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(numbers) > _MOST_HOSTS:
        raise _too_many(whole)
    return [f"{number:0{len(match[1])}d}" for number in numbers]
