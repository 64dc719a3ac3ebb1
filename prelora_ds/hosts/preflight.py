"""`prelora preflight`: find in under a minute what would stop or slow a run on these hosts."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from prelora_ds.errors import ConfigError
from prelora_ds.hosts.hostfile import Host, split_command

MAX_CLOCK_OFFSET_S = 1.0
SLOW = 0.5  # a host with less than this share of the median bandwidth is slow
MIN_FREE_GIB = 0.05
SSH = ("ssh -o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=5 "
       "-o ServerAliveCountMax=2 {host}")
# What it means when a question to a host fails.
MESSAGES = {"clock": "unreachable, or this Python is missing there",
            "facts": "host check failed",
            "port": "port {port} is not free",
            "listen": "cannot listen on port {port}",
            "reach": "cannot reach the master {master}:{port}",
            "all_reduce": "the all-reduce failed"}
COLUMNS = ("host", "address", "accelerators", "memory", "disk write", "clock", "neighbours",
           "all-reduce", "")


@dataclass(frozen=True)
class Checks:
    """What the run needs from every host.

    folder: a folder on the shared disk, such as the parent of run.output_dir.
    scratch: node-local folders that must be writable.
    shards: folders of shards that must be readable.
    extensions: compiled ops of DeepSpeed that must exist.
    timeout_s: seconds to wait for each answer of a host.
    """

    folder: Path
    scratch: Sequence[str] = ()
    shards: Sequence[str] = ()
    extensions: Sequence[str] = ()
    interface: str | None = None
    master_port: int = 29500
    timeout_s: float = 45.0
    ssh: str = SSH


@dataclass
class Report:
    """Answers and problems by host, in the order of the hostfile."""

    hosts: list[str]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not any(self.problems.values())

    def to_json(self) -> dict[str, Any]:
        return {"fit": self.ok, "seconds": round(self.seconds, 1),
                "hosts": {host: {"problems": self.problems[host], **self.answers[host]}
                          for host in self.hosts}}


class _HostSession:
    """A process of `prelora_ds.hosts.hostcheck` on one host, which answers question by question."""

    def __init__(self, host: str, ssh: str) -> None:
        remote = [f"cd {shlex.quote(os.getcwd())}"]
        for key in ("PYTHONPATH", "TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR"):
            if key in os.environ:
                remote.append(f"export {key}={shlex.quote(os.environ[key])}")
        remote.append(f"exec {shlex.quote(sys.executable)} -m prelora_ds.hosts.hostcheck")
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the session is)
        command = split_command("--ssh", ssh, {"host": host})
        try:
            self.process = subprocess.Popen([*command, "; ".join(remote)], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=self.errors)
        except (FileNotFoundError, PermissionError) as exc:
            raise ConfigError("--ssh", ssh, f"cannot be started ({exc.strerror})",
                              "install it, or name another command with {host}") from exc

    def ask(self, name: str, timeout_s: float, **question: Any) -> dict[str, Any]:
        """Return the answer; {"error": ...} on a failure or a timeout."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write((json.dumps({"ask": name, **question}) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            return {"error": self._why()}
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        if not ready:
            return {"error": f"no answer to `{name}` within {timeout_s:.0f} s"}
        line = self.process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line) if line else {"error": self._why()}
            return answer
        except ValueError:
            return {"error": f"unexpected output before the answer: {line[:80]!r} "
                             "(does a login script print?)"}

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # ssh has ended, and a question was not flushed
            self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)  # a process that is stuck in the kernel ends later

    def _why(self) -> str:
        self.process.poll()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ssh exited with {self.process.poll()}"


def run_preflight(hosts: Sequence[Host], checks: Checks) -> Report:
    """Ask all hosts at the same time, question by question.

    A host that fails a question is not asked the next one.
    """
    begun = time.monotonic()
    names = [host.name for host in hosts]
    report = Report(names, {name: {} for name in names}, {name: [] for name in names})
    token = checks.folder / f".preflight.{uuid.uuid4().hex}"
    token.write_text(token.name)
    sessions = {name: _HostSession(name, checks.ssh) for name in names}
    slots = {host.name: host.slots for host in hosts}
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            _run_checks(report, sessions, pool, checks, token, slots)
    finally:
        for session in sessions.values():
            session.close()
        token.unlink()
    report.seconds = time.monotonic() - begun
    return report


def _run_checks(report: Report, sessions: Mapping[str, _HostSession], pool: ThreadPoolExecutor,
                checks: Checks, token: Path, slots: Mapping[str, int]) -> None:
    def ask(names: Sequence[str], what: str,
            by_host: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
            **question: Any) -> list[str]:
        """Ask all of ``names`` at the same time; returns those that answer without an error.

        by_host: additional parts of the question for each host.
        """
        def ask_one(name: str) -> dict[str, Any]:
            return sessions[name].ask(what, checks.timeout_s, **question, **by_host.get(name, {}))

        for name, answer in zip(names, pool.map(ask_one, names), strict=True):
            report.answers[name][what] = answer
            if "error" in answer:
                message = MESSAGES[what].format(**question)
                report.problems[name].append(f"{message}: {answer['error']}")
        return [name for name in names if "error" not in report.answers[name][what]]

    alive = ask(report.hosts, "clock")
    for name in alive:
        # Ask again now that the host answers at once: the error is half of the round trip.
        sent = time.time()
        remote = sessions[name].ask("clock", checks.timeout_s).get("time", sent)
        offset_s = remote - (sent + time.time()) / 2
        report.answers[name]["clock"] = {"offset_s": round(offset_s, 3)}

    alive = ask(alive, "facts", disks=[str(checks.folder), *checks.scratch], token=str(token),
                shards=list(checks.shards), interface=checks.interface,
                extensions=list(checks.extensions))
    for name, problems in find_problems(report.answers, alive, token.name, slots).items():
        report.problems[name] += problems
    if not alive:
        return

    master = alive[0]
    port = checks.master_port
    if not ask([master], "port", port=port) or not ask([master], "listen", port=port):
        return
    alive = [master, *ask(alive[1:], "reach", master=master, port=port, limit_s=5.0)]
    ranks = {name: {"rank": rank} for rank, name in enumerate(alive)}
    alive = ask(alive, "all_reduce", ranks, master=master, port=port, interface=checks.interface,
                world=len(alive), limit_s=checks.timeout_s / 2)
    rates = {name: report.answers[name]["all_reduce"] for name in alive}
    for name, problem in find_slow_hosts(rates).items():
        report.problems[name].append(problem)


