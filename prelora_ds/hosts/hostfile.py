"""Host lists: DeepSpeed's hostfile, Slurm's nodelist, and the environment file of pdsh's ranks."""

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
_MAX_SLOTS = 9999  # ranks of one host
_MAX_HOSTS = 100_000  # a few characters of a nodelist can name more hosts than fit into memory


@dataclass(frozen=True)
class Host:
    """One host, and the number of ranks that it runs."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """Return the hosts of a file of lines ``NAME slots=N``.

    Blank lines and lines that start with ``#`` are skipped. Raises ConfigError with file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as exc:  # ValueError: not UTF-8, or not a valid path
        raise ConfigError("--hostfile", str(path), f"cannot be read ({exc})",
                          "name a file with one `NAME slots=N` per line") from exc
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, source: str) -> list[Host]:
    """Return the hosts of the text of a hostfile, as `read_hostfile` does.

    DeepSpeed's own parser is less strict: it reads `a slots=4x` as 4, and a missing file as this
    host.
    """
    hosts: dict[str, Host] = {}
    # Not splitlines, which also splits at form feeds.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{source}:{number}"
        problem = _problem_of(line)
        if problem is not None:
            raise ConfigError(where, line, f"is not a valid hostfile line: {problem}",
                              f"write `NAME slots=N`, N from 1 to {_MAX_SLOTS}")
        name, slots = line.split()
        if name.lower() in hosts:
            raise ConfigError(where, name, "is listed twice",
                              "list each host once, with all its slots")
        hosts[name.lower()] = Host(name, int(slots.removeprefix("slots=")))
    if not hosts:
        raise ConfigError("--hostfile", source, "contains no host",
                          "write one `NAME slots=N` per line")
    return list(hosts.values())


def _problem_of(line: str) -> str | None:
    """Return what is wrong with a line of a hostfile, or None."""
    words = line.split()
    if "#" in line:
        return "a comment needs a line of its own"
    if "@" in words[0]:
        return "it contains a user; set User in ~/.ssh/config instead"
    if len(words[0]) > 253 or not _NAME.fullmatch(words[0]):
        return f"{words[0]!r} is not a valid host name"
    match = _LINE.fullmatch(line)
    if match is None:
        rest = " ".join(words[1:])
        if not rest:
            return "slots=N is missing"
        return f"the name must be followed by slots=N (without blanks), not by {rest!r}"
    if len(match[2]) > len(str(_MAX_SLOTS)) or int(match[2]) == 0:
        return f"the number of slots must be from 1 to {_MAX_SLOTS}"
    return None


def format_hostfile(hosts: Iterable[Host]) -> str:
    """Return the text of a hostfile, which `parse_hostfile` and DeepSpeed can read."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def format_mpi_hosts(hosts: Sequence[Host]) -> str:
    """Return the value of ``mpirun --host``, which is the same for Open MPI and MPICH."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def substitute(word: str, values: Mapping[str, str]) -> str:
    """Replace each {key} of ``values`` in ``word``; other braces are untouched."""
    for key, value in values.items():
        word = word.replace("{" + key + "}", value)
    return word


def split_command(key: str, text: str, values: Mapping[str, str]) -> list[str]:
    """Split the command line ``text`` into words and substitute ``values``.

    Raises ConfigError, which names the option ``key``.
    """
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise ConfigError(key, text, f"cannot be parsed ({exc})", "close its quotes") from exc
    return [substitute(word, values) for word in words]


def is_shell_safe(value: str) -> bool:
    """Whether a remote shell does not alter ``value``."""
    return re.fullmatch(r"[A-Za-z0-9_./:,=@%+^-]+", value) is not None


def write_ds_env(path: Path, values: Mapping[str, str]) -> None:
    """Write the file of DS_ENV_FILE, with one KEY=VALUE per line.

    It contains nothing else: DeepSpeed stops at a comment or blank line. The values pass through
    the remote shell without quotes. Raises ConfigError for a value that the shell would alter.
    """
    for key, value in values.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ConfigError(str(path), key, "is not a valid variable name", "rename it")
        if not is_shell_safe(value):
            raise ConfigError(str(path), f"{key}={value}", "would be altered by the remote shell",
                              "use only letters, digits and _./:,=@%+^-")
    replace_file(path, "".join(f"{key}={value}\n" for key, value in sorted(values.items())))


def expand_nodelist(text: str) -> list[str]:
    """Return the hosts of a Slurm nodelist in order.

    Examples: ``node[01-03,07],gpu3`` and ``r[1-2]n[1-4]``. Raises ConfigError.
    """
    hosts: list[str] = []
    for part in _split_outside_brackets(text):
        choices: list[list[str]] = []
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([0-9,-]+)\]", part):
            if literal:
                choices.append([literal])
            else:
                choices.append([number for numbers in ranges.split(",")
                                for number in _range(numbers, text)])
        if not choices or "".join(re.findall(r"[^\[\]]+|\[[0-9,-]+\]", part)) != part:
            raise ConfigError("SLURM_NODELIST", text, f"{part!r} cannot be parsed",
                              "start with srun")
        if len(hosts) + math.prod(map(len, choices)) > _MAX_HOSTS:
            raise _too_many(text)
        hosts += ["".join(pieces) for pieces in product(*choices)]
    if not hosts:
        raise ConfigError("SLURM_NODELIST", text, "contains no host", "start with srun")
    return hosts


def _too_many(text: str) -> ConfigError:
    return ConfigError("SLURM_NODELIST", text, f"contains more than {_MAX_HOSTS:,} hosts",
                       "start with srun")


def _split_outside_brackets(text: str) -> list[str]:
    return [part for part in re.split(r",(?![^\[]*\])", text.strip()) if part]


def _range(text: str, nodelist: str) -> list[str]:
    """Return the numbers of ``01-03``, with leading zeros."""
    match = re.fullmatch(r"([0-9]{1,12})(?:-([0-9]{1,12}))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ConfigError("SLURM_NODELIST", nodelist, f"{text!r} cannot be parsed",
                          "start with srun")
    numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(numbers) > _MAX_HOSTS:
        raise _too_many(nodelist)
    return [f"{number:0{len(match[1])}d}" for number in numbers]