def find_problems(answers: Mapping[str, Mapping[str, Any]], alive: Sequence[str], token: str,
                  slots: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the problems of each host: its own, and its differences from the majority."""
    facts = {name: answers[name]["facts"] for name in alive}
    problems = {name: _problems_of_host(facts[name], answers[name]["clock"]["offset_s"], token,
                                        slots[name])
                for name in alive}

    compared = [(what, {name: fact[what] for name, fact in facts.items()})
                for what in ("accelerators", "cores")]
    compared += [(key, {name: fact["make"].get(key) for name, fact in facts.items()})
                 for key in sorted({key for fact in facts.values() for key in fact["make"]})]
    for what, values in compared:
        usual = _most_common(list(values.values()))
        for name, value in values.items():
            if value != usual:
                problems[name].append(f"{what}: {value} (other hosts: {usual})")

    enough_gib = median([fact["memory_gib"] for fact in facts.values()] or [0.0]) / 2
    for name, fact in facts.items():
        if fact["memory_gib"] < enough_gib:
            problems[name].append(f"only {fact['memory_gib']} GiB free memory, "
                                  "less than half of the median")
    return problems


def _problems_of_host(fact: Mapping[str, Any], offset_s: float, token: str,
                      slots: int) -> list[str]:
    """Return the problems of one host that need no comparison with other hosts."""
    problems = []
    if str(fact["address"]).startswith(("127.", "unknown")):
        problems.append(f"its name {fact['name']} resolves to {fact['address']}: "
                        "fix /etc/hosts, or set launch.interface")
    if not fact["interface"]:
        problems.append("does not have the interface set in launch.interface")
    if abs(offset_s) > MAX_CLOCK_OFFSET_S:
        problems.append(f"its clock is {offset_s:+.1f} s off")
    if fact["shared"] != token:
        problems.append("does not see the files of the first host: "
                        "run.output_dir is not on a shared disk")
    for path, state in fact["disks"].items():
        if "error" in state:
            problems.append(f"{path} cannot be written: {state['error']}")
        elif state["free_gib"] < MIN_FREE_GIB:
            problems.append(f"{path} has only {state['free_gib']} GiB left")
    for path, state in fact["shards"].items():
        if state.startswith("error"):
            problems.append(f"shards {path}: {state}")
    for op, folder in fact["extensions"].items():
        if folder is None:
            problems.append(f"DeepSpeed's {op} is not built: set TORCH_EXTENSIONS_DIR, "
                            "or build it before the job")
    if 0 < len(fact["accelerators"]) != slots:
        problems.append(f"has {len(fact['accelerators'])} accelerators, "
                        f"but the hostfile states slots={slots}")
    return problems


def find_slow_hosts(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return hosts with a wrong sum, or less than half of the median bandwidth.

    A host's bandwidth is that to its faster neighbour.
    """
    best = {name: max(answer["neighbours_mb_s"], default=0.0) for name, answer in answers.items()}
    usual = median(best.values()) if best else 0.0
    problems = {name: f"slow: {rate:.0f} MB/s to its faster neighbour (median {usual:.0f} MB/s)"
                for name, rate in best.items() if rate < SLOW * usual}
    for name, answer in answers.items():
        if not answer["correct"]:
            problems[name] = "all-reduce returned a wrong result"
    return problems


def _most_common(values: Sequence[Any]) -> Any:
    texts = [json.dumps(value) for value in values]
    return json.loads(max(texts, key=texts.count)) if texts else None


def print_preflight(report: Report) -> None:
    """Print one table, and every problem with its host."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(report.hosts)} hosts, {report.seconds:.1f} s", title_justify="left")
    for column in COLUMNS:
        is_text = column in ("host", "address", "")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for host in report.hosts:
        verdict = "FAILED" if report.problems[host] else "ok"
        table.add_row(host, *_cells(report.answers[host]), verdict)
    console = Console()
    console.print(table)
    for host in report.hosts:
        for problem in report.problems[host]:
            console.print(f"{host}: {problem}", highlight=False, markup=False, soft_wrap=True)


def _cells(answers: Mapping[str, Any]) -> list[str]:
    """Return the cells of a host's answers, empty where it did not answer."""
    fact = answers.get("facts", {})
    rate = answers.get("all_reduce", {})
    clock = answers.get("clock", {})
    writes = [state["write_s"] for state in fact.get("disks", {}).values() if "write_s" in state]
    return [str(fact.get("address", "")),
            str(len(fact["accelerators"])) if "accelerators" in fact else "",
            f"{fact['memory_gib']} GiB" if "memory_gib" in fact else "",
            f"{max(writes)} s" if writes else "",
            f"{clock['offset_s']:+.3f} s" if "offset_s" in clock else "",
            " ".join(f"{value:.0f}" for value in rate.get("neighbours_mb_s", [])),
            f"{rate['all_reduce_mb_s']:.0f} MB/s" if "all_reduce_mb_s" in rate else ""]
